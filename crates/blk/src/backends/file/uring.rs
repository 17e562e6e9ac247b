//! A thread's way to files through io_uring.
//!
//! A burst is shown to the kernel by one call, and what the page cache could answer is done when it returns. The rest
//! is looked for in shared memory.
//!
//! Where the page cache is bypassed, it is bypassed by all requests: bytes that were reached both ways would differ. What
//! is not aligned goes through a buffer of our own, in whole blocks ([`Span`]).

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;
use virtio::Memory;
use virtio::ring::Chains;

use super::blocks::{Claim, Need};
use super::bounce::{BOUNCE_BYTES, Bounce, Span};
use super::hold::Hold;
use super::ring::{Job, PIECES_MAX, Parts, Ring, Way};
use super::sync::Lane;
use super::transfer::{Carrier, Data, Ended, Transfer};
use super::zero::{Step, zeros};
use super::{DirectAlign, Opened};
use crate::backend::{BackendError, Op, OpKind, Status};

/// The most bytes of a transfer that the kernel gets at once: a longer one read from the page cache would keep the
/// I/O thread from everything else. A multiple of every alignment.
const TRANSFER_BYTES_MAX: u64 = 1 << 20;
/// The most bounce buffers of one thread; transfers that need one wait for it.
const BOUNCES_MAX: usize = 64;

/// Index in the ring of the open file that data of `file` go through.
#[inline(always)]
fn main(file: u8) -> u32 {
    u32::from(file) * 2
}

/// Of the one that is asked for durability, which no other thread has, so that no other is told of what fails here.
fn own(file: u8) -> u32 {
    u32::from(file) * 2 + 1
}

/// One of the files.
struct Reached {
    file: Arc<Opened>,
    align: Option<DirectAlign>,
    lane: Lane,
}

/// One transfer in flight.
#[derive(Debug)]
struct Flight {
    transfer: Transfer,
    /// Bytes that are done.
    progress: u64,
    /// Ways to zero a range that the system turned out not to know.
    refusals: usize,
}

impl Flight {
    /// Takes note of a request that succeeded with `result`; false if it got nowhere.
    #[inline(always)]
    fn advance(&mut self, file: &Opened, result: u64) -> bool {
        let step = match self.transfer.kind {
            OpKind::Discard | OpKind::WriteZeroes { .. } => self.zero_step(file),
            _ => Step::Write { len: result },
        };
        let moved = match step {
            Step::Allocate { len, .. } | Step::Skip { len } => len,
            Step::Write { .. } => result,
        };
        self.progress += moved;
        moved > 0
    }

    fn zero_step(&self, file: &Opened) -> Step {
        file.zero_step(&self.transfer, self.progress, self.refusals)
    }
}

/// Blocks that transfers in flight have, by slot, and in which of the files; empty where none are needed.
struct Claims(Box<[Option<(u8, Claim)>]>);

impl Claims {
    #[inline(always)]
    fn release(&mut self, slot: usize, files: &[Reached]) {
        if !self.0.is_empty()
            && let Some((file, claim)) = self.0[slot].take()
            && let Some(blocks) = &files[usize::from(file)].file.blocks
        {
            blocks.release(claim);
        }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // What storage does not answer may still be written: nobody else gets those blocks.
        if self.ring.finish() {
            (0..self.claims.0.len()).for_each(|slot| self.claims.release(slot, &self.files));
        }
    }
}

/// A thread's way to some files.
pub(crate) struct Uring {
    ring: Ring,
    claims: Claims,
    files: Box<[Reached]>,
    flights: Box<[Option<Flight>]>,
    in_flight: usize,
    results: Vec<(usize, i32)>,
    bounces: Vec<Bounce>,
    bounces_made: usize,
    /// Slots that wait for a bounce buffer, or for blocks.
    waiting: VecDeque<usize>,
    /// Some of them have not been tried again yet, so nobody tells this thread when blocks are given back.
    untold: bool,
}

impl Uring {
    /// What may take long, on any thread: for `depth` transfers on the files that are held, of each of which `owns` has an
    /// open file of the thread's own, through the page cache.
    pub(crate) fn prepare(
        holds: &[Arc<Hold>],
        memory: &Arc<Memory>,
        depth: usize,
        owns: &[OwnedFd],
    ) -> Result<Parts, BackendError> {
        let mut files = Vec::new();
        for (hold, own) in holds.iter().zip(owns) {
            let main = hold.file().direct.as_ref().map_or(own, |(direct, _)| direct);
            files.extend([main.as_raw_fd(), own.as_raw_fd()]);
        }
        // Those that are locked are always among them.
        files.extend(holds.iter().map(|hold| hold.file().buffered.as_raw_fd()));
        let first = holds[0].file();
        // Pinned pages pay only where the kernel would otherwise pin them for each request.
        let fixed = first.options.fixed_buffers && first.direct.is_some();
        Parts::new(memory, holds, depth, &files, first.options.sqpoll_ms, fixed)
            .map_err(|error| not_made(first, &error))
    }

    /// The rest, on the thread that will use it.
    pub(crate) fn new(parts: Parts, files: &[Arc<Opened>], depth: usize) -> Result<Self, BackendError> {
        let claims = if files.iter().any(|file| file.blocks.is_some()) { depth } else { 0 };
        let reached =
            |file: &Arc<Opened>| Reached { file: file.clone(), align: file.align(), lane: Lane::default() };
        Ok(Self {
            ring: Ring::new(parts).map_err(|error| not_made(&files[0], &error))?,
            claims: Claims((0..claims).map(|_| None).collect()),
            files: files.iter().map(reached).collect(),
            flights: (0..depth).map(|_| None).collect(),
            in_flight: 0,
            results: Vec::with_capacity(depth),
            bounces: Vec::new(),
            bounces_made: 0,
            waiting: VecDeque::new(),
            untold: false,
        })
    }

    /// The file that a transfer is about.
    #[inline(always)]
    fn file(&self, transfer: &Transfer) -> &Reached {
        &self.files[usize::from(transfer.file)]
    }

    /// Makes the request for what is left of the transfer in `slot`, now or as soon as it may be made.
    #[inline(always)]
    fn request(&mut self, slot: usize, chains: &Chains) {
        let Some(Flight { transfer, .. }) = &self.flights[slot] else { return };
        let Reached { file, align, .. } = self.file(transfer);
        let way = match transfer.kind {
            OpKind::Read => Way::FromFile,
            OpKind::Write if transfer.end() > file.bytes() => return self.ring.nothing(slot),
            OpKind::Write if transfer.durable && align.is_none() => {
                return self.request_in_lane(slot, chains);
            }
            OpKind::Write if transfer.durable => Way::ToFileDurably,
            OpKind::Write => Way::ToFile,
            OpKind::Flush => return self.request_in_lane(slot, chains),
            OpKind::Discard | OpKind::WriteZeroes { .. } => return self.request_zeros(slot, chains),
            OpKind::SecureErase => return self.ring.nothing(slot),
        };
        self.transfer(slot, way, chains);
    }

    /// Moves the next part of a transfer's data.
    #[inline(always)]
    fn transfer(&mut self, slot: usize, way: Way, chains: &Chains) {
        let Some(Flight { transfer, progress, .. }) = &self.flights[slot] else { return };
        let (offset, left) = (transfer.offset + progress, transfer.len - progress);
        let len = left.min(TRANSFER_BYTES_MAX);
        let file = main(transfer.file);
        let Some(align) = self.file(transfer).align else {
            let Some(pieces) = transfer.pieces(chains, *progress, len) else {
                let from = *progress as usize;
                return self.ring.transfer_own(slot, way, (file, offset), from, len as usize);
            };
            return self.ring.transfer(slot, way, file, offset, pieces);
        };
        let len = align.whole_blocks_of(len);
        let Some(pieces) = transfer.pieces(chains, *progress, len) else {
            return self.transfer_bounced(slot, way, chains);
        };
        let unit = align.memory - 1;
        let mut count = 0;
        let aligned = (offset | len).is_multiple_of(align.file)
            && pieces.clone().all(|piece| {
                count += 1;
                (piece.ptr.addr() | piece.len) & unit == 0
            });
        if !aligned || count > PIECES_MAX {
            return self.transfer_bounced(slot, way, chains);
        }
        if way.writes() && !self.claim(slot, offset, len, Need::Shared) {
            return self.wait(slot);
        }
        self.ring.transfer(slot, way, file, offset, pieces);
    }

    /// The same through a buffer of our own, as soon as there is one. Where only a part of the blocks is to be written,
    /// they are read first.
    #[cold]
    fn transfer_bounced(&mut self, slot: usize, way: Way, chains: &Chains) {
        let Some(Flight { transfer, progress, .. }) = &self.flights[slot] else { return };
        let (Some(align), file) = (self.file(transfer).align, main(transfer.file)) else { return };
        let span = Span::new(align.file, transfer.offset + progress, transfer.len - progress);
        let Some(bounce) = self.bounce() else { return self.wait(slot) };
        let merging = way.writes() && !span.is_whole();
        let need = if merging { Need::Exclusive } else { Need::Shared };
        if way.writes() && !self.claim(slot, span.start, span.len as u64, need) {
            self.bounces.push(bounce);
            return self.wait(slot);
        }
        let mut job = Job { bounce, span, merging };
        if merging {
            return self.ring.transfer_bounced(slot, Way::FromFile, file, job);
        }
        if way.writes() {
            self.fill(slot, &mut job, chains);
        }
        self.ring.transfer_bounced(slot, way, file, job);
    }

    /// A buffer, if there is one.
    fn bounce(&mut self) -> Option<Bounce> {
        self.bounces.pop().or_else(|| {
            (self.bounces_made < BOUNCES_MAX).then(|| {
                self.bounces_made += 1;
                Bounce::new()
            })
        })
    }

    /// Puts what is to be written where it belongs among the blocks.
    fn fill(&mut self, slot: usize, job: &mut Job, chains: &Chains) {
        let Some(Flight { transfer, progress, .. }) = &self.flights[slot] else { return };
        let Span { head, data, .. } = job.span;
        match (transfer.kind, transfer.data) {
            (OpKind::Write, Data::Chain { slot, from }) => {
                let from = Op::DATA_OFFSET as u64 + from + progress;
                job.bounce.gather(head, chains.at(slot.into()).readable, from as usize, data);
            }
            (OpKind::Write, Data::Own) => {
                let own = &self.ring.own(slot)[*progress as usize..];
                job.bounce.bytes(head + data)[head..].copy_from_slice(&own[..data]);
            }
            _ => job.bounce.clear(head, data),
        }
    }

    /// Takes the blocks of a range for the transfer in `slot`, where others could change a part of them.
    #[inline(always)]
    fn claim(&mut self, slot: usize, offset: u64, len: u64, need: Need) -> bool {
        let Some(Flight { transfer, .. }) = &self.flights[slot] else { return false };
        let Some(blocks) = &self.file(transfer).file.blocks else { return true };
        let claim = blocks.claim(offset, len, need).map(|claim| (transfer.file, claim));
        let taken = claim.is_some();
        self.claims.0[slot] = claim;
        taken
    }

    /// Makes a request of those of which a thread has one at a time, see [`Lane`].
    #[cold]
    fn request_in_lane(&mut self, slot: usize, chains: &Chains) {
        let Some(Flight { transfer, .. }) = &self.flights[slot] else { return };
        let (kind, file) = (transfer.kind, transfer.file);
        if !self.files[usize::from(file)].lane.enter(slot) {
            return;
        }
        match kind {
            OpKind::Write => self.transfer(slot, Way::ToFileDurably, chains),
            _ => self.ring.sync(slot, own(file)),
        }
    }

    /// The same for a transfer that zeroes or frees a range.
    fn request_zeros(&mut self, slot: usize, chains: &Chains) {
        let Some(flight) = &self.flights[slot] else { return };
        let offset = flight.transfer.offset + flight.progress;
        let Reached { file, align, .. } = self.file(&flight.transfer);
        let (align, number) = (*align, main(flight.transfer.file));
        if !file.still_has(&flight.transfer) {
            return self.ring.nothing(slot);
        }
        match flight.zero_step(file) {
            Step::Allocate { mode, len } => {
                if !self.claim(slot, offset, len, Need::Shared) {
                    return self.wait(slot);
                }
                self.ring.allocate(slot, number, mode.bits() as i32, offset, len);
            }
            Step::Write { len } => {
                let len = align.map_or(len, |align| align.whole_blocks_of(len.min(BOUNCE_BYTES)));
                if align.is_some_and(|align| !(offset | len).is_multiple_of(align.file)) {
                    return self.transfer_bounced(slot, Way::ToFile, chains);
                }
                if !self.claim(slot, offset, len, Need::Shared) {
                    return self.wait(slot);
                }
                self.ring.write_constant(slot, number, offset, zeros(len));
            }
            Step::Skip { .. } => self.ring.nothing(slot),
        }
    }

    /// Takes note of what the kernel says about the request in `slot`; goes on with the transfer or ends it.
    #[inline(always)]
    fn complete(&mut self, slot: usize, result: i32, chains: &Chains, mut ended: impl FnMut(Ended)) {
        let result = match self.ring.take_job(slot) {
            None => result,
            Some(job) => match self.complete_bounced(slot, result, job, chains) {
                Some(result) => result,
                None => return,
            },
        };
        self.claims.release(slot, &self.files);
        let Some(flight) = &mut self.flights[slot] else { return };
        let file = &self.files[usize::from(flight.transfer.file)].file;
        let kind = flight.transfer.kind;
        if kind == OpKind::Flush {
            return self.complete_flush(slot, result, chains, &mut ended);
        }
        let status = match (result, kind) {
            (0.., OpKind::Discard | OpKind::WriteZeroes { .. }) if !file.still_has(&flight.transfer) => {
                file.report(&flight.transfer, Errno::IO)
            }
            (0.., _) if flight.advance(file, result as u64) => {
                if flight.progress < flight.transfer.len {
                    return self.request(slot, chains);
                }
                Status::Ok
            }
            (0, OpKind::Read) if file.options.image => {
                flight.transfer.deliver_zeros(chains, self.ring.own(slot), flight.progress);
                Status::Ok
            }
            // The file was cut off below the capacity. What stood there is lost, and zeros would hide that.
            (0, _) => file.report(&flight.transfer, Errno::IO),
            _ => {
                let error = Errno::from_raw_os_error(-result);
                let refused = error == Errno::OPNOTSUPP
                    && matches!(kind, OpKind::Discard | OpKind::WriteZeroes { .. })
                    && matches!(flight.zero_step(file), Step::Allocate { .. });
                flight.refusals += usize::from(refused);
                if refused || matches!(error, Errno::INTR | Errno::AGAIN) {
                    return self.request(slot, chains);
                }
                file.note_failed(&flight.transfer, error);
                file.report(&flight.transfer, error)
            }
        };
        file.keep_cut(&flight.transfer);
        let Transfer { durable, file, data, .. } = flight.transfer;
        self.flights[slot] = None;
        self.in_flight -= 1;
        if durable {
            self.leave_lane(file, slot, chains);
        }
        let own = if data == Data::Own { std::mem::take(self.ring.own(slot)) } else { Vec::new() };
        ended(Ended { id: slot, status, own });
    }

    /// What the request in `slot` came to, for the part of the transfer that it was about. None if it is not over.
    #[cold]
    fn complete_bounced(&mut self, slot: usize, result: i32, mut job: Job, chains: &Chains) -> Option<i32> {
        let Span { len, head, .. } = job.span;
        let moved = usize::try_from(result).ok();
        if job.merging && moved == Some(len) {
            job.merging = false;
            self.fill(slot, &mut job, chains);
            let Some(Flight { transfer, .. }) = &self.flights[slot] else { return None };
            let way = if transfer.durable { Way::ToFileDurably } else { Way::ToFile };
            self.ring.transfer_bounced(slot, way, main(transfer.file), job);
            return None;
        }
        let part = match moved {
            None => return Some(self.give_back(job, result)),
            // The blocks are not all there any more.
            Some(_) if job.merging => 0,
            Some(moved) => job.span.part_of(moved),
        };
        if let Some(Flight { transfer, progress, .. }) = &self.flights[slot]
            && transfer.kind == OpKind::Read
        {
            let bytes = &job.bounce.bytes(head + part)[head..];
            transfer.deliver(chains, self.ring.own(slot), *progress, bytes);
        }
        Some(self.give_back(job, part as i32))
    }

    fn give_back(&mut self, job: Job, result: i32) -> i32 {
        self.bounces.push(job.bounce);
        result
    }

    /// Ends the flush in `slot` and those that it was made for as well.
    #[cold]
    fn complete_flush(&mut self, slot: usize, result: i32, chains: &Chains, ended: &mut impl FnMut(Ended)) {
        let Some(Flight { transfer, .. }) = &self.flights[slot] else { return };
        let number = transfer.file;
        let result = if result < 0 { Err(Errno::from_raw_os_error(-result)) } else { Ok(()) };
        if matches!(result, Err(Errno::INTR | Errno::AGAIN)) {
            return self.ring.sync(slot, own(number));
        }
        let Reached { file, lane, .. } = &mut self.files[usize::from(number)];
        let result = file.flushed(result);
        let companions = lane.take_companions();
        for slot in std::iter::once(slot).chain(companions) {
            if self.flights[slot].take().is_some() {
                self.in_flight -= 1;
                let status = if result.is_ok() { Status::Ok } else { Status::IoError };
                ended(Ended { id: slot, status, own: Vec::new() });
            }
        }
        self.leave_lane(number, slot, chains);
    }

    /// Lets the next request of the lane go, if `slot` was in it.
    #[cold]
    fn leave_lane(&mut self, file: u8, slot: usize, chains: &Chains) {
        let flights = &self.flights;
        let is_flush = |slot: usize| flights[slot].as_ref().is_some_and(|f| f.transfer.kind == OpKind::Flush);
        if let Some(next) = self.files[usize::from(file)].lane.leave(slot, is_flush) {
            self.request(next, chains);
        }
    }

    /// Has the transfer in `slot` tried again later.
    #[cold]
    fn wait(&mut self, slot: usize) {
        self.waiting.push_back(slot);
        self.untold = true;
    }

    /// Makes the requests that waited and need not any more.
    #[cold]
    fn retry(&mut self, chains: &Chains) {
        // What this thread gives back makes it try again anyway. Of what others give back after this attempt it is told.
        for Reached { file, .. } in &self.files {
            if let Some(blocks) = &file.blocks {
                blocks.wait_for_release(self.ring.event());
            }
        }
        for _ in 0..self.waiting.len() {
            if let Some(slot) = self.waiting.pop_front() {
                self.request(slot, chains);
            }
        }
        self.untold = false;
    }

    /// Begins a transfer that needs no buffer of its own.
    #[inline(always)]
    pub(super) fn begin(&mut self, slot: usize, transfer: Transfer, chains: &Chains) {
        self.flights[slot] = Some(Flight { transfer, progress: 0, refusals: 0 });
        self.in_flight += 1;
        self.request(slot, chains);
    }

    /// See [`Carrier::reap`].
    #[inline(always)]
    pub(super) fn collect(&mut self, chains: &Chains, mut ended: impl FnMut(Ended)) {
        let mut results = std::mem::take(&mut self.results);
        self.ring.completions(&mut results);
        for (slot, result) in results.drain(..) {
            self.complete(slot, result, chains, &mut ended);
        }
        self.results = results;
        if !self.waiting.is_empty() {
            self.retry(chains);
        }
        self.ring.submit();
    }
}

fn not_made(file: &Opened, error: &io::Error) -> BackendError {
    BackendError(format!("making an io_uring for {}: {error}", file.path.display()))
}

impl Carrier for Uring {
    #[inline(always)]
    fn start(
        &mut self,
        id: usize,
        transfer: Transfer,
        own: Vec<u8>,
        chains: &Chains,
        _ended: &mut Vec<Ended>,
    ) {
        if transfer.data == Data::Own {
            self.ring.keep_own(id, own);
        }
        self.begin(id, transfer, chains);
    }

    #[inline(always)]
    fn submit(&mut self) {
        self.ring.submit();
    }

    #[inline(always)]
    fn reap(&mut self, chains: &Chains, ended: &mut Vec<Ended>) {
        self.collect(chains, |end| ended.push(end));
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn event(&self) -> &Arc<OwnedFd> {
        self.ring.event()
    }

    fn arm(&mut self) -> bool {
        self.in_flight > 0 && (self.ring.arm() || self.untold)
    }

    fn disarm(&mut self) {
        self.ring.disarm();
    }

    fn abandons(&mut self) -> bool {
        !self.ring.finish()
    }
}

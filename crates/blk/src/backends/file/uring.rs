//! A queue's way to a file through io_uring.
//!
//! A burst is shown to the kernel by one call, and what the page cache could answer is done when it returns. The rest
//! is looked for in shared memory.
//!
//! Where the page cache is bypassed, it is bypassed by all requests: bytes that were reached both ways would differ. What
//! is not aligned goes through a buffer of our own, in whole blocks ([`Span`]).

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use rustix::io::Errno;
use virtio::Memory;
use virtio::ring::Chains;

use super::blocks::{Claim, Need};
use super::bounce::{BOUNCE_BYTES, Bounce, Span};
use super::hold::Hold;
use super::ring::{Job, PIECES_MAX, Parts, Ring, Way};
use super::sync::Lane;
use super::zero::{Step, zeros};
use super::{DirectAlign, Opened};
use crate::backend::{BackendError, Channel, Done, Op, OpKind, Status};
use crate::data::Pieces;

/// The most bytes of an operation that the kernel gets at once: a longer one read from the page cache would keep the
/// I/O thread from everything else. A multiple of every alignment.
const TRANSFER_BYTES_MAX: u64 = 1 << 20;
/// The most bounce buffers of one queue; requests that need one wait for it.
const BOUNCES_MAX: usize = 64;

/// Files of the ring by their index: where data go, and what is asked for durability, which no other queue has, so that
/// no other is told of what fails here.
const MAIN: u32 = 0;
const OWN: u32 = 1;

/// One operation in flight.
#[derive(Debug)]
struct Flight {
    op: Op,
    /// Bytes that are done.
    progress: u64,
    /// Ways to zero a range that the system turned out not to know.
    refusals: usize,
}

impl Flight {
    /// Takes note of a request that succeeded with `result`; false if it got nowhere.
    #[inline(always)]
    fn advance(&mut self, file: &Opened, result: u64) -> bool {
        let step = match self.op.kind {
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
        file.zero_step(&self.op, self.progress, self.refusals)
    }
}

/// Blocks that requests in flight have, by slot; empty where none are needed. Given back when it is dropped, at the latest.
struct Claims {
    file: Arc<Opened>,
    by_slot: Box<[Option<Claim>]>,
}

impl Claims {
    #[inline(always)]
    fn release(&mut self, slot: usize) {
        if let Some(blocks) = &self.file.blocks
            && let Some(claim) = self.by_slot[slot].take()
        {
            blocks.release(claim);
        }
    }
}

impl Drop for Claims {
    fn drop(&mut self) {
        for slot in 0..self.by_slot.len() {
            self.release(slot);
        }
    }
}

/// A queue's way to a file.
pub(super) struct Uring {
    ring: Ring,
    // Behind the ring, which waits for the requests that have them.
    claims: Claims,
    file: Arc<Opened>,
    align: Option<DirectAlign>,
    flights: Box<[Option<Flight>]>,
    in_flight: usize,
    results: Vec<(usize, i32)>,
    bounces: Vec<Bounce>,
    bounces_made: usize,
    /// Slots that wait for a bounce buffer, or for blocks.
    waiting: VecDeque<usize>,
    lane: Lane,
}

impl Uring {
    /// What may take long, on any thread. `own` is an open file of the queue's, through the page cache.
    pub(super) fn prepare(
        hold: &Arc<Hold>,
        memory: &Arc<Memory>,
        depth: u16,
        own: &OwnedFd,
    ) -> Result<Parts, BackendError> {
        let file = hold.file();
        let main = file.direct.as_ref().map_or(own, |(direct, _)| direct);
        // The one that is locked is always among them.
        let files = [main.as_raw_fd(), own.as_raw_fd(), file.buffered.as_raw_fd()];
        // Pinned pages pay only where the kernel would otherwise pin them for each request.
        let fixed = file.options.fixed_buffers && file.direct.is_some();
        Parts::new(memory, hold, depth, &files, file.options.sqpoll_ms, fixed)
            .map_err(|error| not_made(file, &error))
    }

    /// The rest, on the thread that will use it.
    pub(super) fn new(parts: Parts, file: Arc<Opened>, depth: u16) -> Result<Self, BackendError> {
        let claims = if file.blocks.is_some() { depth } else { 0 };
        Ok(Self {
            ring: Ring::new(parts).map_err(|error| not_made(&file, &error))?,
            claims: Claims { file: file.clone(), by_slot: (0..claims).map(|_| None).collect() },
            align: file.align(),
            file,
            flights: (0..depth).map(|_| None).collect(),
            in_flight: 0,
            results: Vec::with_capacity(depth.into()),
            bounces: Vec::new(),
            bounces_made: 0,
            waiting: VecDeque::new(),
            lane: Lane::default(),
        })
    }

    /// Makes the request for what is left of the operation in `slot`, now or as soon as it may be made.
    #[inline(always)]
    fn request(&mut self, slot: usize, chains: &Chains) {
        let Some(Flight { op, progress, .. }) = &self.flights[slot] else { return };
        let (offset, left) = (op.offset + progress, op.len - progress);
        let way = match op.kind {
            OpKind::Read => Way::FromFile,
            OpKind::Write if offset + left > self.file.bytes() => return self.ring.nothing(slot),
            OpKind::Write if op.durable && self.align.is_none() => return self.request_in_lane(slot, chains),
            OpKind::Write if op.durable => Way::ToFileDurably,
            OpKind::Write => Way::ToFile,
            OpKind::Flush => return self.request_in_lane(slot, chains),
            OpKind::Discard | OpKind::WriteZeroes { .. } => return self.request_zeros(slot, chains),
            OpKind::SecureErase => return self.ring.nothing(slot),
        };
        self.transfer(slot, way, chains);
    }

    /// Moves the next part of an operation's data.
    #[inline(always)]
    fn transfer(&mut self, slot: usize, way: Way, chains: &Chains) {
        let Some(Flight { op, progress, .. }) = &self.flights[slot] else { return };
        let (offset, left) = (op.offset + progress, op.len - progress);
        let len = left.min(TRANSFER_BYTES_MAX);
        let Some(align) = self.align else {
            let pieces = Pieces::new(op.kind, chains.get(&op.token), *progress, len);
            return self.ring.transfer(slot, way, MAIN, offset, pieces);
        };
        let len = align.whole_blocks_of(len);
        let pieces = Pieces::new(op.kind, chains.get(&op.token), *progress, len);
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
            return self.waiting.push_back(slot);
        }
        self.ring.transfer(slot, way, MAIN, offset, pieces);
    }

    /// The same through a buffer of our own, as soon as there is one. Where only a part of the blocks is to be written,
    /// they are read first.
    #[cold]
    fn transfer_bounced(&mut self, slot: usize, way: Way, chains: &Chains) {
        let (Some(Flight { op, progress, .. }), Some(align)) = (&self.flights[slot], self.align) else {
            return;
        };
        let span = Span::new(align.file, op.offset + progress, op.len - progress);
        let Some(bounce) = self.bounce() else { return self.waiting.push_back(slot) };
        let merging = way.writes() && !span.is_whole();
        let need = if merging { Need::Exclusive } else { Need::Shared };
        if way.writes() && !self.claim(slot, span.start, span.len as u64, need) {
            self.bounces.push(bounce);
            return self.waiting.push_back(slot);
        }
        let mut job = Job { bounce, span, merging };
        if merging {
            return self.ring.transfer_bounced(slot, Way::FromFile, MAIN, job);
        }
        if way.writes() {
            self.fill(slot, &mut job, chains);
        }
        self.ring.transfer_bounced(slot, way, MAIN, job);
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
    fn fill(&self, slot: usize, job: &mut Job, chains: &Chains) {
        let Some(Flight { op, progress, .. }) = &self.flights[slot] else { return };
        let Span { head, data, .. } = job.span;
        if op.kind == OpKind::Write {
            let from = Op::DATA_OFFSET + *progress as usize;
            job.bounce.gather(head, chains.get(&op.token).readable, from, data);
        } else {
            job.bounce.clear(head, data);
        }
    }

    /// Takes the blocks of a range for the request in `slot`, where others could change a part of them.
    #[inline(always)]
    fn claim(&mut self, slot: usize, offset: u64, len: u64, need: Need) -> bool {
        let Some(blocks) = &self.file.blocks else { return true };
        let claim = blocks.claim(offset, len, need);
        let taken = claim.is_some();
        self.claims.by_slot[slot] = claim;
        taken
    }

    /// Makes a request of those of which a queue has one at a time, see [`Lane`].
    #[cold]
    fn request_in_lane(&mut self, slot: usize, chains: &Chains) {
        if !self.lane.enter(slot) {
            return;
        }
        match &self.flights[slot] {
            Some(Flight { op, .. }) if op.kind == OpKind::Write => {
                self.transfer(slot, Way::ToFileDurably, chains)
            }
            _ => self.ring.sync(slot, OWN),
        }
    }

    /// The same for an operation on a range.
    fn request_zeros(&mut self, slot: usize, chains: &Chains) {
        let Some(flight) = &self.flights[slot] else { return };
        let offset = flight.op.offset + flight.progress;
        if !self.file.still_has(&flight.op) {
            return self.ring.nothing(slot);
        }
        match flight.zero_step(&self.file) {
            Step::Allocate { mode, len } => {
                if !self.claim(slot, offset, len, Need::Shared) {
                    return self.waiting.push_back(slot);
                }
                self.ring.allocate(slot, MAIN, mode.bits() as i32, offset, len);
            }
            Step::Write { len } => {
                let len = self.align.map_or(len, |align| align.whole_blocks_of(len.min(BOUNCE_BYTES)));
                if self.align.is_some_and(|align| !(offset | len).is_multiple_of(align.file)) {
                    return self.transfer_bounced(slot, Way::ToFile, chains);
                }
                if !self.claim(slot, offset, len, Need::Shared) {
                    return self.waiting.push_back(slot);
                }
                self.ring.write_constant(slot, MAIN, offset, zeros(len));
            }
            Step::Skip { .. } => self.ring.nothing(slot),
        }
    }

    /// Takes note of what the kernel says about the request in `slot`; goes on with the operation or ends it.
    #[inline(always)]
    fn complete(&mut self, slot: usize, result: i32, chains: &Chains, done: &mut Vec<Done>) {
        let result = match self.ring.take_job(slot) {
            None => result,
            Some(job) => match self.complete_bounced(slot, result, job, chains) {
                Some(result) => result,
                None => return,
            },
        };
        self.claims.release(slot);
        let Some(flight) = &mut self.flights[slot] else { return };
        let kind = flight.op.kind;
        if kind == OpKind::Flush {
            return self.complete_flush(slot, result, chains, done);
        }
        let status = match (result, kind) {
            (_, OpKind::SecureErase) => Status::Unsupported,
            (0.., OpKind::Discard | OpKind::WriteZeroes { .. }) if !self.file.still_has(&flight.op) => {
                self.file.report(&flight.op, Errno::IO)
            }
            (0.., _) if flight.advance(&self.file, result as u64) => {
                if flight.progress < flight.op.len {
                    return self.request(slot, chains);
                }
                Status::Ok
            }
            // The file was cut off below the capacity. What stood there is lost, and zeros would hide that.
            (0, _) => self.file.report(&flight.op, Errno::IO),
            _ => {
                let error = Errno::from_raw_os_error(-result);
                let refused = error == Errno::OPNOTSUPP
                    && matches!(kind, OpKind::Discard | OpKind::WriteZeroes { .. })
                    && matches!(flight.zero_step(&self.file), Step::Allocate { .. });
                flight.refusals += usize::from(refused);
                if refused || matches!(error, Errno::INTR | Errno::AGAIN) {
                    return self.request(slot, chains);
                }
                self.file.report(&flight.op, error)
            }
        };
        if let Some(Flight { op, .. }) = self.flights[slot].take() {
            self.in_flight -= 1;
            self.file.keep_cut(&op);
            if op.durable {
                self.leave_lane(slot, chains);
            }
            done.push(Done { token: op.token, status });
        }
    }

    /// What the request in `slot` came to, for the part of the operation that it was about. None if it is not over.
    #[cold]
    fn complete_bounced(&mut self, slot: usize, result: i32, mut job: Job, chains: &Chains) -> Option<i32> {
        let Span { len, head, .. } = job.span;
        let moved = usize::try_from(result).ok();
        if job.merging && moved == Some(len) {
            job.merging = false;
            self.fill(slot, &mut job, chains);
            let durable = self.flights[slot].as_ref().is_some_and(|flight| flight.op.durable);
            let way = if durable { Way::ToFileDurably } else { Way::ToFile };
            self.ring.transfer_bounced(slot, way, MAIN, job);
            return None;
        }
        let part = match moved {
            None => return Some(self.give_back(job, result)),
            // The blocks are not all there any more.
            Some(_) if job.merging => 0,
            Some(moved) => job.span.part_of(moved),
        };
        if let Some(Flight { op, progress, .. }) = &self.flights[slot]
            && op.kind == OpKind::Read
        {
            job.bounce.scatter(head, chains.get(&op.token).writable, *progress as usize, part);
        }
        Some(self.give_back(job, part as i32))
    }

    fn give_back(&mut self, job: Job, result: i32) -> i32 {
        self.bounces.push(job.bounce);
        result
    }

    /// Ends the flush in `slot` and those that it was made for as well.
    #[cold]
    fn complete_flush(&mut self, slot: usize, result: i32, chains: &Chains, done: &mut Vec<Done>) {
        let result = if result < 0 { Err(Errno::from_raw_os_error(-result)) } else { Ok(()) };
        if matches!(result, Err(Errno::INTR | Errno::AGAIN)) {
            return self.ring.sync(slot, OWN);
        }
        let result = self.file.flushed(result);
        let companions = self.lane.take_companions();
        for slot in std::iter::once(slot).chain(companions) {
            let Some(Flight { op, .. }) = self.flights[slot].take() else { continue };
            self.in_flight -= 1;
            let status = if result.is_ok() { Status::Ok } else { Status::IoError };
            done.push(Done { token: op.token, status });
        }
        self.leave_lane(slot, chains);
    }

    /// Lets the next request of the lane go, if `slot` was in it.
    #[cold]
    fn leave_lane(&mut self, slot: usize, chains: &Chains) {
        let flights = &self.flights;
        let is_flush = |slot: usize| flights[slot].as_ref().is_some_and(|f| f.op.kind == OpKind::Flush);
        if let Some(next) = self.lane.leave(slot, is_flush) {
            self.request(next, chains);
        }
    }

    /// Makes the requests that waited and need not any more.
    #[cold]
    fn retry(&mut self, chains: &Chains) {
        // What this queue gives back makes it try again anyway. Of what others give back after this attempt it is told.
        if let Some(blocks) = &self.file.blocks {
            blocks.wait_for_release(self.ring.event());
        }
        for _ in 0..self.waiting.len() {
            if let Some(slot) = self.waiting.pop_front() {
                self.request(slot, chains);
            }
        }
    }
}

fn not_made(file: &Opened, error: &io::Error) -> BackendError {
    BackendError(format!("making an io_uring for {}: {error}", file.path.display()))
}

impl Channel for Uring {
    fn submit(&mut self, ops: &mut Vec<Op>, chains: &Chains, done: &mut Vec<Done>) {
        for op in ops.drain(..) {
            let slot = op.token.slot();
            self.flights[slot] = Some(Flight { op, progress: 0, refusals: 0 });
            self.in_flight += 1;
            self.request(slot, chains);
        }
        self.ring.submit();
        self.reap(chains, done);
    }

    fn reap(&mut self, chains: &Chains, done: &mut Vec<Done>) {
        let mut results = std::mem::take(&mut self.results);
        self.ring.completions(&mut results);
        for (slot, result) in results.drain(..) {
            self.complete(slot, result, chains, done);
        }
        self.results = results;
        if !self.waiting.is_empty() {
            self.retry(chains);
        }
        self.ring.submit();
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn writes_durably(&self) -> bool {
        true
    }

    fn completion_fd(&self) -> Option<RawFd> {
        Some(self.ring.event().as_raw_fd())
    }

    fn arm(&mut self) -> bool {
        self.in_flight > 0 && self.ring.arm()
    }

    fn disarm(&mut self) {
        self.ring.disarm();
    }
}

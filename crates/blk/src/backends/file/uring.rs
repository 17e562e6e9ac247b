//! A queue's way to a file through io_uring.
//!
//! A burst is shown to the kernel by one call, and what the page cache could answer is done when it returns. The rest
//! is looked for in shared memory.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::Arc;

use reactor::LogLimit;
use rustix::io::Errno;
use virtio::Memory;
use virtio::ring::Chains;

use super::bounce::{BOUNCE_BYTES, Bounce};
use super::hold::Hold;
use super::ring::{PIECES_MAX, Parts, Ring, Way};
use super::zero::{Step, zeros};
use super::{DirectAlign, Opened};
use crate::backend::{BackendError, Channel, Done, Op, OpKind, Status};
use crate::data::Pieces;

/// The most bytes of an operation that the kernel gets at once: a longer one read from the page cache would keep the
/// I/O thread from everything else.
const TRANSFER_BYTES_MAX: u64 = 1 << 20;
/// The most bounce buffers of one queue; requests that need one wait for it.
const BOUNCES_MAX: usize = 64;

/// Files of the ring by their index: where requests go by default, and past which alignment.
const MAIN: u32 = 0;
const BUFFERED: u32 = 1;

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

/// A queue's way to a file.
pub(super) struct Uring {
    ring: Ring,
    file: Arc<Opened>,
    align: Option<DirectAlign>,
    flights: Box<[Option<Flight>]>,
    in_flight: usize,
    results: Vec<(usize, i32)>,
    bounces: Vec<Bounce>,
    bounces_made: usize,
    /// Slots that wait for a bounce buffer.
    starved: VecDeque<usize>,
}

impl Uring {
    /// What may take long, on any thread.
    pub(super) fn prepare(hold: &Arc<Hold>, memory: &Arc<Memory>, depth: u16) -> Result<Parts, BackendError> {
        let file = hold.file();
        // The one that is locked is always among them.
        let files = match &file.direct {
            Some((direct, _)) => vec![direct.as_raw_fd(), file.buffered.as_raw_fd()],
            None => vec![file.buffered.as_raw_fd()],
        };
        // Pinned pages pay only where the kernel would otherwise pin them for each request.
        let fixed = file.options.fixed_buffers && file.direct.is_some();
        Parts::new(memory, hold, depth, &files, file.options.sqpoll_ms, fixed)
            .map_err(|error| not_made(file, &error))
    }

    /// The rest, on the thread that will use it.
    pub(super) fn new(parts: Parts, file: Arc<Opened>, depth: u16) -> Result<Self, BackendError> {
        Ok(Self {
            ring: Ring::new(parts).map_err(|error| not_made(&file, &error))?,
            align: file.direct.as_ref().map(|&(_, align)| align),
            file,
            flights: (0..depth).map(|_| None).collect(),
            in_flight: 0,
            results: Vec::with_capacity(depth.into()),
            bounces: Vec::new(),
            bounces_made: 0,
            starved: VecDeque::new(),
        })
    }

    /// Makes the request for what is left of the operation in `slot`.
    #[inline(always)]
    fn request(&mut self, slot: usize, chains: &Chains) {
        let Some(Flight { op, progress, .. }) = &self.flights[slot] else { return };
        let (offset, left) = (op.offset + progress, op.len - progress);
        let way = match op.kind {
            OpKind::Read => Way::FromFile,
            OpKind::Write => Way::ToFile,
            OpKind::Flush => return self.ring.sync(slot, MAIN),
            OpKind::Discard | OpKind::WriteZeroes { .. } => return self.request_zeros(slot),
            OpKind::SecureErase => return self.ring.nothing(slot),
        };
        let len = left.min(TRANSFER_BYTES_MAX);
        let pieces = Pieces::new(op.kind, chains.get(&op.token), *progress, len);
        let Some(align) = self.align else {
            return self.ring.transfer(slot, way, MAIN, offset, pieces);
        };
        if !(offset | len).is_multiple_of(align.file) {
            return self.ring.transfer(slot, way, BUFFERED, offset, pieces);
        }
        let unit = align.memory - 1;
        let mut count = 0;
        let aligned = pieces.clone().all(|piece| {
            count += 1;
            (piece.ptr.addr() | piece.len) & unit == 0
        });
        if aligned && count <= PIECES_MAX {
            return self.ring.transfer(slot, way, MAIN, offset, pieces);
        }
        self.request_bounced(slot, way, chains);
    }

    /// The same for an operation on a range.
    fn request_zeros(&mut self, slot: usize) {
        let Some(flight) = &self.flights[slot] else { return };
        let offset = flight.op.offset + flight.progress;
        match flight.zero_step(&self.file) {
            Step::Allocate { mode, len } => self.ring.allocate(slot, MAIN, mode.bits() as i32, offset, len),
            Step::Write { len } => {
                let zeros = zeros(len);
                let aligned = |align: DirectAlign| (offset | zeros.len() as u64).is_multiple_of(align.file);
                let file = if self.align.is_none_or(aligned) { MAIN } else { BUFFERED };
                self.ring.write_constant(slot, file, offset, zeros);
            }
            Step::Skip { .. } => self.ring.nothing(slot),
        }
    }

    /// The same through a buffer of our own, as soon as there is one.
    #[cold]
    fn request_bounced(&mut self, slot: usize, way: Way, chains: &Chains) {
        let Some(Flight { op, progress, .. }) = &self.flights[slot] else { return };
        let mut bounce = match self.bounces.pop() {
            Some(bounce) => bounce,
            None if self.bounces_made < BOUNCES_MAX => {
                self.bounces_made += 1;
                Bounce::new()
            }
            None => return self.starved.push_back(slot),
        };
        let len = (op.len - progress).min(BOUNCE_BYTES);
        if way == Way::ToFile {
            let chain = chains.get(&op.token);
            bounce.gather(chain.readable, Op::DATA_OFFSET + *progress as usize, len as usize);
        }
        self.ring.transfer_bounced(slot, way, MAIN, op.offset + progress, len as u32, bounce);
    }

    /// Takes note of what the kernel says about the request in `slot`; goes on with the operation or ends it.
    #[inline(always)]
    fn complete(&mut self, slot: usize, result: i32, chains: &Chains, done: &mut Vec<Done>) {
        if let Some(bounce) = self.ring.take_bounce(slot) {
            self.complete_bounced(slot, result, bounce, chains);
        }
        let Some(flight) = &mut self.flights[slot] else { return };
        let kind = flight.op.kind;
        let status = match (result, kind) {
            (_, OpKind::SecureErase) => Status::Unsupported,
            (0, OpKind::Flush) => Status::Ok,
            (0.., _) if flight.advance(&self.file, result as u64) => {
                if flight.progress < flight.op.len {
                    return self.request(slot, chains);
                }
                Status::Ok
            }
            // The file was cut off below the capacity. What stood there is lost, and zeros would hide that.
            (0, _) => report(&self.file.path, &flight.op, Errno::IO),
            _ => {
                let error = Errno::from_raw_os_error(-result);
                let refused = error == Errno::OPNOTSUPP
                    && matches!(kind, OpKind::Discard | OpKind::WriteZeroes { .. })
                    && matches!(flight.zero_step(&self.file), Step::Allocate { .. });
                flight.refusals += usize::from(refused);
                if refused || matches!(error, Errno::INTR | Errno::AGAIN) {
                    return self.request(slot, chains);
                }
                report(&self.file.path, &flight.op, error)
            }
        };
        if let Some(Flight { op, .. }) = self.flights[slot].take() {
            self.in_flight -= 1;
            done.push(Done { token: op.token, status });
        }
    }

    #[cold]
    fn complete_bounced(&mut self, slot: usize, result: i32, bounce: Bounce, chains: &Chains) {
        if let Some(Flight { op, progress, .. }) = &self.flights[slot]
            && op.kind == OpKind::Read
            && let Ok(len) = usize::try_from(result)
        {
            bounce.scatter(chains.get(&op.token).writable, *progress as usize, len);
        }
        self.bounces.push(bounce);
        if let Some(next) = self.starved.pop_front() {
            self.request(next, chains);
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
        self.ring.submit();
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn completion_fd(&self) -> Option<RawFd> {
        Some(self.ring.event())
    }

    fn arm(&mut self) -> bool {
        self.in_flight > 0 && self.ring.arm()
    }

    fn disarm(&mut self) {
        self.ring.disarm();
    }
}

/// Logs why an operation failed, and says how to answer it.
#[cold]
pub(super) fn report(path: &Path, op: &Op, error: Errno) -> Status {
    static LIMIT: LogLimit = LogLimit::new();
    if error == Errno::OPNOTSUPP {
        return Status::Unsupported;
    }
    if LIMIT.admits() {
        tracing::warn!(path = %path.display(), kind = ?op.kind, offset = op.offset, len = op.len, %error, "request failed");
    }
    Status::IoError
}

//! A queue's way to its image: guest memory to buffers, buffers to threads, and back.

use std::os::fd::RawFd;
use std::sync::Arc;

use virtio::memory::{gather, scatter};
use virtio::ring::Chains;

use super::Image;
use super::threads::{Finished, Job, Threads};
use crate::backend::{BackendError, Channel, Done, Op, OpKind, Status};

/// The most bytes of an operation in one job.
const JOB_BYTES_MAX: u64 = 1 << 20;
/// The most bytes of all jobs of a queue together.
const BUFFERED_BYTES_MAX: u64 = 32 << 20;
/// The longest buffer that is kept for the next job; longer ones are for rare requests.
const KEPT_BYTES_MAX: usize = 128 << 10;
/// The most buffers that are kept.
const KEPT_MAX: usize = 64;

/// An operation in flight, and how many of its bytes are done.
struct Flight {
    op: Op,
    progress: u64,
}

impl Flight {
    /// Bytes of the next job.
    fn part(&self) -> u64 {
        match self.op.kind {
            OpKind::Read | OpKind::Write => (self.op.len - self.progress).min(JOB_BYTES_MAX),
            _ => self.op.len,
        }
    }

    /// Bytes that the next job's buffer has.
    fn buffered(&self) -> u64 {
        match self.op.kind {
            OpKind::Read | OpKind::Write => self.part(),
            _ => 0,
        }
    }
}

/// A queue's way to its image.
pub(super) struct Threaded {
    threads: Threads,
    flights: Box<[Option<Flight>]>,
    in_flight: usize,
    buffered_bytes: u64,
    kept: Vec<Vec<u8>>,
}

impl Threaded {
    pub(super) fn new(image: &Arc<Image>, threads: usize, depth: u16) -> Result<Self, BackendError> {
        Ok(Self {
            threads: Threads::start(image, threads, depth)?,
            flights: (0..depth).map(|_| None).collect(),
            in_flight: 0,
            buffered_bytes: 0,
            kept: Vec::with_capacity(KEPT_MAX),
        })
    }

    /// Starts the next part of `flight`; gives back the answer if that cannot be.
    fn start(&mut self, flight: Flight, chains: &Chains) -> Option<Done> {
        let Flight { op, progress } = &flight;
        let mut buffer = self.kept.pop().unwrap_or_default();
        buffer.resize(flight.buffered() as usize, 0);
        if op.kind == OpKind::Write {
            gather(chains.get(&op.token).readable, Op::DATA_OFFSET + *progress as usize, &mut buffer);
        }
        let slot = op.token.slot();
        let job = Job { slot, kind: op.kind, offset: op.offset + progress, len: flight.part(), buffer };
        if let Err(Finished { status, .. }) = self.threads.start_job(job) {
            return Some(Done { token: flight.op.token, status });
        }
        self.buffered_bytes += flight.buffered();
        self.in_flight += 1;
        self.flights[slot] = Some(flight);
        None
    }

    fn finish(&mut self, finished: Finished, chains: &Chains) -> Option<Done> {
        let Finished { slot, mut buffer, status } = finished;
        let mut flight = self.flights[slot].take()?;
        self.in_flight -= 1;
        self.buffered_bytes -= flight.buffered();
        if flight.op.kind == OpKind::Read && status == Status::Ok {
            scatter(chains.get(&flight.op.token).writable, flight.progress as usize, &buffer);
        }
        if buffer.capacity() <= KEPT_BYTES_MAX && self.kept.len() < KEPT_MAX {
            buffer.clear();
            self.kept.push(buffer);
        }
        flight.progress += flight.part();
        if status == Status::Ok && flight.progress < flight.op.len {
            return self.start(flight, chains);
        }
        Some(Done { token: flight.op.token, status })
    }
}

impl Channel for Threaded {
    fn submit(&mut self, ops: &mut Vec<Op>, chains: &Chains, done: &mut Vec<Done>) {
        let mut bytes = self.buffered_bytes;
        let fitting = ops.iter().take_while(|op| {
            bytes += op.len.min(JOB_BYTES_MAX);
            bytes <= BUFFERED_BYTES_MAX
        });
        // One job always fits; with nothing in flight, one is taken.
        let taken = fitting.count();
        for op in ops.drain(..taken) {
            done.extend(self.start(Flight { op, progress: 0 }, chains));
        }
    }

    fn reap(&mut self, chains: &Chains, done: &mut Vec<Done>) {
        // A job that is over may start another: the ones that were there are enough for a turn.
        for _ in 0..self.in_flight {
            let Some(finished) = self.threads.finished() else { break };
            done.extend(self.finish(finished, chains));
        }
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn completion_fd(&self) -> Option<RawFd> {
        Some(self.threads.event())
    }

    fn arm(&mut self) -> bool {
        self.threads.arm()
    }

    fn disarm(&mut self) {
        self.threads.disarm();
    }
}

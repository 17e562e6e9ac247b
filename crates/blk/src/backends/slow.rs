//! Storage for tests that takes its time, takes little at once, fails now and then, and loses power.
//!
//! What becomes of each operation is decided by a function of the test's. An operation is carried out when it is over,
//! not when it is begun, so one that nobody waits for any more does its damage late. What was flushed is kept apart
//! from what was written.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio::Memory;
use virtio::memory::{gather, scatter};
use virtio::ring::Chains;

use crate::backend::{Backend, BackendError, Channel, ChannelBuilder, Done, Geometry, Op, OpKind, Status};

const SECTOR_BYTES: usize = 512;

/// What becomes of an operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fate {
    /// How many looks for completions it takes, of which each submission is one; at 0 it is over when it is submitted.
    pub looks: u32,
    /// It fails, and does nothing.
    pub fails: bool,
}

/// Decides what becomes of an operation: its kind, offset and length.
pub type Fates = Box<dyn FnMut(OpKind, u64, u64) -> Fate + Send>;

struct Contents {
    /// What reads find.
    written: Vec<u8>,
    /// What is left after a power cut.
    durable: Vec<u8>,
    /// Sectors of `written` that `durable` lacks, and how many changes there were when they got what they hold.
    dirty: BTreeMap<usize, u64>,
    changes: u64,
    fates: Fates,
    /// Operations that were over.
    operations: u64,
}

impl Contents {
    fn change(&mut self, offset: usize, len: usize, change: impl FnOnce(&mut [u8])) {
        change(&mut self.written[offset..offset + len]);
        self.changes += 1;
        let sectors = offset / SECTOR_BYTES..(offset + len) / SECTOR_BYTES;
        self.dirty.extend(sectors.map(|sector| (sector, self.changes)));
    }

    /// Makes changes durable. What was changed again meanwhile waits for another flush.
    fn flush(&mut self, covered: BTreeMap<usize, u64>) {
        let Self { written, durable, dirty, .. } = self;
        for (sector, change) in covered {
            if dirty.get(&sector) == Some(&change) {
                dirty.remove(&sector);
                let bytes = sector * SECTOR_BYTES..(sector + 1) * SECTOR_BYTES;
                durable[bytes.clone()].copy_from_slice(&written[bytes]);
            }
        }
    }
}

/// A disk of a few megabytes at most.
pub struct Slow {
    contents: Arc<Mutex<Contents>>,
    in_flight_max: usize,
}

impl Slow {
    /// A disk that holds `bytes`, each of whose queues has up to `in_flight_max` operations in flight, at least 1.
    #[must_use]
    pub fn new(bytes: Vec<u8>, in_flight_max: usize, fates: Fates) -> Self {
        let contents = Contents {
            durable: bytes.clone(),
            written: bytes,
            dirty: BTreeMap::new(),
            changes: 0,
            fates,
            operations: 0,
        };
        Self { contents: Arc::new(Mutex::new(contents)), in_flight_max: in_flight_max.max(1) }
    }

    /// What reads of the range find now.
    #[must_use]
    pub fn written(&self, offset: usize, len: usize) -> Vec<u8> {
        lock(&self.contents).written[offset..offset + len].to_vec()
    }

    /// What a power cut would leave of the range now.
    #[must_use]
    pub fn durable(&self, offset: usize, len: usize) -> Vec<u8> {
        lock(&self.contents).durable[offset..offset + len].to_vec()
    }

    /// How many operations were over so far.
    #[must_use]
    pub fn operations(&self) -> u64 {
        lock(&self.contents).operations
    }
}

fn lock(contents: &Mutex<Contents>) -> MutexGuard<'_, Contents> {
    contents.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Backend for Slow {
    fn geometry(&self) -> Geometry {
        let bytes = lock(&self.contents).written.len() as u64;
        Geometry { flush: true, discard: true, write_zeroes: true, ..Geometry::new(bytes) }
    }

    fn channel(&self, _memory: &Arc<Memory>, _depth: u16) -> Result<ChannelBuilder, BackendError> {
        let (contents, in_flight_max) = (self.contents.clone(), self.in_flight_max);
        Ok(Box::new(move || Ok(Box::new(SlowChannel { contents, in_flight_max, flights: Vec::new() }))))
    }

    fn resize(&self, _bytes: Option<u64>) -> Result<Geometry, BackendError> {
        Ok(self.geometry())
    }

    fn flush(&self) -> Result<(), BackendError> {
        let mut contents = lock(&self.contents);
        let covered = contents.dirty.clone();
        contents.flush(covered);
        Ok(())
    }
}

struct Flight {
    op: Op,
    fate: Fate,
    /// What a flush covers: changes that were made when it was begun.
    covered: BTreeMap<usize, u64>,
}

struct SlowChannel {
    contents: Arc<Mutex<Contents>>,
    in_flight_max: usize,
    flights: Vec<Flight>,
}

impl SlowChannel {
    fn begin(&self, op: Op) -> Flight {
        let mut contents = lock(&self.contents);
        let fate = (contents.fates)(op.kind, op.offset, op.len);
        let covered = if op.kind == OpKind::Flush { contents.dirty.clone() } else { BTreeMap::new() };
        Flight { op, fate, covered }
    }

    fn finish(&self, flight: Flight, chains: &Chains) -> Done {
        let Flight { op: Op { token, kind, offset, len, .. }, fate, covered } = flight;
        let mut contents = lock(&self.contents);
        contents.operations += 1;
        if fate.fails {
            return Done { token, status: Status::IoError };
        }
        let (offset, len) = (offset as usize, len as usize);
        match kind {
            OpKind::Read => {
                scatter(chains.get(&token).writable, 0, &contents.written[offset..offset + len]);
            }
            OpKind::Write => contents.change(offset, len, |bytes| {
                gather(chains.get(&token).readable, Op::DATA_OFFSET, bytes);
            }),
            OpKind::Flush => contents.flush(covered),
            OpKind::Discard | OpKind::WriteZeroes { .. } | OpKind::SecureErase => {
                contents.change(offset, len, |bytes| bytes.fill(0));
            }
        }
        Done { token, status: Status::Ok }
    }
}

impl Channel for SlowChannel {
    fn submit(&mut self, ops: &mut Vec<Op>, chains: &Chains, done: &mut Vec<Done>) {
        self.reap(chains, done);
        let room = (self.in_flight_max - self.flights.len()).min(ops.len());
        for op in ops.drain(..room) {
            let flight = self.begin(op);
            if flight.fate.looks == 0 {
                done.push(self.finish(flight, chains));
            } else {
                self.flights.push(flight);
            }
        }
    }

    fn reap(&mut self, chains: &Chains, done: &mut Vec<Done>) {
        self.flights.iter_mut().for_each(|flight| flight.fate.looks -= 1);
        let over: Vec<_> = self.flights.extract_if(.., |flight| flight.fate.looks == 0).collect();
        done.extend(over.into_iter().map(|flight| self.finish(flight, chains)));
    }

    fn in_flight(&self) -> usize {
        self.flights.len()
    }

    fn arm(&mut self) -> bool {
        !self.flights.is_empty()
    }
}

//! What a disk counts: written by the I/O threads, one queue each, read by anyone.

use std::ops::AddAssign;
use std::sync::atomic::{AtomicU64, Ordering};

/// What was done, since the device was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Read requests.
    pub reads: u64,
    /// Bytes asked for by them.
    pub read_bytes: u64,
    /// Write requests.
    pub writes: u64,
    /// Bytes given with them.
    pub written_bytes: u64,
    /// Flushes, discards and all other requests.
    pub others: u64,
    /// Requests answered with anything but success.
    pub errors: u64,
    /// Times that requests had to wait because of a rate limit.
    pub throttled: u64,
}

impl AddAssign for Counters {
    fn add_assign(&mut self, more: Self) {
        self.reads += more.reads;
        self.read_bytes += more.read_bytes;
        self.writes += more.writes;
        self.written_bytes += more.written_bytes;
        self.others += more.others;
        self.errors += more.errors;
        self.throttled += more.throttled;
    }
}

/// The counters of one queue, on cache lines of their own. One thread writes.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Stats {
    reads: AtomicU64,
    read_bytes: AtomicU64,
    writes: AtomicU64,
    written_bytes: AtomicU64,
    others: AtomicU64,
    errors: AtomicU64,
    throttled: AtomicU64,
}

impl Stats {
    /// Adds what a burst did.
    #[inline(always)]
    pub(crate) fn add(&self, burst: &Counters) {
        // The one writer needs no atomic read-modify-write.
        let add = |counter: &AtomicU64, n: u64| {
            counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
        };
        add(&self.reads, burst.reads);
        add(&self.read_bytes, burst.read_bytes);
        add(&self.writes, burst.writes);
        add(&self.written_bytes, burst.written_bytes);
        if burst.others | burst.errors | burst.throttled != 0 {
            add(&self.others, burst.others);
            add(&self.errors, burst.errors);
            add(&self.throttled, burst.throttled);
        }
    }

    /// The counters now.
    pub(crate) fn read(&self) -> Counters {
        Counters {
            reads: self.reads.load(Ordering::Relaxed),
            read_bytes: self.read_bytes.load(Ordering::Relaxed),
            writes: self.writes.load(Ordering::Relaxed),
            written_bytes: self.written_bytes.load(Ordering::Relaxed),
            others: self.others.load(Ordering::Relaxed),
            errors: self.errors.load(Ordering::Relaxed),
            throttled: self.throttled.load(Ordering::Relaxed),
        }
    }
}

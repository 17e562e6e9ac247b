//! What a queue counts about itself: written by its I/O thread, read by anyone.

use std::ops::AddAssign;
use std::sync::atomic::{AtomicU64, Ordering};

/// A counter with one writer. Reading it from elsewhere is exact, merely not synchronized with anything.
#[derive(Debug, Default)]
struct Counter(AtomicU64);

impl Counter {
    #[inline(always)]
    fn add(&self, n: u64) {
        // The one writer needs no atomic read-modify-write.
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The counters of one queue, on cache lines of their own.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct QueueStats {
    requests: Counter,
    bursts: Counter,
    calls: Counter,
    calls_suppressed: Counter,
    kicks_enabled: Counter,
}

/// A reading of [`QueueStats`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueCounters {
    /// Chains taken from the ring.
    pub requests: u64,
    /// Bursts they came in; requests divided by bursts is the mean batch.
    pub bursts: u64,
    /// Times the driver was called.
    pub calls: u64,
    /// Times buffers were published and the driver wanted no call.
    pub calls_suppressed: u64,
    /// Times kicks were switched on because the I/O thread was about to sleep.
    pub kicks_enabled: u64,
}

impl AddAssign for QueueCounters {
    fn add_assign(&mut self, other: Self) {
        let Self { requests, bursts, calls, calls_suppressed, kicks_enabled } = other;
        self.requests += requests;
        self.bursts += bursts;
        self.calls += calls;
        self.calls_suppressed += calls_suppressed;
        self.kicks_enabled += kicks_enabled;
    }
}

impl QueueStats {
    #[inline(always)]
    pub(crate) fn count_burst(&self, requests: u64) {
        self.requests.add(requests);
        self.bursts.add(1);
    }

    pub(crate) fn count_call(&self, sent: bool) {
        if sent { self.calls.add(1) } else { self.calls_suppressed.add(1) }
    }

    pub(crate) fn count_arm(&self) {
        self.kicks_enabled.add(1);
    }

    /// The counters now.
    #[must_use]
    pub fn read(&self) -> QueueCounters {
        QueueCounters {
            requests: self.requests.get(),
            bursts: self.bursts.get(),
            calls: self.calls.get(),
            calls_suppressed: self.calls_suppressed.get(),
            kicks_enabled: self.kicks_enabled.get(),
        }
    }
}

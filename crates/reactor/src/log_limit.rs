//! What keeps a log short whatever a guest or a peer does.
//!
//! Most messages are caused by somebody else: a driver that breaks its ring after every reset, storage that refuses
//! each of a million writes, a front end that connects ten thousand times a second. The first few of a minute say all
//! there is to say; of the others, their number does.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::{Clock, Ticks};

/// Messages a minute that one limit lets through.
const PER_MINUTE_MAX: u64 = 8;
const NS_PER_MINUTE: u64 = 60_000_000_000;
/// The low bits of the state count messages, the others hold the minute that they are of.
const COUNT_BITS: u32 = 8;

/// A limit on messages of one kind about one thing: at most 8 a minute. The number of those that were left out comes
/// before the next one, or when [`LogLimit::settle`] is called.
#[derive(Debug)]
pub struct LogLimit {
    state: AtomicU64,
    left_out: AtomicU64,
    kind: &'static str,
}

impl LogLimit {
    /// A limit that nothing has counted against.
    #[must_use]
    pub const fn new() -> Self {
        Self::of("messages like the next one")
    }

    /// The same, for messages that can be told by their `kind` ("requests refused").
    #[must_use]
    pub const fn of(kind: &'static str) -> Self {
        Self { state: AtomicU64::new(0), left_out: AtomicU64::new(0), kind }
    }

    /// Whether one more message may be written now, which then counts.
    pub fn admits(&self) -> bool {
        let now = Clock::get().now();
        let admits = self.admits_at(now);
        if admits {
            self.settle_at(now);
        }
        admits
    }

    /// Writes how many messages were left out, if some were and their minute is over.
    pub fn settle(&self) {
        self.settle_at(Clock::get().now());
    }

    /// In what time [`LogLimit::settle`] has something to write; None if nothing was left out.
    #[must_use]
    pub fn settles_in(&self) -> Option<Duration> {
        let left_ns = NS_PER_MINUTE - Clock::get().now().0 % NS_PER_MINUTE;
        (self.left_out.load(Ordering::Relaxed) > 0).then(|| Duration::from_nanos(left_ns))
    }

    fn admits_at(&self, now: Ticks) -> bool {
        let minute = now.0 / NS_PER_MINUTE;
        let count = |state: u64| match state >> COUNT_BITS == minute {
            true => (state & ((1 << COUNT_BITS) - 1) < PER_MINUTE_MAX).then_some(state + 1),
            false => Some(minute << COUNT_BITS | 1),
        };
        let admits = self.state.fetch_update(Ordering::Relaxed, Ordering::Relaxed, count).is_ok();
        if !admits {
            self.left_out.fetch_add(1, Ordering::Relaxed);
        }
        admits
    }

    fn settle_at(&self, now: Ticks) {
        let left_out = self.take_left_out(now);
        if left_out > 0 {
            tracing::warn!("{left_out} more in the last minute left out: {}", self.kind);
        }
    }

    /// How many were left out in minutes that are over.
    fn take_left_out(&self, now: Ticks) -> u64 {
        let state = self.state.load(Ordering::Relaxed);
        let is_full = state == ((now.0 / NS_PER_MINUTE) << COUNT_BITS) | PER_MINUTE_MAX;
        if is_full { 0 } else { self.left_out.swap(0, Ordering::Relaxed) }
    }
}

impl Default for LogLimit {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_minute_lets_a_few_through_and_the_next_one_tells_of_the_others() {
        let limit = LogLimit::new();
        let mut before = 0;
        for minute in [5_u64, 6, 9] {
            let at = |i| Ticks(minute * NS_PER_MINUTE + i);
            assert_eq!((0..1000_u64).filter(|&i| limit.admits_at(at(i))).count() as u64, PER_MINUTE_MAX);
            assert_eq!(limit.take_left_out(at(1000)), 0, "more may follow");
            before += 1000 - PER_MINUTE_MAX;
            if minute == 6 {
                assert!(limit.settles_in().is_some());
                assert_eq!(limit.take_left_out(at(NS_PER_MINUTE)), before);
                assert_eq!(limit.take_left_out(at(NS_PER_MINUTE)), 0, "told once");
                assert!(limit.settles_in().is_none());
                before = 0;
            }
        }
        assert!(limit.admits());
    }
}

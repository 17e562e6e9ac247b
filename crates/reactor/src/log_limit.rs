//! What keeps a log short whatever a guest does.
//!
//! Most messages are caused by somebody else: a driver that breaks its ring after every reset, storage that refuses
//! each of a million writes. The first few say all there is to say.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Clock, Ticks};

/// Messages a second that one limit lets through.
const PER_SECOND_MAX: u64 = 8;
/// The low bits of the state count messages, the others hold the second that they are of.
const COUNT_BITS: u32 = 8;

/// A limit on messages of one kind about one thing: at most 8 a second.
#[derive(Debug, Default)]
pub struct LogLimit(AtomicU64);

impl LogLimit {
    /// A limit that nothing has counted against.
    #[must_use]
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Whether one more message may be written now, which then counts.
    pub fn admits(&self) -> bool {
        self.admits_at(Clock::get().now())
    }

    fn admits_at(&self, now: Ticks) -> bool {
        const NS_PER_SECOND: u64 = 1_000_000_000;
        let second = now.0 / NS_PER_SECOND;
        let count = |state: u64| match state >> COUNT_BITS == second {
            true => (state & ((1 << COUNT_BITS) - 1) < PER_SECOND_MAX).then_some(state + 1),
            false => Some(second << COUNT_BITS | 1),
        };
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, count).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_second_lets_a_few_through() {
        let limit = LogLimit::new();
        for second in [5_u64, 6, 9] {
            let at = |i| Ticks(second * 1_000_000_000 + i);
            assert_eq!((0..1000_u64).filter(|&i| limit.admits_at(at(i))).count() as u64, PER_SECOND_MAX);
        }
        assert!(limit.admits());
    }
}

//! Deadlines of sleeping pollers.
//!
//! A thread that polls calls every poller each turn and needs no timer. A thread that is about to sleep needs one
//! number: the earliest time at which any of its pollers has something due.

use rustix::time::Timespec;

use crate::Ticks;

/// The earlier of two deadlines, where `None` means never.
#[must_use]
#[inline]
pub(crate) fn earliest(a: Option<Ticks>, b: Option<Ticks>) -> Option<Ticks> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (one, None) | (None, one) => one,
    }
}

/// How long to sleep at `now` for a deadline; zero if it has passed.
#[must_use]
pub(crate) fn timeout(now: Ticks, deadline: Ticks) -> Timespec {
    const NS_PER_S: u64 = 1_000_000_000;
    /// No promise needs more, and it keeps the kernel's arithmetic far from its limits.
    const SLEEP_S_MAX: u64 = 365 * 86_400;
    let ns = deadline.since_ns(now);
    if ns / NS_PER_S >= SLEEP_S_MAX {
        return Timespec { tv_sec: SLEEP_S_MAX as i64, tv_nsec: 0 };
    }
    Timespec { tv_sec: (ns / NS_PER_S) as i64, tv_nsec: (ns % NS_PER_S) as i64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_earliest_deadline_wins_and_never_loses_to_any() {
        let (a, b) = (Some(Ticks(5)), Some(Ticks(9)));
        assert_eq!(earliest(a, b), a);
        assert_eq!(earliest(b, a), a);
        assert_eq!(earliest(None, b), b);
        assert_eq!(earliest(a, None), a);
        assert_eq!(earliest(None, None), None);
    }

    #[test]
    fn a_timeout_is_the_time_left() {
        let at = |now, deadline| {
            let timeout = timeout(Ticks(now), Ticks(deadline));
            (timeout.tv_sec, timeout.tv_nsec)
        };
        assert_eq!(at(0, 1_500_000_000), (1, 500_000_000));
        assert_eq!(at(10, 17), (0, 7));
        assert_eq!(at(17, 10), (0, 0), "a passed deadline does not wait");
        assert_eq!(at(0, u64::MAX).0, 365 * 86_400, "as good as never");
    }
}

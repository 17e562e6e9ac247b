//! Limits on requests and bytes per second, for a device and all its queues together.

use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use reactor::{RateAccount, Ticks};
use rustix::event::{EventfdFlags, eventfd};

/// The most a device may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimit {
    /// Requests per second, of any type.
    pub iops: Option<NonZeroU64>,
    /// Bytes read and written per second.
    pub bytes_per_s: Option<NonZeroU64>,
    /// What an idle device may do at once, in milliseconds at the rates above; 0 counts as 1.
    pub burst_ms: u32,
}

impl RateLimit {
    /// No limit.
    pub const NONE: Self = Self { iops: None, bytes_per_s: None, burst_ms: 0 };
}

/// While bytes are limited, bursts are short: what they overdraw is worked off by a pause of all queues.
const REQUESTS_PER_BURST_MAX: u64 = 8;

/// The limits of one device, shared by its queues. Requests are charged after they were taken, when their size is
/// known.
#[derive(Debug, Default)]
pub(crate) struct Limiter {
    requests: RateAccount,
    bytes: RateAccount,
    /// Of the queues, one each.
    bells: Mutex<Vec<Weak<OwnedFd>>>,
}

/// Rings when the limits were replaced: a queue that pauses for the old ones need not wait any longer.
pub(crate) struct LimitBell(Arc<OwnedFd>);

impl LimitBell {
    /// Becomes readable, edge by edge.
    pub(crate) fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Limiter {
    pub(crate) fn new(limit: RateLimit) -> Self {
        let limiter = Self::default();
        limiter.set(limit);
        limiter
    }

    /// Replaces the limits, for what is taken from now on, and ends the pauses for the old ones.
    pub(crate) fn set(&self, limit: RateLimit) {
        self.requests.set(limit.iops, limit.burst_ms);
        self.bytes.set(limit.bytes_per_s, limit.burst_ms);
        self.bells.lock().unwrap_or_else(PoisonError::into_inner).retain(|bell| {
            let bell = bell.upgrade();
            // Nobody reads it: each write is an edge, and 2^64 of them nobody makes.
            bell.as_ref().is_some_and(|bell| rustix::io::write(bell, &1u64.to_ne_bytes()).is_ok())
        });
    }

    /// For a queue, to hear of new limits.
    ///
    /// # Errors
    /// There is no descriptor left.
    pub(crate) fn bell(&self) -> io::Result<LimitBell> {
        let bell = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let mut bells = self.bells.lock().unwrap_or_else(PoisonError::into_inner);
        bells.retain(|bell| bell.strong_count() > 0);
        bells.push(Arc::downgrade(&bell));
        Ok(LimitBell(bell))
    }

    /// Whether anything is limited.
    #[inline(always)]
    pub(crate) fn is_on(&self) -> bool {
        self.requests.is_limited() || self.bytes.is_limited()
    }

    /// How many requests may be taken at `now`, at least 1.
    ///
    /// # Errors
    /// None, before the time given.
    pub(crate) fn admit(&self, now: Ticks) -> Result<u32, Ticks> {
        let most = match (self.requests.admit(now, 0), self.bytes.admit(now, 0)) {
            (Ok(requests), Ok(u64::MAX)) => requests,
            (Ok(requests), Ok(_)) => requests.min(REQUESTS_PER_BURST_MAX),
            (Err(later), Err(even_later)) => return Err(later.max(even_later)),
            (Err(later), _) | (_, Err(later)) => return Err(later),
        };
        Ok(u32::try_from(most).unwrap_or(u32::MAX))
    }

    /// Charges what was taken.
    pub(crate) fn charge(&self, now: Ticks, requests: u64, bytes: u64) {
        self.requests.charge(now, requests);
        self.bytes.charge(now, bytes);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limit(iops: u64, bytes_per_s: u64, burst_ms: u32) -> RateLimit {
        RateLimit { iops: NonZeroU64::new(iops), bytes_per_s: NonZeroU64::new(bytes_per_s), burst_ms }
    }

    /// What gets through in a simulated time with requests of `bytes` bytes always waiting, polled every `step_ns`.
    fn simulate(limiter: &Limiter, duration_ns: u64, step_ns: u64, bytes: u64) -> u64 {
        let mut taken = 0;
        let mut now = Ticks(1_000_000);
        let end = now.plus_ns(duration_ns);
        while now < end {
            match limiter.admit(now) {
                Ok(max) => {
                    let n = u64::from(max.min(32));
                    limiter.charge(now, n, n * bytes);
                    taken += n;
                    now = now.plus_ns(step_ns);
                }
                Err(wake) => {
                    assert!(wake > now, "a pause leads somewhere");
                    now = wake;
                }
            }
        }
        taken
    }

    #[test]
    fn no_limit_admits_everything() {
        let limiter = Limiter::new(RateLimit::NONE);
        assert!(!limiter.is_on());
        assert_eq!(limiter.admit(Ticks(5)), Ok(u32::MAX));
    }

    #[test]
    fn a_large_request_is_worked_off() {
        let limiter = Limiter::new(limit(0, 1_000_000, 0));
        limiter.charge(Ticks(0), 1, 4_000_000);
        assert_eq!(limiter.admit(Ticks(1)), Err(Ticks(3_999_000_000)));
    }

    proptest! {
        #[test]
        fn the_tighter_of_two_limits_holds(bytes in 512u64..1_000_000) {
            let limiter = Limiter::new(limit(10_000, 50_000_000, 1));
            let taken = simulate(&limiter, 1_000_000_000, 1_000, bytes);
            let most = 10_010.min(50_050_000 / bytes) + 9;
            prop_assert!(taken <= most && taken * 100 >= (most - 30) * 98, "{taken} of {most}");
        }
    }
}

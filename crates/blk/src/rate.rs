//! Limits on requests and bytes per second, for a device and all its queues together.
//!
//! A limit is a *due time*: when everything taken so far is paid for at the agreed rate. Taking something moves it
//! forward by the cost; while it lies further ahead than the burst allows, nothing more is taken. (The generic cell
//! rate algorithm, ITU-T I.371: a token bucket whose state is one number.) One number means that queues on several
//! threads share it with one atomic operation per burst and no lock.
//!
//! Requests are charged after they were taken, when their size is known. A burst may thus overdraw the account; the
//! debt is worked off before the next one, so the mean is exact.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};

use reactor::Ticks;

/// The most a device may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimit {
    /// Requests per second, of any type.
    pub iops: Option<NonZeroU64>,
    /// Bytes read and written per second.
    pub bytes_per_s: Option<NonZeroU64>,
    /// What an idle device may do at once, in milliseconds at the rates above; 0 counts as 1. Without any burst, time
    /// would be lost whenever a poll comes a little late.
    pub burst_ms: u32,
}

impl RateLimit {
    /// No limit.
    pub const NONE: Self = Self { iops: None, bytes_per_s: None, burst_ms: 0 };
}

/// Due times count in sixteenths of a nanosecond: 36 years fit, and the rounding of a burst's cost is negligible.
const PER_NS: u64 = 16;
const PER_S: u64 = 1_000_000_000 * PER_NS;

/// While bytes are limited, bursts are short: what they overdraw is worked off by a pause of all queues.
const REQUESTS_PER_BURST_MAX: u32 = 8;

/// What `units` cost at `rate` units per second.
fn cost(units: u64, rate: u64) -> u64 {
    u64::try_from(u128::from(units) * u128::from(PER_S) / u128::from(rate)).unwrap_or(u64::MAX)
}

/// The due time after something of that cost was taken at `now`.
fn charged(due: u64, now: u64, cost: u64) -> u64 {
    due.max(now).saturating_add(cost)
}

/// Units that may be taken at `now`, at least 1; or the time from which on they may.
fn admitted(due: u64, now: u64, burst: u64, rate: u64) -> Result<u64, u64> {
    let line = now.saturating_add(burst);
    if due > line {
        return Err(due - burst);
    }
    // A cost that rounds to nothing limits nothing.
    Ok((line - due.max(now)).checked_div(cost(1, rate)).map_or(u64::MAX, |units| units.max(1)))
}

/// One limit. `rate` 0 is none.
#[derive(Debug, Default)]
struct Account {
    rate: AtomicU64,
    burst: AtomicU64,
    due: AtomicU64,
}

impl Account {
    fn set(&self, rate: Option<NonZeroU64>, burst_ms: u32) {
        self.burst.store(u64::from(burst_ms.max(1)) * 1_000_000 * PER_NS, Ordering::Relaxed);
        self.rate.store(rate.map_or(0, NonZeroU64::get), Ordering::Relaxed);
    }

    fn admit(&self, now: u64) -> Result<u64, u64> {
        match self.rate.load(Ordering::Relaxed) {
            0 => Ok(u64::MAX),
            rate => admitted(self.due.load(Ordering::Relaxed), now, self.burst.load(Ordering::Relaxed), rate),
        }
    }

    fn charge(&self, now: u64, units: u64) {
        let rate = self.rate.load(Ordering::Relaxed);
        if rate > 0 && units > 0 {
            let cost = cost(units, rate);
            let _ = self
                .due
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |due| Some(charged(due, now, cost)));
        }
    }
}

/// The limits of one device, shared by its queues.
#[derive(Debug, Default)]
pub(crate) struct Limiter {
    requests: Account,
    bytes: Account,
}

impl Limiter {
    pub(crate) fn new(limit: RateLimit) -> Self {
        let limiter = Self::default();
        limiter.set(limit);
        limiter
    }

    /// Replaces the limits, for what is taken from now on.
    pub(crate) fn set(&self, limit: RateLimit) {
        self.requests.set(limit.iops, limit.burst_ms);
        self.bytes.set(limit.bytes_per_s, limit.burst_ms);
    }

    /// Whether anything is limited.
    #[inline(always)]
    pub(crate) fn is_on(&self) -> bool {
        self.requests.rate.load(Ordering::Relaxed) | self.bytes.rate.load(Ordering::Relaxed) != 0
    }

    /// How many requests may be taken at `now`, at least 1.
    ///
    /// # Errors
    /// None, before the time given.
    pub(crate) fn admit(&self, now: Ticks) -> Result<u32, Ticks> {
        let now = now.0.saturating_mul(PER_NS);
        let bytes = self.bytes.admit(now);
        let requests = self.requests.admit(now);
        match (requests, bytes) {
            (Ok(requests), Ok(u64::MAX)) => Ok(u32::try_from(requests).unwrap_or(u32::MAX)),
            (Ok(requests), Ok(_)) => Ok((requests.min(REQUESTS_PER_BURST_MAX.into())) as u32),
            (requests, bytes) => {
                let later = requests.err().max(bytes.err()).unwrap_or(now);
                Err(Ticks(later.div_ceil(PER_NS)))
            }
        }
    }

    /// Charges what was taken.
    pub(crate) fn charge(&self, now: Ticks, requests: u64, bytes: u64) {
        let now = now.0.saturating_mul(PER_NS);
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
    fn an_idle_device_may_burst_and_then_waits() {
        let limiter = Limiter::new(limit(1000, 0, 10));
        let now = Ticks(1_000_000_000);
        assert_eq!(limiter.admit(now), Ok(10));
        limiter.charge(now, 10, 0);
        assert_eq!(limiter.admit(now), Ok(1), "exactly at the line: the next one overdraws");
        limiter.charge(now, 1, 0);
        assert_eq!(limiter.admit(now), Err(now.plus_ns(1_000_000)));
        assert_eq!(limiter.admit(now.plus_ns(1_000_000)), Ok(1));
    }

    #[test]
    fn idle_time_earns_no_more_than_the_burst() {
        let limiter = Limiter::new(limit(1000, 0, 10));
        limiter.charge(Ticks(0), 5, 0);
        assert_eq!(limiter.admit(Ticks(3_600_000_000_000)), Ok(10));
    }

    #[test]
    fn a_large_request_is_worked_off() {
        let limiter = Limiter::new(limit(0, 1_000_000, 0));
        limiter.charge(Ticks(0), 1, 4_000_000);
        assert_eq!(limiter.admit(Ticks(1)), Err(Ticks(3_999_000_000)));
    }

    proptest! {
        #[test]
        fn the_mean_rate_is_the_limit(
            iops in 1_000u64..2_000_000,
            burst_ms in 0u32..50,
            step_ns in 100u64..20_000,
        ) {
            let limiter = Limiter::new(limit(iops, 0, burst_ms));
            let taken = simulate(&limiter, 100_000_000, step_ns, 4096);
            // Polls this rare cannot take more than 32 each; otherwise the rate is reached, and passed by no more than
            // the burst and one poll's take.
            let reachable = (iops / 10).min(32 * 100_000_000 / step_ns);
            let most = iops / 10 + iops * u64::from(burst_ms.max(1)) / 1000 + 33;
            prop_assert!(taken <= most, "{taken} > {most}");
            prop_assert!((taken + 1) * 100 >= reachable * 98, "{taken} < 98 % of {reachable}");
        }

        #[test]
        fn the_tighter_of_two_limits_holds(bytes in 512u64..1_000_000) {
            let limiter = Limiter::new(limit(10_000, 50_000_000, 1));
            let taken = simulate(&limiter, 1_000_000_000, 1_000, bytes);
            let most = 10_010.min(50_050_000 / bytes) + 9;
            prop_assert!(taken <= most && taken * 100 >= (most - 30) * 98, "{taken} of {most}");
        }
    }
}

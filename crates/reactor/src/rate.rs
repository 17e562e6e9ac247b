//! A rate limit, as a function of time.
//!
//! A limit is a *due time*: when everything taken so far is paid for at the agreed rate. Taking something moves it
//! forward by the cost; while it lies further ahead than the burst allows, nothing more is taken. (The generic cell
//! rate algorithm, ITU-T I.371: a token bucket whose state is one number.) One number means that several threads share
//! it with one atomic operation per burst and no lock.
//!
//! What is taken may be charged afterwards, when its size is known. A burst may thus overdraw the account; the debt is
//! worked off before the next one, so the mean is exact.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::Ticks;

/// Due times count in sixteenths of a nanosecond: 36 years fit, and the rounding of a burst's cost is negligible.
const PER_NS: u64 = 16;
const PER_S: u64 = 1_000_000_000 * PER_NS;

/// An account of what may be taken per second: requests, bytes, packets.
#[derive(Debug, Default)]
pub struct RateAccount {
    /// Units per second; 0 is no limit.
    rate: AtomicU64,
    burst: AtomicU64,
    due: AtomicU64,
}

impl RateAccount {
    /// An account that holds what `burst_ms` are worth, and is full; None is no limit.
    #[must_use]
    pub fn new(rate: Option<NonZeroU64>, burst_ms: u32) -> Self {
        let new = Self::default();
        new.set(rate, burst_ms);
        new
    }

    /// Replaces the limit, for what is taken from now on: what the old one has still to be paid is forgotten. 0 ms count
    /// as 1: without any burst, time would be lost whenever somebody comes a little late.
    pub fn set(&self, rate: Option<NonZeroU64>, burst_ms: u32) {
        self.burst.store(u64::from(burst_ms.max(1)) * 1_000_000 * PER_NS, Ordering::Relaxed);
        self.rate.store(rate.map_or(0, NonZeroU64::get), Ordering::SeqCst);
        self.due.store(0, Ordering::SeqCst);
    }

    /// Whether there is a limit.
    #[inline(always)]
    #[must_use]
    pub fn is_limited(&self) -> bool {
        self.rate.load(Ordering::Relaxed) != 0
    }

    /// Units that may be taken at `now`: at least `least` and at least 1.
    ///
    /// # Errors
    /// Fewer than `least`, before the time given. More than a full account holds is never asked for: the rest is
    /// overdrawn.
    pub fn admit(&self, now: Ticks, least: u64) -> Result<u64, Ticks> {
        let rate = self.rate.load(Ordering::Relaxed);
        if rate == 0 {
            return Ok(u64::MAX);
        }
        let (now, due) = (now.0.saturating_mul(PER_NS), self.due.load(Ordering::Relaxed));
        let burst = self.burst.load(Ordering::Relaxed);
        let line = now.saturating_add(burst);
        let enough_from = due.saturating_add(cost(least, rate).min(burst));
        if enough_from > line {
            return Err(Ticks((enough_from - burst).div_ceil(PER_NS)));
        }
        // A cost that rounds to nothing limits nothing.
        let units = (line - due.max(now)).checked_div(cost(1, rate)).unwrap_or(u64::MAX);
        Ok(units.max(least).max(1))
    }

    /// Charges what was taken at `now`.
    pub fn charge(&self, now: Ticks, units: u64) {
        let rate = self.rate.load(Ordering::Relaxed);
        if rate > 0 && units > 0 {
            let (now, cost) = (now.0.saturating_mul(PER_NS), cost(units, rate));
            let charged = |due: u64| Some(due.max(now).saturating_add(cost));
            let _ = self.due.fetch_update(Ordering::SeqCst, Ordering::Relaxed, charged);
            // Charged by a rate that was replaced meanwhile: either `set` has yet to clear the account, or it shows here.
            if self.rate.load(Ordering::SeqCst) != rate {
                self.due.store(0, Ordering::SeqCst);
            }
        }
    }
}

/// What `units` cost at `rate` units per second.
fn cost(units: u64, rate: u64) -> u64 {
    u64::try_from(u128::from(units) * u128::from(PER_S) / u128::from(rate)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn account(rate: u64, burst_ms: u32) -> RateAccount {
        RateAccount::new(NonZeroU64::new(rate), burst_ms)
    }

    #[test]
    fn no_limit_admits_everything() {
        let account = account(0, 0);
        assert!(!account.is_limited());
        assert_eq!(account.admit(Ticks(5), 1), Ok(u64::MAX));
    }

    #[test]
    fn a_full_account_may_be_emptied_at_once_and_then_one_waits() {
        let account = account(1000, 10);
        let now = Ticks(1_000_000_000);
        assert_eq!(account.admit(now, 0), Ok(10));
        account.charge(now, 10);
        assert_eq!(account.admit(now, 0), Ok(1), "exactly at the line: the next one overdraws");
        account.charge(now, 1);
        assert_eq!(account.admit(now, 0), Err(now.plus_ns(1_000_000)));
        assert_eq!(account.admit(now.plus_ns(1_000_000), 0), Ok(1));
    }

    #[test]
    fn time_without_use_earns_no_more_than_the_burst() {
        let account = account(1000, 10);
        account.charge(Ticks(0), 5);
        assert_eq!(account.admit(Ticks(3_600_000_000_000), 0), Ok(10));
    }

    #[test]
    fn small_amounts_can_be_waited_out() {
        let account = account(1000, 100);
        let now = Ticks(1_000_000_000);
        account.charge(now, 100);
        let later = now.plus_ns(64_000_000);
        assert_eq!(account.admit(now, 64), Err(later));
        assert_eq!(account.admit(Ticks(later.0 - 1), 64), Err(later));
        assert_eq!(account.admit(later, 64), Ok(64));
    }

    #[test]
    fn more_than_the_account_holds_is_granted_when_it_is_full() {
        let account = account(10, 1);
        assert_eq!(account.admit(Ticks(1), 64), Ok(64));
        account.charge(Ticks(1), 64);
        assert_eq!(account.admit(Ticks(2), 64), Err(Ticks(6_400_000_001)));
    }

    #[test]
    fn a_new_limit_begins_without_the_debt_of_the_old_one() {
        let account = account(1, 1);
        account.charge(Ticks(1), 4096);
        assert!(account.admit(Ticks(2), 0).is_err_and(|later| later > Ticks(4_000_000_000_000)));
        account.set(NonZeroU64::new(1000), 10);
        assert_eq!(account.admit(Ticks(2), 0), Ok(10));
    }

    proptest! {
        #[test]
        fn the_mean_is_the_rate(rate in 1_000u64..2_000_000, burst_ms in 0u32..50, step_ns in 100u64..20_000) {
            let account = account(rate, burst_ms);
            let mut now = Ticks(1_000_000);
            let end = now.plus_ns(100_000_000);
            let mut taken = 0;
            while now < end {
                match account.admit(now, 0) {
                    Ok(units) => {
                        account.charge(now, units.min(32));
                        taken += units.min(32);
                        now = now.plus_ns(step_ns);
                    }
                    Err(later) => {
                        prop_assert!(later > now, "a pause leads somewhere");
                        now = later;
                    }
                }
            }
            // Looks this rare cannot take more than 32 each; otherwise the rate is reached, and passed by no more than
            // the burst and what one look takes.
            let reachable = (rate / 10).min(32 * 100_000_000 / step_ns);
            let most = rate / 10 + rate * u64::from(burst_ms.max(1)) / 1000 + 33;
            prop_assert!(taken <= most, "{taken} > {most}");
            prop_assert!((taken + 1) * 100 >= reachable * 98, "{taken} < 98 % of {reachable}");
        }
    }
}

//! A rate limit in bytes per second, as a function of time.
//!
//! The bucket is kept as one point in time, up to which what was spent is paid for (the generic cell rate algorithm,
//! ITU-T I.371): spending moves it into the future, and it may run ahead of now by the burst.

use std::num::NonZeroU64;

use reactor::Ticks;

const NS_PER_S: u128 = 1_000_000_000;
/// How much unspent time counts.
const BURST_NS: u64 = 100_000_000;

/// What may be spent now and when there is more. Starts full.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bucket {
    bytes_per_s: u64,
    burst_ns: u64,
    paid_until: Ticks,
}

impl Bucket {
    /// A bucket that holds 100 ms of its rate, and at least `bytes_min`.
    pub(crate) fn new(bytes_per_s: NonZeroU64, bytes_min: u64) -> Self {
        let bytes_per_s = bytes_per_s.get();
        let burst_ns = BURST_NS.max(price_ns(bytes_per_s, bytes_min));
        Self { bytes_per_s, burst_ns, paid_until: Ticks(0) }
    }

    /// Bytes that may be spent at `now`.
    pub(crate) fn available(&self, now: Ticks) -> u64 {
        let ahead_ns = self.paid_until.since_ns(now);
        let ns = self.burst_ns.saturating_sub(ahead_ns);
        u64::try_from(u128::from(ns) * u128::from(self.bytes_per_s) / NS_PER_S).unwrap_or(u64::MAX)
    }

    /// Spends `bytes`; more than are available are owed.
    pub(crate) fn spend(&mut self, now: Ticks, bytes: u64) {
        self.paid_until = self.paid_until.max(now).plus_ns(price_ns(self.bytes_per_s, bytes));
    }

    /// From when on `bytes` are available. No more than the burst ever are.
    pub(crate) fn ready_at(&self, bytes: u64) -> Ticks {
        let slack_ns = self.burst_ns.saturating_sub(price_ns(self.bytes_per_s, bytes));
        Ticks(self.paid_until.0.saturating_sub(slack_ns))
    }
}

/// The time that `bytes` take, rounded up.
fn price_ns(bytes_per_s: u64, bytes: u64) -> u64 {
    let ns = (u128::from(bytes) * NS_PER_S).div_ceil(u128::from(bytes_per_s));
    u64::try_from(ns).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START: Ticks = Ticks(5_000_000_000);

    fn bucket(bytes_per_s: u64) -> Bucket {
        Bucket::new(NonZeroU64::new(bytes_per_s).unwrap(), 64)
    }

    #[test]
    fn it_starts_full_and_refills_at_its_rate() {
        let mut bucket = bucket(10_000);
        assert_eq!(bucket.available(START), 1000);
        bucket.spend(START, 1000);
        assert_eq!(bucket.available(START), 0);
        assert_eq!(bucket.ready_at(64), START.plus_ns(6_400_000));
        assert_eq!(bucket.available(START.plus_ns(6_400_000)), 64);
        assert_eq!(bucket.available(START.plus_ns(60_000_000_000)), 1000, "no more than the burst");
    }

    #[test]
    fn the_slowest_rate_still_grants_the_least_amount() {
        let mut bucket = bucket(1);
        assert_eq!(bucket.available(START), 64);
        bucket.spend(START, 64);
        assert_eq!(bucket.ready_at(64), START.plus_ns(64_000_000_000));
    }

    #[test]
    fn the_fastest_rate_does_not_overflow() {
        let mut bucket = bucket(u64::MAX);
        assert!(bucket.available(START) > 1 << 60);
        bucket.spend(START, u64::MAX);
        assert!(bucket.ready_at(u64::MAX) > START);
    }

    proptest! {
        #[test]
        fn no_schedule_gets_more_than_rate_and_burst(
            rate in 1_u64..1_000_000_000,
            steps in proptest::collection::vec((0_u64..50_000_000, 0_u64..100_000), 1..200),
        ) {
            let mut bucket = bucket(rate);
            let burst = u128::from(bucket.available(START));
            let (mut now, mut spent) = (START, 0_u128);
            for (pause_ns, wanted) in steps {
                now = now.plus_ns(pause_ns);
                let bytes = wanted.min(bucket.available(now));
                bucket.spend(now, bytes);
                spent += u128::from(bytes);
                let earned = u128::from(now.since_ns(START)) * u128::from(rate) / NS_PER_S;
                prop_assert!(spent <= burst + earned + 1);
            }
        }

        #[test]
        fn what_is_promised_is_there(rate in 1_u64..1_000_000_000, spent in 0_u64..100_000) {
            let mut bucket = bucket(rate);
            bucket.spend(START, spent);
            let at = bucket.ready_at(64).max(START);
            prop_assert!(bucket.available(at) >= 64);
        }
    }
}

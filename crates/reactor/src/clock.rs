//! One cheap, common notion of now.
//!
//! Every turn of every I/O thread reads the time, so the read must cost less than an empty poll, and what one
//! thread reads must be comparable with what another reads. A processor whose time-stamp counter is invariant
//! gives both: one instruction and one multiplication. The multiplier is measured once per process against
//! `CLOCK_MONOTONIC`; without such a counter the clock is `CLOCK_MONOTONIC` itself.

use std::sync::OnceLock;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::{Ticks, tsc};

/// How long the counter is compared with `CLOCK_MONOTONIC`. The two readings at either end are off by well under
/// 100 ns, so the rate is off by less than 10 parts per million.
const CALIBRATION_MS: u64 = 10;
/// Readings taken at either end; the tightest one counts, so that being descheduled in one of them does no harm.
const CALIBRATION_READS: u32 = 16;
/// Fraction bits of the multiplier: at 1 to 5 GHz it keeps 30 or more significant bits, and the 128-bit product
/// of a 64-bit count never overflows.
const SHIFT: u32 = 32;

/// The I/O threads' clock: nanoseconds that never run backwards on a thread. Copy it, it is four words.
///
/// It starts at `CLOCK_MONOTONIC` and keeps its rate to within 10 parts per million; it is a clock for intervals
/// and deadlines, not for timestamps that leave the process. Two threads' readings may disagree by as much as
/// their counters do (a few ns on hardware whose kernel trusts the counter), which is why [`Ticks::since_ns`]
/// saturates.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Source);

#[derive(Clone, Copy, Debug)]
enum Source {
    Tsc(Rate),
    Monotonic,
}

/// `ns = start_ns + (count - start) * mult / 2^SHIFT`
#[derive(Clone, Copy, Debug)]
struct Rate {
    start: u64,
    start_ns: u64,
    mult: u64,
}

impl Clock {
    /// The process's clock. The first call calibrates it and takes about 10 ms, so make it before the data path
    /// runs ([`Pool::start`](crate::Pool::start) does); later calls return the same clock.
    #[must_use]
    pub fn get() -> Self {
        static CLOCK: OnceLock<Clock> = OnceLock::new();
        *CLOCK.get_or_init(|| {
            let rate = if tsc::is_invariant() { Rate::measure() } else { None };
            Self(rate.map_or(Source::Monotonic, Source::Tsc))
        })
    }

    /// A clock that asks the kernel, for comparison.
    #[must_use]
    pub fn monotonic() -> Self {
        Self(Source::Monotonic)
    }

    /// Whether reads are one instruction (the invariant counter) and not a call into the vDSO.
    #[must_use]
    pub fn is_tsc(&self) -> bool {
        matches!(self.0, Source::Tsc(_))
    }

    /// The time now.
    #[must_use]
    #[inline]
    pub fn now(&self) -> Ticks {
        match &self.0 {
            Source::Tsc(rate) => Ticks(rate.ns_at(tsc::read())),
            Source::Monotonic => Ticks(monotonic_ns()),
        }
    }
}

impl Rate {
    /// `None` if the counter did not advance as a time-stamp counter of 100 MHz to 100 GHz would.
    fn measure() -> Option<Self> {
        let (start, start_ns) = reading();
        std::thread::sleep(Duration::from_millis(CALIBRATION_MS));
        let (end, end_ns) = reading();
        Self::between((start, start_ns), (end, end_ns))
    }

    fn between((start, start_ns): (u64, u64), (end, end_ns): (u64, u64)) -> Option<Self> {
        let count = end.checked_sub(start).filter(|&count| count > 0)?;
        let ns = end_ns.checked_sub(start_ns)?;
        if count < ns / 10 || count > ns.saturating_mul(100) {
            return None;
        }
        let mult = u64::try_from((u128::from(ns) << SHIFT) / u128::from(count)).ok()?;
        Some(Self { start, start_ns, mult })
    }

    #[inline]
    fn ns_at(&self, count: u64) -> u64 {
        let count = count.saturating_sub(self.start);
        let ns = (u128::from(count) * u128::from(self.mult)) >> SHIFT;
        self.start_ns.wrapping_add(ns as u64)
    }
}

/// The counter and `CLOCK_MONOTONIC` at the same moment.
fn reading() -> (u64, u64) {
    (0..CALIBRATION_READS)
        .map(|_| {
            let before = tsc::read();
            let ns = monotonic_ns();
            let width = tsc::read().saturating_sub(before);
            (width, (before + width / 2, ns))
        })
        .min()
        .map_or((0, 0), |(_, reading)| reading)
}

fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    (now.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_multiplier_is_exact_for_round_rates() {
        let rate = Rate::between((1000, 50), (1000 + 25_000_000, 50 + 10_000_000)).unwrap();
        assert_eq!(rate.ns_at(1000), 50);
        assert_eq!(rate.ns_at(1000 + 2_500_000_000), 50 + 999_999_999, "2.5 GHz, rounded down");
        assert_eq!(rate.ns_at(999), 50, "a core whose counter is a little behind does not underflow");
    }

    #[test]
    fn a_century_of_counting_does_not_overflow() {
        let rate = Rate::between((0, 0), (50_000_000, 10_000_000)).unwrap();
        let century_s = 100 * 366 * 86_400_u64;
        assert_eq!(rate.ns_at(century_s * 5_000_000_000) / 1_000_000_000, century_s - 1);
    }

    #[test]
    fn a_counter_that_stands_still_or_races_is_refused() {
        assert!(Rate::between((5, 0), (5, 10_000_000)).is_none());
        assert!(Rate::between((5, 0), (4, 10_000_000)).is_none());
        assert!(Rate::between((0, 0), (100_000, 10_000_000)).is_none());
        assert!(Rate::between((0, 0), (u64::MAX, 10_000_000)).is_none());
    }

    #[test]
    fn every_thread_gets_the_same_clock_and_time_goes_on() {
        let here = Clock::get();
        let before = here.now();
        let there = std::thread::spawn(|| Clock::get().now()).join().unwrap();
        assert!(here.now() >= before);
        assert!(there.since_ns(before) < 3_600_000_000_000);
    }

    #[test]
    fn it_starts_at_the_monotonic_clock() {
        let (clock, kernel) = (Clock::get().now(), Clock::monotonic().now());
        assert!(kernel.since_ns(clock).max(clock.since_ns(kernel)) < 1_000_000_000, "within a second of it");
    }
}

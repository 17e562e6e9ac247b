//! How long to wait for somebody else: a device, or another processor.
//!
//! Whatever the other side does, the guest ends with a reason, so every wait has a limit. It counts from the last sign
//! of life, not from the beginning: what is slow and gets on is left to get on. Time in which this processor did not run
//! itself, because its machine was stopped, does not count.

use core::hint::spin_loop;

use super::clock::Clock;
use super::service::ticks;

/// A device that gives no sign of life for so long is given up.
pub const DEVICE_SECONDS: u64 = 10;
/// The same for a processor. Longer, so that one that waits for a device itself can say so first.
pub const PROCESSOR_SECONDS: u64 = 30;

/// Where one look is quick, the clock is asked once in so many.
const LOOKS_PER_TICK: u32 = 1 << 10;
/// Between two looks at the clock lies so much only if this processor was stopped.
const STOPPED_MS_MIN: u64 = 2_000;
/// So often in one wait that is believed: a look may be what takes so long.
const STOPS_MAX: u8 = 8;

/// A wait that has a limit.
pub struct Patience {
    limit: u64,
    since: u64,
    seen: u64,
    stopped: u64,
    stops: u8,
    looks: u32,
}

impl Patience {
    /// Of so many milliseconds, from now on.
    #[must_use]
    pub fn of_ms(clock: Clock, ms: u64) -> Self {
        let (now, stopped) = (ticks(), clock.ticks_of_ms(STOPPED_MS_MIN));
        Self { limit: clock.ticks_of_ms(ms), since: now, seen: now, stopped, stops: 0, looks: 0 }
    }

    /// With a device.
    #[must_use]
    pub fn with_device(clock: Clock) -> Self {
        Self::of_ms(clock, DEVICE_SECONDS * 1000)
    }

    /// Begins anew at tick `now`: there was a sign of life.
    #[inline(always)]
    pub fn renew(&mut self, now: u64) {
        (self.since, self.seen) = (now, now);
    }

    /// Whether the limit is reached at tick `now`.
    #[inline(always)]
    #[must_use]
    pub fn is_over(&mut self, now: u64) -> bool {
        // Another processor's counter may be a little behind.
        if now.saturating_sub(self.seen) > self.stopped && self.stops < STOPS_MAX {
            self.stops += 1;
            self.since = now;
        }
        self.seen = now;
        now.saturating_sub(self.since) > self.limit
    }

    /// Spins until `done`; false if the limit was reached first.
    #[inline(always)]
    pub fn spin_until(&mut self, mut done: impl FnMut() -> bool) -> bool {
        while !done() {
            self.looks = self.looks.wrapping_add(1);
            if self.looks.is_multiple_of(LOOKS_PER_TICK) && self.is_over(ticks()) {
                return false;
            }
            spin_loop();
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_when_it_is_done_or_over() {
        let (clock, mut looks) = (Clock::of_hz(1_000_000), 0);
        let done = || {
            looks += 1;
            looks == 5 * LOOKS_PER_TICK
        };
        assert!(Patience::of_ms(clock, u64::from(u32::MAX)).spin_until(done));
        assert!(!Patience::of_ms(clock, 1).spin_until(|| false));
        assert!(Patience::of_ms(clock, 0).spin_until(|| true), "what is done needs no patience");
    }

    fn at_zero(limit: u64, stopped: u64) -> Patience {
        Patience { limit, since: 0, seen: 0, stopped, stops: 0, looks: 0 }
    }

    #[test]
    fn a_sign_of_life_begins_it_anew() {
        let mut patience = at_zero(100, 1000);
        assert!(!patience.is_over(100));
        assert!(patience.is_over(101));
        patience.renew(150);
        assert!(!patience.is_over(250));
        assert!(patience.is_over(251));
        assert!(!patience.is_over(0), "a counter that is behind");
    }

    #[test]
    fn time_in_which_the_machine_was_stopped_does_not_count() {
        let mut patience = at_zero(100, 50);
        assert!(!patience.is_over(1_000_000));
        assert!(!patience.is_over(1_000_040));
        assert!(!patience.is_over(1_000_080));
        assert!(patience.is_over(1_000_110));
        let mut patience = at_zero(100, 50);
        let looks = (1..).map(|look| look * 60).take_while(|&now| !patience.is_over(now)).count();
        assert!(looks < 20, "but a look that takes long does not make a wait endless");
    }
}

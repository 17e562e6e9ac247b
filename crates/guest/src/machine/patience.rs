//! How long to wait for somebody else: a device, or another processor.
//!
//! Whatever the other side does, the guest ends with a reason, so every wait has a limit. It counts from the last sign
//! of life, not from the beginning: what is slow and gets on is left to get on. A machine that was stopped and goes on
//! blames nobody for that time.

use core::hint::spin_loop;

use super::clock::Clock;
use super::service::ticks;

/// A device that gives no sign of life for so long is given up.
pub const DEVICE_SECONDS: u64 = 10;
/// The same for a processor. Longer, so that one that waits for a device itself can say so first.
pub const PROCESSOR_SECONDS: u64 = 30;

/// Where one look is quick, the clock is asked once in so many.
const LOOKS_PER_TICK: u32 = 1 << 10;
/// At the limit there is so much of it more, once: if the machine was stopped, the other side was too.
const LAST_CHANCE: u64 = 8;

/// A wait that has a limit.
pub struct Patience {
    limit: u64,
    since: u64,
    /// What `since` is once the last chance is given.
    last_chance: u64,
    looks: u32,
}

impl Patience {
    /// Of so many milliseconds, from now on.
    #[must_use]
    pub fn of_ms(clock: Clock, ms: u64) -> Self {
        Self { limit: clock.ticks_of_ms(ms), since: ticks(), last_chance: 0, looks: 0 }
    }

    /// With a device.
    #[must_use]
    pub fn with_device(clock: Clock) -> Self {
        Self::of_ms(clock, DEVICE_SECONDS * 1000)
    }

    /// Begins anew at tick `now`: there was a sign of life.
    #[inline(always)]
    pub fn renew(&mut self, now: u64) {
        self.since = now;
    }

    /// Whether the limit is reached at tick `now`.
    #[inline(always)]
    #[must_use]
    pub fn is_over(&mut self, now: u64) -> bool {
        // Another processor's counter may be a little behind.
        now.saturating_sub(self.since) > self.limit && self.had_last_chance(now)
    }

    #[cold]
    fn had_last_chance(&mut self, now: u64) -> bool {
        if self.since == self.last_chance {
            return true;
        }
        self.since = now - self.limit + self.limit / LAST_CHANCE;
        self.last_chance = self.since;
        false
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

    fn since_1000(limit: u64) -> Patience {
        Patience { limit, since: 1000, last_chance: 0, looks: 0 }
    }

    #[test]
    fn a_sign_of_life_begins_it_anew() {
        let mut patience = since_1000(80);
        assert!(!patience.is_over(1080));
        patience.renew(1080);
        assert!(!patience.is_over(1160));
        assert!(!patience.is_over(0), "a counter that is behind");
        assert!(!patience.is_over(1161) && !patience.is_over(1171) && patience.is_over(1172));
    }

    #[test]
    fn who_was_stopped_as_well_has_a_last_chance() {
        let mut patience = since_1000(80);
        assert!(!patience.is_over(1_000_000));
        assert!(!patience.is_over(1_000_010));
        patience.renew(1_000_010);
        assert!(!patience.is_over(2_000_000), "one after each sign of life");
        assert!(patience.is_over(2_000_011));
    }
}

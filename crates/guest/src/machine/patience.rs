//! How long to wait for somebody else: a device, or another processor.
//!
//! Whatever the other side does, the guest ends with a reason, so every wait has a limit. It counts from the last sign
//! of life, not from the beginning: what is slow and gets on is left to get on.

use core::hint::spin_loop;

use super::clock::Clock;
use super::service::ticks;

/// A device that gives no sign of life for so long is given up.
pub const DEVICE_SECONDS: u64 = 10;
/// The same for a processor. Longer, so that one that waits for a device itself can say so first.
pub const PROCESSOR_SECONDS: u64 = 30;

/// Where one look is quick, the clock is asked once in so many.
const LOOKS_PER_TICK: u32 = 1 << 10;

/// A wait that has a limit.
pub struct Patience {
    limit: u64,
    since: u64,
    looks: u32,
}

impl Patience {
    /// Of so many milliseconds, from now on.
    #[must_use]
    pub fn of_ms(clock: Clock, ms: u64) -> Self {
        Self { limit: clock.ticks_of_ms(ms), since: ticks(), looks: 0 }
    }

    /// With a device.
    #[must_use]
    pub fn with_device(clock: Clock) -> Self {
        Self::of_ms(clock, DEVICE_SECONDS * 1000)
    }

    /// Begins anew: there was a sign of life.
    pub fn renew(&mut self) {
        self.since = ticks();
    }

    /// Whether the limit is reached.
    #[must_use]
    pub fn is_over(&self) -> bool {
        // Another processor's counter may be a little behind.
        ticks().saturating_sub(self.since) > self.limit
    }

    /// Spins until `done`; false if the limit was reached first.
    #[inline(always)]
    pub fn spin_until(&mut self, mut done: impl FnMut() -> bool) -> bool {
        while !done() {
            self.looks = self.looks.wrapping_add(1);
            if self.looks.is_multiple_of(LOOKS_PER_TICK) && self.is_over() {
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

    #[test]
    fn a_sign_of_life_begins_it_anew() {
        let mut patience = Patience { limit: 1 << 40, since: 0, looks: 0 };
        patience.renew();
        assert!(!patience.is_over());
        (patience.since, patience.limit) = (0, 0);
        assert!(patience.is_over());
    }
}

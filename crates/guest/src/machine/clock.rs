//! How fast the time stamp counter runs.
//!
//! Under KVM the host says it exactly (the clock that `MSR_KVM_SYSTEM_TIME_NEW` fills in); elsewhere it is measured
//! against the second counter of the PIT.
#![allow(unsafe_code)]

use core::sync::atomic::Ordering;

use virtio::{Memory, MemoryError};

use super::{heap, service};

const KVM_SIGNATURE: [u32; 3] = [0x4B4D_564B, 0x564B_4D56, 0x4D];
const KVM_LEAF: u32 = 0x4000_0000;
const KVM_FEATURE_CLOCKSOURCE2: u32 = 1 << 3;
const MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4B56_4D01;

const PIT_HZ: u64 = 1_193_182;
const PIT_COUNT: u16 = 11_932;
const PIT_COMMAND: u16 = 0x43;
const PIT_COUNTER_2: u16 = 0x42;
/// The second counter, 16 bits, counting down once.
const PIT_MODE: u8 = 0xB0;
const CONTROL: u16 = 0x61;
const CONTROL_GATE: u8 = 1;
const CONTROL_SPEAKER: u8 = 2;
const CONTROL_OUTPUT: u8 = 0x20;

/// Thousands of times as long as the count takes, at any speed that processors have.
const TICKS_MAX: u64 = 1 << 34;

/// Ticks and time.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    hz: u64,
}

impl Clock {
    /// Asks the host, or measures for 10 ms; None if neither is possible.
    ///
    /// # Errors
    /// None that can happen: memory of this program is not mapped.
    pub(super) fn new(memory: &Memory) -> Result<Option<Self>, MemoryError> {
        Ok(ask_kvm(memory)?.or_else(measure).map(|hz| Self { hz: hz.max(1) }))
    }

    /// A clock of a known speed.
    #[must_use]
    pub const fn of_hz(hz: u64) -> Self {
        Self { hz }
    }

    /// Ticks in a second.
    #[must_use]
    pub fn hz(&self) -> u64 {
        self.hz
    }

    /// A number of ticks, in microseconds.
    #[must_use]
    pub fn us(&self, ticks: f64) -> f64 {
        ticks * 1e6 / self.hz as f64
    }

    /// Milliseconds, in ticks.
    #[must_use]
    pub fn ticks_of_ms(&self, ms: u64) -> u64 {
        (u128::from(self.hz) * u128::from(ms) / 1000) as u64
    }

    /// The tick `ms` from now.
    #[must_use]
    pub fn deadline_ms(&self, ms: u64) -> u64 {
        service::ticks().saturating_add(self.ticks_of_ms(ms))
    }
}

fn ask_kvm(memory: &Memory) -> Result<Option<u64>, MemoryError> {
    let [_, signature @ ..] = service::cpuid(KVM_LEAF);
    if signature != KVM_SIGNATURE || service::cpuid(KVM_LEAF + 1)[0] & KVM_FEATURE_CLOCKSOURCE2 == 0 {
        return Ok(None);
    }
    let page = heap::take(4096, 4096);
    // SAFETY: the register tells the host to keep 32 bytes of time in memory that was taken for it just now; bit 0
    // turns that on.
    unsafe { service::write_msr(MSR_KVM_SYSTEM_TIME_NEW, page.0 | 1) };
    let time = memory.area(page, 32, 8)?;
    let multiplier = time.u32(24).load(Ordering::Acquire);
    let shift = time.u8(28).load(Ordering::Relaxed) as i8;
    // SAFETY: as above; turned off.
    unsafe { service::write_msr(MSR_KVM_SYSTEM_TIME_NEW, 0) };
    Ok(hz_of(multiplier, shift))
}

/// The speed behind `ns = (ticks << shift) * multiplier >> 32`.
fn hz_of(multiplier: u32, shift: i8) -> Option<u64> {
    let hz = (1_000_000_000_u128 << 32).checked_div(multiplier.into())?;
    let hz = match shift {
        0.. => hz.checked_shr(u32::from(shift.unsigned_abs()))?,
        _ => hz.checked_shl(u32::from(shift.unsigned_abs()))?,
    };
    u64::try_from(hz).ok().filter(|&hz| hz > 1_000_000)
}

fn measure() -> Option<u64> {
    let control = service::in8(CONTROL) & !CONTROL_SPEAKER;
    service::out8(CONTROL, control & !CONTROL_GATE);
    service::out8(PIT_COMMAND, PIT_MODE);
    service::out8(PIT_COUNTER_2, PIT_COUNT as u8);
    service::out8(PIT_COUNTER_2, (PIT_COUNT >> 8) as u8);
    service::out8(CONTROL, control | CONTROL_GATE);
    let start = service::ticks();
    while service::in8(CONTROL) & CONTROL_OUTPUT == 0 {
        if service::ticks() - start > TICKS_MAX {
            return None;
        }
    }
    Some((service::ticks() - start) * PIT_HZ / u64::from(PIT_COUNT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_multiplier_is_turned_into_a_speed() {
        // 2.5 GHz is 0.4 ns a tick; shifted by one bit, 0.8.
        let multiplier = (0.8 * f64::powi(2.0, 32)) as u32;
        let near = |hz: u64| hz.abs_diff(2_500_000_000) < 10;
        assert!(near(hz_of(multiplier, -1).unwrap()));
        assert!(near(hz_of(multiplier / 2, 0).unwrap()));
        assert!(near(hz_of(multiplier / 4, 1).unwrap()));
        assert_eq!(hz_of(0, 0), None);
    }

    #[test]
    fn ticks_are_turned_into_time_and_back() {
        let clock = Clock::of_hz(2_500_000_000);
        assert_eq!(clock.ticks_of_ms(2), 5_000_000);
        assert!((clock.us(5_000.0) - 2.0).abs() < 1e-9);
    }
}

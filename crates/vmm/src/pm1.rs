//! ACPI's fixed power management (ACPI 6.5, section 4.8.3.1): the power button, and the register that switches off.
//!
//! The button is a bit of the status register and an interrupt, the SCI, that is level-triggered: it is asserted for as
//! long as the guest has enabled an event that has happened and that it has not cleared.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::bus::Handler;
use crate::power::{Outcome, Power};

/// Sets the level of the SCI.
pub(crate) type Sci = Box<dyn Fn(bool) + Send + Sync>;

/// The registers.
pub(crate) struct Pm1 {
    power: Arc<Power>,
    sci: Sci,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    status: u16,
    enable: u16,
    control: u16,
}

/// What a guest writes to `SLP_TYP` to switch off; the DSDT says so.
pub(crate) const SLEEP_TYPE_OFF: u16 = 5;

/// Offsets: the event block is status and enable, the control register follows.
const STATUS: u64 = 0;
const ENABLE: u64 = 2;
const CONTROL: u64 = 4;
/// `PWRBTN_STS` and `PWRBTN_EN`.
const POWER_BUTTON: u16 = 1 << 8;
const SCI_EN: u16 = 1 << 0;
const SLP_TYP_SHIFT: u32 = 10;
const SLP_TYP: u16 = 7 << SLP_TYP_SHIFT;
const SLP_EN: u16 = 1 << 13;

impl Pm1 {
    pub(crate) fn new(power: Arc<Power>, sci: Sci) -> Self {
        Self { power, sci, state: Mutex::default() }
    }

    /// Presses the power button. False if the guest does not listen to it.
    pub(crate) fn press(&self) -> bool {
        let mut state = self.lock();
        let listens = state.enable & POWER_BUTTON != 0;
        if listens {
            state.status |= POWER_BUTTON;
            self.signal(&state);
        }
        listens
    }

    /// With the lock held, so that the level follows the registers.
    fn signal(&self, state: &State) {
        (self.sci)(state.status & state.enable != 0);
    }

    fn sleep(&self, control: u16) {
        if control & SLP_EN != 0 && (control & SLP_TYP) >> SLP_TYP_SHIFT == SLEEP_TYPE_OFF {
            self.power.end(Outcome::PowerOff);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Handler for Pm1 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        // There is no other mode than ACPI's.
        let registers = [state.status, state.enable, state.control & !SLP_EN | SCI_EN];
        let bytes = registers.iter().flat_map(|register| register.to_le_bytes()).skip(offset as usize);
        data.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let &[low, high, ..] = data else { return };
        let value = u16::from_le_bytes([low, high]);
        let mut state = self.lock();
        match offset {
            // Writing 1 clears.
            STATUS => state.status &= !value,
            ENABLE => state.enable = value,
            CONTROL => {
                state.control = value;
                self.sleep(value);
            }
            _ => return,
        }
        self.signal(&state);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn pm1() -> (Pm1, Arc<Power>, Arc<AtomicBool>) {
        let (power, level) = (Arc::new(Power::new()), Arc::new(AtomicBool::new(false)));
        let sci = level.clone();
        (Pm1::new(power.clone(), Box::new(move |high| sci.store(high, Ordering::Relaxed))), power, level)
    }

    fn register(pm1: &Pm1, offset: u64) -> u16 {
        let mut data = [0xFF; 2];
        pm1.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    #[test]
    fn a_write_to_the_control_register_switches_off() {
        let ended = |offset, data: &[u8]| {
            let (pm1, power, _) = pm1();
            pm1.write(offset, data);
            power.outcome()
        };
        assert_eq!(ended(CONTROL, &0x3400u16.to_le_bytes()), Some(Outcome::PowerOff));
        assert_eq!(ended(CONTROL, &0x1400u16.to_le_bytes()), None, "prepared only");
        assert_eq!(ended(CONTROL, &0x2000u16.to_le_bytes()), None, "another sleep");
        assert_eq!(ended(CONTROL, &[0x34]), None);
    }

    #[test]
    fn acpi_is_always_on() {
        let (pm1, ..) = pm1();
        assert_eq!(register(&pm1, CONTROL), SCI_EN);
        pm1.write(ENABLE, &0x120u16.to_le_bytes());
        let mut event = [0xFF; 8];
        pm1.read(0, &mut event);
        assert_eq!(event, [0, 0, 0x20, 1, 1, 0, 0xFF, 0xFF], "and nothing beyond the registers");
    }

    #[test]
    fn the_button_interrupts_until_the_guest_has_seen_it() {
        let (pm1, _, level) = pm1();
        assert!(!pm1.press(), "nobody listens");
        assert_eq!((register(&pm1, STATUS), level.load(Ordering::Relaxed)), (0, false));
        pm1.write(ENABLE, &POWER_BUTTON.to_le_bytes());
        assert!(!level.load(Ordering::Relaxed));
        assert!(pm1.press());
        assert_eq!((register(&pm1, STATUS), level.load(Ordering::Relaxed)), (POWER_BUTTON, true));
        pm1.write(STATUS, &(!POWER_BUTTON).to_le_bytes());
        assert!(level.load(Ordering::Relaxed), "another event was cleared");
        pm1.write(ENABLE, &[0; 2]);
        assert!(!level.load(Ordering::Relaxed), "masked");
        pm1.write(ENABLE, &POWER_BUTTON.to_le_bytes());
        assert!(level.load(Ordering::Relaxed), "it has still happened");
        pm1.write(STATUS, &POWER_BUTTON.to_le_bytes());
        assert_eq!((register(&pm1, STATUS), level.load(Ordering::Relaxed)), (0, false));
    }
}

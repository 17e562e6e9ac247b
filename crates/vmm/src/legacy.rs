//! The rest of a PC, as far as kernels insist on it: ways to end the machine, the clock in its CMOS memory, and two
//! ports for guests that measure.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::bus::Handler;
use crate::layout;
use crate::power::{Outcome, Power};

/// The keyboard controller: no keyboard, but the line that resets the processor.
pub(crate) struct I8042(pub(crate) Arc<Power>);

/// Its status and command register, and the command that pulses the reset line.
const I8042_COMMAND: u64 = 4;
const I8042_RESET: u8 = 0xFE;

impl Handler for I8042 {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // Status: nothing to read, ready for a command. Data: nothing.
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == I8042_COMMAND && data.first() == Some(&I8042_RESET) {
            self.0.end(Outcome::Reset);
        }
    }
}

/// ACPI's PM1 registers (ACPI 6.5, section 4.8.3.1): an event block of status and enable, which nothing ever happens
/// in, and the control register, which puts the machine to sleep.
pub(crate) struct Pm1 {
    power: Arc<Power>,
    enable: AtomicU16,
    control: AtomicU16,
}

/// What a guest writes to `SLP_TYP` to switch off; the DSDT says so.
pub(crate) const SLEEP_TYPE_OFF: u16 = 5;
const PM1_ENABLE: u64 = 2;
const PM1_CONTROL: u64 = 4;
const SCI_EN: u16 = 1 << 0;
const SLP_TYP_SHIFT: u32 = 10;
const SLP_TYP: u16 = 7 << SLP_TYP_SHIFT;
const SLP_EN: u16 = 1 << 13;

impl Pm1 {
    pub(crate) fn new(power: Arc<Power>) -> Self {
        Self { power, enable: AtomicU16::new(0), control: AtomicU16::new(0) }
    }

    fn sleep(&self, control: u16) {
        if control & SLP_EN != 0 && (control & SLP_TYP) >> SLP_TYP_SHIFT == SLEEP_TYPE_OFF {
            self.power.end(Outcome::PowerOff);
        }
    }
}

impl Handler for Pm1 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let registers = [
            0,
            self.enable.load(Ordering::Relaxed),
            // There is no other mode than ACPI's.
            self.control.load(Ordering::Relaxed) & !SLP_EN | SCI_EN,
        ];
        let bytes = registers.iter().flat_map(|register| register.to_le_bytes()).skip(offset as usize);
        data.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let &[low, high, ..] = data else { return };
        let value = u16::from_le_bytes([low, high]);
        match offset {
            PM1_ENABLE => self.enable.store(value, Ordering::Relaxed),
            PM1_CONTROL => {
                self.control.store(value, Ordering::Relaxed);
                self.sleep(value);
            }
            _ => {}
        }
    }
}

/// The reset register of PC chipsets, which lies among the ports of PCI's configuration.
///
/// Bit 2 resets the processor, whatever the other bits make of it.
pub(crate) fn is_reset(port: u16, data: &[u8]) -> bool {
    const RESET_CPU: u8 = 1 << 2;
    port == layout::RESET_PORT && matches!(data, [value] if value & RESET_CPU != 0)
}

/// The port that ends the machine with a status.
pub(crate) struct DebugExit(pub(crate) Arc<Power>);

impl Handler for DebugExit {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}

    fn write(&self, _offset: u64, data: &[u8]) {
        if let Some(&status) = data.first() {
            self.0.end(Outcome::Exit(status));
        }
    }
}

/// The port by which a guest says what it is about to measure.
pub(crate) struct MarkPort(pub(crate) Box<dyn Fn(u8) + Send + Sync>);

impl Handler for MarkPort {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}

    fn write(&self, _offset: u64, data: &[u8]) {
        if let Some(&mark) = data.last() {
            (self.0)(mark);
        }
    }
}

/// CMOS memory with the real-time clock, read-only: the host's time, UTC. It never interrupts.
#[derive(Default)]
pub(crate) struct Cmos {
    index: AtomicU8,
}

impl Handler for Cmos {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == 1 {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
            data.fill(register(self.index.load(Ordering::Relaxed), now));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, Some(&index)) = (offset, data.last()) {
            // Bit 7 masks the NMI of machines that have one.
            self.index.store(index & 0x7F, Ordering::Relaxed);
        }
    }
}

/// The register that holds the century; ACPI says where it is.
pub(crate) const CMOS_CENTURY: u8 = 0x32;

/// A CMOS register (MC146818) at `seconds` after 1970.
fn register(index: u8, seconds: u64) -> u8 {
    const DAY: u64 = 24 * 60 * 60;
    let (year, month, day) = date(seconds / DAY);
    match index {
        0x00 => bcd(seconds % 60),
        0x02 => bcd(seconds / 60 % 60),
        0x04 => bcd(seconds % DAY / 3600),
        // 1970 began on a Thursday; a week begins with Sunday, day 1.
        0x06 => bcd((seconds / DAY + 4) % 7 + 1),
        0x07 => bcd(day),
        0x08 => bcd(month),
        0x09 => bcd(year % 100),
        CMOS_CENTURY => bcd(year / 100),
        // Register A: a 32 kHz crystal, no update in progress. B: 24 hours, in BCD. D: the battery is good.
        0x0A => 0x26,
        0x0B => 0x02,
        0x0D => 0x80,
        _ => 0,
    }
}

fn bcd(value: u64) -> u8 {
    (value / 10 % 10 * 16 + value % 10) as u8
}

/// Year, month and day of a day since 1970, in the Gregorian calendar.
fn date(mut days: u64) -> (u64, u64, u64) {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    // Whole cycles of the calendar first, so that the loop is short whatever the host's clock says.
    const CYCLE_DAYS: u64 = 146_097;
    let mut year = 1970 + days / CYCLE_DAYS * 400;
    days %= CYCLE_DAYS;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 1;
    for length in lengths {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_to_end_the_machine_ends_it_and_nothing_else_does() {
        let ended = |handler: &dyn Fn(Arc<Power>) -> Box<dyn Handler>, offset, data: &[u8]| {
            let power = Arc::new(Power::new());
            handler(power.clone()).write(offset, data);
            power.outcome()
        };
        let i8042 = |power| Box::new(I8042(power)) as Box<dyn Handler>;
        assert_eq!(ended(&i8042, 4, &[0xFE]), Some(Outcome::Reset));
        assert_eq!(ended(&i8042, 4, &[0xD1]), None);
        assert_eq!(ended(&i8042, 0, &[0xFE]), None);
        let pm1 = |power| Box::new(Pm1::new(power)) as Box<dyn Handler>;
        assert_eq!(ended(&pm1, 4, &0x3400u16.to_le_bytes()), Some(Outcome::PowerOff));
        assert_eq!(ended(&pm1, 4, &0x1400u16.to_le_bytes()), None, "prepared only");
        assert_eq!(ended(&pm1, 4, &0x2000u16.to_le_bytes()), None, "another sleep");
        assert_eq!(ended(&pm1, 4, &[0x34]), None);
        let exit = |power| Box::new(DebugExit(power)) as Box<dyn Handler>;
        assert_eq!(ended(&exit, 0, &[7]), Some(Outcome::Exit(7)));
        assert_eq!(ended(&exit, 0, &[]), None);
        assert!(is_reset(0xCF9, &[6]) && is_reset(0xCF9, &[0xE]));
        assert!(!is_reset(0xCF9, &[2]) && !is_reset(0xCF8, &[6]) && !is_reset(0xCF9, &[6, 0]));
    }

    #[test]
    fn acpi_is_always_on() {
        let pm1 = Pm1::new(Arc::new(Power::new()));
        let mut control = [0xFF; 2];
        pm1.read(4, &mut control);
        assert_eq!(u16::from_le_bytes(control), SCI_EN);
        pm1.write(2, &0x120u16.to_le_bytes());
        let mut event = [0xFF; 8];
        pm1.read(0, &mut event);
        assert_eq!(event, [0, 0, 0x20, 1, 1, 0, 0xFF, 0xFF], "and nothing beyond the registers");
    }

    #[test]
    fn the_clock_counts_as_calendars_do() {
        let day = |seconds| [CMOS_CENTURY, 9, 8, 7, 6].map(|index| register(index, seconds));
        assert_eq!(day(0), [0x19, 0x70, 1, 1, 5], "a Thursday");
        assert_eq!(day(951_782_400), [0x20, 0x00, 2, 0x29, 3], "a leap day at the end of a cycle");
        assert_eq!(day(4_107_542_400), [0x21, 0x00, 3, 1, 2], "and a century without one");
        let time = |seconds| [4, 2, 0].map(|index| register(index, seconds));
        assert_eq!(time(1_700_000_000), [0x22, 0x13, 0x20]);
        let _ = day(u64::MAX);
    }

    #[test]
    fn an_index_selects_a_register_whatever_the_width_of_the_access() {
        let cmos = Cmos::default();
        cmos.write(0, &[0x8D]);
        let mut data = [0; 2];
        cmos.read(1, &mut data);
        assert_eq!(data, [0x80; 2]);
        cmos.write(1, &[1]);
        cmos.read(0, &mut data);
    }
}

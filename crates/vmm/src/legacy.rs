//! The rest of a PC, as far as kernels insist on it: ways to end the machine and to say why, the clock in its CMOS
//! memory, and ports for guests that measure.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use virtio::memory::Area;
use virtio::{GuestAddr, Memory};

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

/// The panic device of QEMU's machines (docs/specs/pvpanic), on its port.
pub(crate) struct PanicPort(pub(crate) Arc<Power>);

/// The guest's kernel has panicked.
const PANICKED: u8 = 1 << 0;
/// The same, and a crash kernel of its own takes over.
const CRASH_LOADED: u8 = 1 << 1;

impl Handler for PanicPort {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(PANICKED | CRASH_LOADED);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let Some(&event) = data.first() else { return };
        if event & CRASH_LOADED != 0 {
            self.0.crashed();
        }
        if event & PANICKED != 0 {
            self.0.end(Outcome::Panicked);
        }
    }
}

/// The way to ask a guest for an end that has no ACPI: it says where a word of its memory is that becomes 1.
pub(crate) struct EndWord {
    memory: Arc<Memory>,
    state: Mutex<EndState>,
}

#[derive(Default)]
struct EndState {
    word: Option<Area>,
    is_asked: bool,
}

impl EndWord {
    pub(crate) fn new(memory: Arc<Memory>) -> Self {
        Self { memory, state: Mutex::default() }
    }

    /// Asks. False if the guest has not said where; it is told when it does.
    pub(crate) fn ask(&self) -> bool {
        let mut state = self.lock();
        state.is_asked = true;
        state.tell();
        state.word.is_some()
    }

    fn lock(&self) -> MutexGuard<'_, EndState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EndState {
    fn tell(&self) {
        if let (true, Some(word)) = (self.is_asked, &self.word) {
            word.u32(0).store(1, Ordering::Relaxed);
        }
    }
}

impl Handler for EndWord {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, Ok(address)) = (offset, <[u8; 4]>::try_from(data)) {
            let address = GuestAddr(u32::from_le_bytes(address).into());
            let mut state = self.lock();
            state.word = self.memory.area(address, size_of::<u32>(), align_of::<u32>()).ok();
            state.tell();
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
        let panic = |power| Box::new(PanicPort(power)) as Box<dyn Handler>;
        assert_eq!(ended(&panic, 0, &[PANICKED]), Some(Outcome::Panicked));
        assert_eq!(ended(&panic, 0, &[CRASH_LOADED]), None, "its crash kernel goes on");
        assert_eq!(ended(&panic, 0, &[0x80]), None);
        let exit = |power| Box::new(DebugExit(power)) as Box<dyn Handler>;
        assert_eq!(ended(&exit, 0, &[7]), Some(Outcome::Exit(7)));
        assert_eq!(ended(&exit, 0, &[]), None);
        assert!(is_reset(0xCF9, &[6]) && is_reset(0xCF9, &[0xE]));
        assert!(!is_reset(0xCF9, &[2]) && !is_reset(0xCF8, &[6]) && !is_reset(0xCF9, &[6, 0]));
    }

    #[test]
    fn a_guest_with_a_crash_kernel_has_panicked_however_that_ends_the_machine() {
        for (end, expected) in [
            (Outcome::Reset, Outcome::Panicked),
            (Outcome::PowerOff, Outcome::Panicked),
            (Outcome::Stopped, Outcome::Stopped),
            (Outcome::Exit(3), Outcome::Exit(3)),
        ] {
            let power = Arc::new(Power::new());
            let port = PanicPort(power.clone());
            let mut events = [0];
            port.read(0, &mut events);
            port.write(0, &[events[0] & CRASH_LOADED]);
            power.end(end);
            assert_eq!(power.outcome(), Some(expected));
        }
    }

    #[test]
    fn a_guest_is_asked_for_an_end_where_it_says_and_nowhere_else() {
        let ram = crate::memory::Ram::new(16 << 20, false).unwrap();
        let port = EndWord::new(ram.memory().clone());
        let word = |at: u64| ram.memory().area(GuestAddr(at), 4, 4).unwrap().u32(0).load(Ordering::Relaxed);
        for nowhere in [0xFFFF_FFFC_u32, 0x1001] {
            port.write(0, &nowhere.to_le_bytes());
            assert!(!port.ask());
        }
        port.write(0, &[0; 2]);
        port.write(2, &0x1000_u32.to_le_bytes());
        assert_eq!(word(0x1000), 0);
        port.write(0, &0x1000_u32.to_le_bytes());
        assert_eq!(word(0x1000), 1, "it was asked before");
        assert!(port.ask());
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

//! The local interrupt controller of each processor, through its registers in memory (Intel SDM volume 3, chapter 11).

use super::mmio::Window;
use super::paging::PagingError;

const BASE: u64 = 0xFEE0_0000;
const ID: usize = 0x20;
const SPURIOUS: usize = 0xF0;
const COMMAND: usize = 0x300;
const COMMAND_TARGET: usize = 0x310;
const TIMER: usize = 0x320;
const TIMER_INITIAL_COUNT: usize = 0x380;
const TIMER_DIVIDER: usize = 0x3E0;
const SOFTWARE_ENABLE: u32 = 0x100;
const INIT: u32 = 0x4500;
const STARTUP: u32 = 0x4600;
const PENDING: u32 = 1 << 12;
/// A message that is not on its way after so many looks will not be.
const PENDING_LOOKS_MAX: u32 = 10_000;
const TIMER_PERIODIC: u32 = 1 << 17;
const TIMER_MASKED: u32 = 1 << 16;
const TIMER_DIVIDE_BY_1: u32 = 0b1011;
/// A period of the timer: 20 ms where it counts nanoseconds, as hypervisors' do, at most a second where it counts a
/// crystal's 25 MHz. Nothing is measured by it.
const TIMER_COUNT: u32 = 20_000_000;

/// The vector of spurious interrupts.
pub(super) const SPURIOUS_VECTOR: u8 = 0xFF;
/// The vector of the timer. Its class is the lowest, so that of two interrupts a device's comes first.
pub(super) const TIMER_VECTOR: u8 = 0x20;

/// This processor's controller: the registers are at the same place for each.
#[derive(Clone, Copy)]
pub struct LocalApic {
    registers: Window,
}

impl LocalApic {
    /// The controller.
    ///
    /// # Errors
    /// None that can happen: it is in the first 4 GiB.
    pub fn new() -> Result<Self, PagingError> {
        Ok(Self { registers: Window::new(BASE, 0x1000)? })
    }

    /// The id that interrupts are addressed to.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.registers.read32(ID) >> 24
    }

    /// Lets it accept interrupts.
    pub fn enable(&self) {
        self.registers.write32(SPURIOUS, SOFTWARE_ENABLE | u32::from(SPURIOUS_VECTOR));
    }

    /// Interrupts this processor again and again.
    pub(super) fn start_timer(&self) {
        self.registers.write32(TIMER_DIVIDER, TIMER_DIVIDE_BY_1);
        self.registers.write32(TIMER, TIMER_PERIODIC | u32::from(TIMER_VECTOR));
        self.registers.write32(TIMER_INITIAL_COUNT, TIMER_COUNT);
    }

    /// Ends that.
    pub(super) fn stop_timer(&self) {
        self.registers.write32(TIMER, TIMER_MASKED | u32::from(TIMER_VECTOR));
        self.registers.write32(TIMER_INITIAL_COUNT, 0);
    }

    /// Resets another processor.
    pub(super) fn send_init(&self, id: u32) {
        self.send(id, INIT);
    }

    /// Starts another processor, after a reset, in real mode at a page below 1 MiB.
    pub(super) fn send_startup(&self, id: u32, page: u64) {
        self.send(id, STARTUP | (page >> 12) as u32);
    }

    fn send(&self, id: u32, command: u32) {
        // If it never gets away, the processor does not start, and that is reported.
        let pending = || self.registers.read32(COMMAND) & PENDING != 0;
        let _ = (0..PENDING_LOOKS_MAX).find(|_| !pending());
        self.registers.write32(COMMAND_TARGET, id << 24);
        self.registers.write32(COMMAND, command);
    }
}

/// Where a device writes, and what, to interrupt a processor.
#[must_use]
pub fn message(id: u32, vector: u8) -> (u64, u32) {
    (BASE | u64::from(id & 0xFF) << 12, vector.into())
}

//! Interrupts and faults: which stub answers which vector, and what the stubs leave behind.
//!
//! A queue interrupt is counted by its stub, and that is all that happens; whoever waits for it looks at the counter.
//! The timer's stub does not even count: the timer is there to end a sleep that nothing else ends ([`Listening`]).

use core::fmt;
use core::hint::spin_loop;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use virtio::memory::Area;
use virtio::{GuestAddr, Memory, MemoryError};

use super::apic::{LocalApic, SPURIOUS_VECTOR, TIMER_VECTOR};
use super::descriptors::{Caller, gate};
use super::paging::PagingError;
use super::{Image, service};

const FAULTS: usize = 32;
const FAULT_STRIDE: usize = 16;
/// Ring 3 asks for services by the instruction for breakpoints.
const BREAKPOINT: usize = 3;
const FIRST_QUEUE_VECTOR: usize = 0x30;
const QUEUE_STRIDE: usize = 32;
/// How many interrupts have a counter.
pub const INTERRUPTS_MAX: usize = 64;
const COUNTER_STRIDE: usize = 64;

/// Fills in the table of gates.
pub(super) fn init(memory: &Memory, image: &Image) -> Result<(), MemoryError> {
    let idt = memory.area(GuestAddr(image.idt as u64), 256 * 16, 8)?;
    let set = |vector: usize, stub: usize, caller| {
        for (i, word) in gate(stub, caller).into_iter().enumerate() {
            idt.u64(16 * vector + 8 * i).store(word, Ordering::Relaxed);
        }
    };
    (0..FAULTS).for_each(|i| set(i, image.fault_stubs + FAULT_STRIDE * i, Caller::Hardware));
    for i in 0..INTERRUPTS_MAX {
        set(FIRST_QUEUE_VECTOR + i, image.queue_stubs + QUEUE_STRIDE * i, Caller::Hardware);
    }
    set(TIMER_VECTOR.into(), image.timer_stub, Caller::Hardware);
    set(SPURIOUS_VECTOR.into(), image.spurious_stub, Caller::Hardware);
    set(BREAKPOINT, image.service, Caller::Program);
    Ok(())
}

/// While this lives, the processor that made it takes interrupts, and a timer's among them, some 50 a second: a sleep
/// that waits for an interrupt that was lost ends all the same, and costs nothing where it was not.
pub struct Listening(LocalApic);

impl Listening {
    /// From now on.
    ///
    /// # Errors
    /// See [`LocalApic::new`].
    pub fn start() -> Result<Self, PagingError> {
        let apic = LocalApic::new()?;
        apic.enable();
        apic.start_timer();
        service::enable_interrupts();
        Ok(Self(apic))
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.0.stop_timer();
    }
}

/// The counter of one interrupt.
pub struct Interrupt {
    counter: Area,
    vector: u8,
}

impl Interrupt {
    /// Interrupt `index`.
    ///
    /// # Errors
    /// There are [`INTERRUPTS_MAX`].
    pub(super) fn new(memory: &Memory, image: &Image, index: usize) -> Result<Self, MemoryError> {
        let at = GuestAddr((image.interrupts + COUNTER_STRIDE * index) as u64);
        if index >= INTERRUPTS_MAX {
            return Err(MemoryError::NotMapped { addr: at, len: COUNTER_STRIDE as u64 });
        }
        let vector = (FIRST_QUEUE_VECTOR + index) as u8;
        Ok(Self { counter: memory.area(at, 8, 8)?, vector })
    }

    /// The vector that a device must send.
    #[must_use]
    pub fn vector(&self) -> u8 {
        self.vector
    }

    /// How often it came.
    #[inline(always)]
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counter().load(Ordering::Acquire)
    }

    /// Sleeps until it comes, if it has not since `seen` was read; may return early, and does on a processor that is
    /// [`Listening`].
    #[inline(always)]
    pub fn wait(&self, seen: u64) {
        service::wait(self.counter(), seen);
    }

    #[inline(always)]
    fn counter(&self) -> &AtomicU64 {
        self.counter.u64(0)
    }
}

/// What the processor said about a fault.
pub struct Fault {
    vector: u64,
    error: u64,
    rip: u64,
    cr2: u64,
}

/// The fault that brought the program here; None after the first, which is reported by another processor or is the
/// report's own.
pub(super) fn fault(image: &Image) -> Option<Fault> {
    static FAULTED: AtomicBool = AtomicBool::new(false);
    if FAULTED.swap(true, Ordering::Relaxed) {
        return None;
    }
    let memory = super::physical::memory().ok()?;
    let record = memory.area(GuestAddr(image.fault_record as u64), 32, 8).ok()?;
    let word = |at| record.u64(at).load(Ordering::Relaxed);
    Some(Fault { vector: word(0), error: word(8), rip: word(16), cr2: word(24) })
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { vector, error, rip, cr2 } = self;
        write!(f, "fault {vector}: error code {error:#x}, rip {rip:#x}, cr2 {cr2:#x}")
    }
}

/// Waits for as long as another processor may need to report.
pub(super) fn let_others_report() {
    for _ in 0..100_000_000_u32 {
        spin_loop();
    }
}

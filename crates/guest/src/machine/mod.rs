//! The machine below the jobs: memory, processors, interrupts, time, the console.
//!
//! The bare-metal program (`src/image`) brings the machine to ring 3 and hands over an [`Image`], the addresses of what
//! its assembler code and this crate share. [`Machine::new`] does the rest.

pub mod acpi;
pub mod apic;
pub mod clock;
pub mod console;
mod descriptors;
pub mod heap;
pub mod interrupts;
pub mod mmio;
pub mod paging;
pub mod patience;
pub mod physical;
pub mod pvh;
pub mod service;
pub mod smp;
pub mod sync;

use alloc::string::String;
use core::ops::Range;
use core::sync::atomic::AtomicU64;

use virtio::{Memory, MemoryError};

use self::apic::LocalApic;
use self::clock::Clock;
use self::interrupts::Interrupt;
use self::paging::PagingError;
use self::physical::Tables;
use self::pvh::StartInfo;
use self::smp::{Processors, SmpError};

/// The heap ends here if RAM does not: devices' registers begin above.
const HEAP_END_MAX: u64 = 0xC000_0000;
/// Enough for what is read before the end of RAM is known.
const FIRST_HEAP_BYTES: usize = 64 << 10;
/// Interrupt masks of the two PICs.
const PIC_MASKS: [u16; 2] = [0x21, 0xA1];

/// Where in memory the image has what it shares with this crate, as `image/boot.s` and `image/stubs.s` lay it out.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "the names are those of the symbols")]
pub struct Image {
    pub page_map: usize,
    pub gdt: usize,
    pub tasks: usize,
    pub idt: usize,
    pub fault_stubs: usize,
    pub fault_record: usize,
    pub queue_stubs: usize,
    pub service: usize,
    pub spurious_stub: usize,
    pub timer_stub: usize,
    pub interrupts: usize,
    pub trampoline: Range<usize>,
    pub other: usize,
    pub end: usize,
}

/// Why the machine cannot be used.
#[derive(Clone, Copy, Debug, thiserror::Error)]
pub enum MachineError {
    /// The loader does not speak the boot protocol.
    #[error("no PVH start information at {0:#x}")]
    StartInfo(u64),
    /// The loader's map has no memory where it put us.
    #[error("the loader's memory map has no RAM above the image, which ends at {0:#x}")]
    NoRam(u64),
    /// The command line cannot be taken.
    #[error("the command line must be ASCII of at most {} bytes", pvh::COMMAND_LINE_BYTES_MAX)]
    CommandLine,
    /// Nothing says how fast time goes by.
    #[error("no clock to measure time by: neither the host's nor the second counter of a PIT")]
    Clock,
    /// Memory is not mapped.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Registers are not mapped.
    #[error(transparent)]
    Paging(#[from] PagingError),
    /// Processors cannot be used.
    #[error(transparent)]
    Smp(#[from] SmpError),
}

/// A machine that is ready for jobs.
pub struct Machine {
    /// All memory below 4 GiB.
    pub memory: Memory,
    /// Time.
    pub clock: Clock,
    /// The processors.
    pub processors: Processors,
    /// What the loader was asked to hand over.
    pub command_line: String,
    image: Image,
}

impl Machine {
    /// Takes over the machine, which a loader described at `start_info`.
    ///
    /// # Errors
    /// Something that every PC has is not there.
    pub fn new(image: Image, start_info: u64) -> Result<Self, MachineError> {
        heap::init(image.end, image.end + FIRST_HEAP_BYTES);
        let memory = physical::memory()?;
        paging::init(image.page_map);
        interrupts::init(&memory, &image)?;
        for port in PIC_MASKS {
            service::out8(port, 0xFF);
        }
        LocalApic::new()?.enable();
        service::offer_end();

        let tables = Tables::new(&memory)?;
        let info = StartInfo::new(&tables, start_info).ok_or(MachineError::StartInfo(start_info))?;
        let end = image.end as u64;
        let end_of_ram = info.end_of_ram(end).ok_or(MachineError::NoRam(end))?;
        let command_line = info.command_line().ok_or(MachineError::CommandLine)?;
        let ids = acpi::processors(&tables, info.root_pointer());
        heap::extend(end_of_ram.min(HEAP_END_MAX) as usize);

        let clock = Clock::new(&memory)?.ok_or(MachineError::Clock)?;
        let processors = Processors::new(image.clone(), clock, ids)?;
        Ok(Self { memory, clock, processors, command_line, image })
    }

    /// One of the interrupts that devices can be given.
    ///
    /// # Errors
    /// There are [`interrupts::INTERRUPTS_MAX`].
    pub fn interrupt(&self, index: usize) -> Result<Interrupt, MemoryError> {
        Interrupt::new(&self.memory, &self.image, index)
    }
}

/// What the program says at its end when something went wrong.
pub fn fail(reason: &dyn core::fmt::Display) -> ! {
    console::print(&crate::report::Failed(reason));
    console::exit(1)
}

/// What a fault leads to.
pub fn faulted(image: &Image) -> ! {
    match interrupts::fault(image) {
        Some(fault) => fail(&fault),
        None => {
            interrupts::let_others_report();
            console::exit(1)
        }
    }
}

/// Sleeps for good.
fn rest() -> ! {
    static NEVER: AtomicU64 = AtomicU64::new(0);
    loop {
        service::wait(&NEVER, 0);
    }
}

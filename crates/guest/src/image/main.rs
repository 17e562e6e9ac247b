//! The bare-metal program: the way from the loader, from a started processor and from a fault to the library.
//!
//! The assembler code is trusted to keep to its comments. Its symbols are asked for their addresses only, and it calls
//! the functions below with what the library or the loader gave it, each on a stack of its own.
#![no_std]
#![no_main]
#![allow(unsafe_code)]

mod bytes;

use core::arch::global_asm;
use core::panic::PanicInfo;

use exitless_guest::jobs::{self, JobError};
use exitless_guest::machine::heap::Heap;
use exitless_guest::machine::{self, Image, Machine, console, smp};

global_asm!(include_str!("boot.s"), options(raw));
global_asm!(include_str!("stubs.s"), options(raw));

#[global_allocator]
static HEAP: Heap = Heap;

// SAFETY: the assembler code and the linker script define all of these; nothing is read through them.
unsafe extern "C" {
    safe static page_map: u8;
    safe static gdt: u8;
    safe static tasks: u8;
    safe static idt: u8;
    safe static fault_stubs: u8;
    safe static fault_record: u8;
    safe static queue_stubs: u8;
    safe static service: u8;
    safe static spurious_stub: u8;
    safe static timer_stub: u8;
    safe static interrupts: u8;
    safe static trampoline: u8;
    safe static trampoline_end: u8;
    safe static other_task: u8;
    safe static image_end: u8;
}

fn image() -> Image {
    let at = |symbol: *const u8| symbol.expose_provenance();
    Image {
        page_map: at(&raw const page_map),
        gdt: at(&raw const gdt),
        tasks: at(&raw const tasks),
        idt: at(&raw const idt),
        fault_stubs: at(&raw const fault_stubs),
        fault_record: at(&raw const fault_record),
        queue_stubs: at(&raw const queue_stubs),
        service: at(&raw const service),
        spurious_stub: at(&raw const spurious_stub),
        timer_stub: at(&raw const timer_stub),
        interrupts: at(&raw const interrupts),
        trampoline: at(&raw const trampoline)..at(&raw const trampoline_end),
        other: at(&raw const other_task),
        end: at(&raw const image_end),
    }
}

/// The first processor, in ring 3.
// SAFETY: no other symbol has this name.
#[unsafe(no_mangle)]
extern "C" fn first_entry(start_info: u64) -> ! {
    let done =
        Machine::new(image(), start_info).map_err(JobError::from).and_then(|machine| jobs::run(&machine));
    match done {
        Ok(()) => console::exit(0),
        Err(error) => machine::fail(&error),
    }
}

/// Any other processor, in ring 3.
// SAFETY: no other symbol has this name.
#[unsafe(no_mangle)]
extern "C" fn other_entry(argument: usize) -> ! {
    // SAFETY: called once for each time a processor is started, with the argument left for it.
    unsafe { smp::enter(argument) }
}

/// Any processor after a fault, in ring 3.
// SAFETY: no other symbol has this name.
#[unsafe(no_mangle)]
extern "C" fn fault_entry() -> ! {
    machine::faulted(&image())
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    machine::fail(info)
}

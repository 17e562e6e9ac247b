//! What only ring 0 can do, asked of `image/stubs.s`, which says how and why so; and the few instructions that no safe
//! code has.
//!
//! The callers are the machine's only program, so ports and model-specific registers are theirs to use. What keeps
//! this sound: no device that they reach writes memory of ours but where a driver told it to, and each service changes
//! the registers and memory named here only.
#![allow(unsafe_code)]

use core::arch::asm;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// The services, in the order of the table in `image/stubs.s`.
#[derive(Clone, Copy)]
enum Number {
    Wait,
    EnableInterrupts,
    WriteMsr,
    Cpuid,
    Out8,
    Out32,
    In8,
    In32,
    OutBytes,
}

/// Asks for a service.
///
/// # Safety
/// What the service does with `a`, `b` and `c` must be sound.
#[inline(always)]
unsafe fn call(number: Number, a: u64, b: u64, c: u64) -> u64 {
    let result;
    // SAFETY: a service keeps all registers but these, and has a stack of its own.
    unsafe {
        asm!(
            "int3",
            inlateout("rax") number as u64 => result,
            inlateout("rdi") a => _,
            inlateout("rsi") b => _,
            inlateout("rdx") c => _,
            lateout("rcx") _,
            lateout("r8") _,
        );
    }
    result
}

/// Sleeps until the next interrupt, or not at all if `counter` is no longer `seen`. Interrupts are on or off afterwards
/// as they were before.
#[inline(always)]
pub fn wait(counter: &AtomicU64, seen: u64) {
    // SAFETY: the counter is read, while stubs of interrupts write it.
    unsafe { call(Number::Wait, counter.as_ptr().expose_provenance() as u64, seen, 0) };
}

/// Lets interrupts in on this processor from now on.
pub(super) fn enable_interrupts() {
    // SAFETY: the stubs of interrupts touch nothing but their counters and the interrupt controller.
    unsafe { call(Number::EnableInterrupts, 0, 0, 0) };
}

/// Writes a model-specific register.
///
/// # Safety
/// The register must not change how memory or instructions of this program work.
pub(super) unsafe fn write_msr(register: u32, value: u64) {
    // SAFETY: the caller vouches for the register.
    unsafe { call(Number::WriteMsr, register.into(), value, 0) };
}

/// What the processor says about itself to ring 0: `eax`, `ebx`, `ecx`, `edx`.
#[must_use]
pub fn cpuid(leaf: u32) -> [u32; 4] {
    let mut registers = [0_u32; 4];
    // SAFETY: four words are written, here.
    unsafe { call(Number::Cpuid, leaf.into(), registers.as_mut_ptr().expose_provenance() as u64, 0) };
    registers
}

/// Writes a byte to a port.
pub fn out8(port: u16, value: u8) {
    // SAFETY: see the header.
    unsafe { call(Number::Out8, value.into(), 0, port.into()) };
}

/// Writes 32 bits to a port.
pub fn out32(port: u16, value: u32) {
    // SAFETY: see the header.
    unsafe { call(Number::Out32, value.into(), 0, port.into()) };
}

/// Reads a byte from a port.
#[must_use]
pub fn in8(port: u16) -> u8 {
    // SAFETY: see the header.
    unsafe { call(Number::In8, 0, 0, port.into()) as u8 }
}

/// Reads 32 bits from a port.
#[must_use]
pub fn in32(port: u16) -> u32 {
    // SAFETY: see the header.
    unsafe { call(Number::In32, 0, 0, port.into()) as u32 }
}

/// Writes bytes to a port, which a hypervisor can take all at once.
pub fn out_bytes(port: u16, bytes: &[u8]) {
    // SAFETY: the bytes of the slice are read.
    unsafe {
        call(Number::OutBytes, bytes.len() as u64, bytes.as_ptr().expose_provenance() as u64, port.into())
    };
}

/// The port that takes the address of a word in which a monitor says that the machine is to end.
const END_WORD: u16 = 0x508;
/// Not 0 once the machine is to end.
static END: AtomicU32 = AtomicU32::new(0);

/// Tells the monitor where it can ask for an end: a word of memory costs those who look at it no exit.
pub(super) fn offer_end() {
    out32(END_WORD, END.as_ptr().expose_provenance() as u32);
}

/// Whether the monitor has asked for an end: what was begun is to be finished soon.
#[inline(always)]
#[must_use]
pub fn asked_to_end() -> bool {
    END.load(Ordering::Relaxed) != 0
}

/// Executes what is no instruction.
pub fn fault() -> ! {
    // SAFETY: nothing is executed after it.
    unsafe { asm!("ud2", options(noreturn)) }
}

/// The time stamp counter.
#[inline(always)]
#[must_use]
pub fn ticks() -> u64 {
    // SAFETY: every processor that runs in long mode has it, and ring 3 may read it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

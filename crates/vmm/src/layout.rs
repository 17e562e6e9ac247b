//! Where things are in the guest's physical address space and on its ports: an ordinary PC.
//!
//! RAM begins at 0 and leaves a hole below 4 GiB, where PCI and the interrupt controllers are.

use std::ops::Range;

/// Where RAM below 4 GiB ends, at most.
pub const HOLE_START: u64 = 0xC000_0000;
/// Where RAM goes on.
pub const HOLE_END: u64 = 1 << 32;
/// The least memory a guest can have: a kernel is loaded at 1 or 2 MiB.
pub const RAM_BYTES_MIN: u64 = 16 << 20;
/// The most: beyond it lies the 64-bit window of PCI.
pub const RAM_BYTES_MAX: u64 = 256 << 30;

/// 32-bit BARs.
pub const PCI_WINDOW_32: Range<u64> = 0xC000_0000..0xE000_0000;
/// PCI configuration space: one bus, 1 MiB.
pub const ECAM: Range<u64> = 0xE000_0000..0xE010_0000;
/// 64-bit BARs, above all RAM.
pub const PCI_WINDOW_64: Range<u64> = 0x80_0000_0000..0x80_4000_0000;
/// Three pages that KVM needs for itself on some processors, where nothing else is.
pub(crate) const TSS: u64 = 0xFFFB_D000;
/// The same, for the identity map that it needs beside.
pub(crate) const IDENTITY_MAP: u64 = 0xFFFB_C000;
/// The I/O APIC of the kernel's interrupt controllers.
pub(crate) const IO_APIC: u32 = 0xFEC0_0000;
/// The local APICs.
pub(crate) const LOCAL_APIC: u32 = 0xFEE0_0000;

/// A GDT with flat segments, for the boot protocols that want one.
pub(crate) const GDT: u64 = 0x500;
/// `hvm_start_info` of PVH.
pub(crate) const START_INFO: u64 = 0x6000;
/// The memory map of PVH, and its list of modules.
pub(crate) const MEMORY_MAP: u64 = 0x6100;
pub(crate) const MODULE_LIST: u64 = 0x6F00;
/// Linux' boot parameters, the "zero page".
pub(crate) const ZERO_PAGE: u64 = 0x7000;
/// Page tables for kernels that are entered in 64-bit mode: six pages.
pub(crate) const PAGE_TABLES: u64 = 0x9000;
/// The kernel's command line.
pub(crate) const COMMAND_LINE: u64 = 0x2_0000;
/// Bytes there, with the 0 at the end: as many as Linux takes (`COMMAND_LINE_SIZE`).
pub(crate) const COMMAND_LINE_BYTES: usize = 2048;
/// Where conventional memory ends: the extended BIOS data area of a PC.
pub(crate) const LOW_RAM_END: u64 = 0x9_FC00;
/// ACPI tables: the area where kernels look for them.
pub(crate) const ACPI: Range<u64> = 0xE_0000..0xF_FFF0;
/// Where a PC's processor begins in real mode. A kernel that wants the BIOS to reset the machine jumps here.
pub(crate) const RESET_VECTOR: u64 = 0xF_FFF0;
/// Where RAM begins in earnest, and kernels are loaded.
pub(crate) const HIGH_RAM: u64 = 0x10_0000;

/// Ports.
pub(crate) const COM1: Range<u64> = 0x3F8..0x400;
pub(crate) const CMOS: Range<u64> = 0x70..0x72;
pub(crate) const I8042: Range<u64> = 0x60..0x65;
/// ACPI's PM1 event block, 4 bytes, and control register, 2 bytes.
pub(crate) const PM1: Range<u64> = 0x600..0x606;
pub(crate) const DEBUG_EXIT: Range<u64> = 0x501..0x502;
pub(crate) const MARKS: Range<u64> = 0x502..0x503;
pub(crate) const PANIC: Range<u64> = 0x505..0x506;
pub(crate) const END_WORD: Range<u64> = 0x508..0x50C;
/// PCI configuration mechanism #1, with the reset register in its midst.
pub(crate) const PCI_PORTS: Range<u64> = 0xCF8..0xD00;
pub(crate) const RESET_PORT: u16 = 0xCF9;

/// Interrupt lines.
pub(crate) const COM1_IRQ: u32 = 4;
pub(crate) const SCI_IRQ: u16 = 9;

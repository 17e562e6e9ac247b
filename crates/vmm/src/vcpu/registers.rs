//! What a virtual CPU is and what is in it when it starts.

use kvm_bindings::{CpuId, Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use crate::Error;
use crate::layout;

/// Where and how the first virtual CPU starts. The others wait for its start-up message, as on any PC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// Protected mode without paging, `ebx` points to `hvm_start_info` (the PVH protocol).
    Pvh {
        /// Where execution begins.
        at: u64,
    },
    /// 64-bit mode on identity-mapped pages, `rsi` points to the zero page (Linux' 64-bit boot protocol).
    Linux {
        /// Where execution begins.
        at: u64,
    },
}

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Segment types: code that may be read, data that may be written, a TSS in use; all accessed.
const CODE: u8 = 0xB;
const DATA: u8 = 0x3;
const TSS_BUSY: u8 = 0xB;
/// Linux' boot selectors, `__BOOT_CS`, `__BOOT_DS` and `__BOOT_TSS`.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;

/// The GDT that those selectors refer to: flat segments, code in 64-bit mode.
pub(crate) const GDT: [u64; 5] = [0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x0000_8B00_0000_0067];

/// Prepares virtual CPU `index` of `count`.
pub(crate) fn prepare(
    fd: &VcpuFd,
    index: usize,
    count: usize,
    cpuid: &CpuId,
    tsc_deadline: bool,
    entry: Entry,
) -> Result<(), Error> {
    let kvm = |what: &str| {
        let what = format!("set {what} of virtual CPU {index}");
        move |error: kvm_ioctls::Error| Error::kvm(what, error)
    };
    fd.set_cpuid2(&describe(cpuid, index, count, tsc_deadline)).map_err(kvm("the description"))?;
    fd.set_msrs(&msrs()?).map_err(kvm("the model-specific registers"))?;
    fd.set_fpu(&kvm_fpu { fcw: 0x37F, mxcsr: 0x1F80, ..kvm_fpu::default() })
        .map_err(kvm("the floating-point unit"))?;
    wire_local_apic(fd, index)?;
    if index > 0 {
        return Ok(());
    }
    let mut sregs = fd.get_sregs().map_err(kvm("the segments"))?;
    let mut regs = kvm_regs { rflags: 2, ..kvm_regs::default() };
    let long = matches!(entry, Entry::Linux { .. });
    sregs.cs = segment(CODE_SELECTOR, CODE, long);
    let data = segment(DATA_SELECTOR, DATA, false);
    (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
    sregs.tr =
        kvm_segment { limit: 0x67, type_: TSS_BUSY, s: 0, g: 0, db: 0, ..segment(TSS_SELECTOR, 0, false) };
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = (size_of_val(&GDT) - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_NE;
    match entry {
        Entry::Pvh { at } => {
            regs.rip = at;
            regs.rbx = layout::START_INFO;
        }
        Entry::Linux { at } => {
            regs.rip = at;
            regs.rsi = layout::ZERO_PAGE;
            sregs.cr3 = layout::PAGE_TABLES;
            sregs.cr4 |= CR4_PAE;
            sregs.cr0 |= CR0_PG;
            sregs.efer |= EFER_LME | EFER_LMA;
        }
    }
    fd.set_sregs(&sregs).map_err(kvm("the segments"))?;
    fd.set_regs(&regs).map_err(kvm("the registers"))
}

/// A flat segment of 4 GiB.
fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xFFFF_FFFF,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// The processor as this virtual CPU sees it: what KVM supports, and who it is among the others.
fn describe(supported: &CpuId, index: usize, count: usize, tsc_deadline: bool) -> CpuId {
    const TSC_DEADLINE: u32 = 1 << 24;
    const X2APIC: u32 = 1 << 21;
    const HYPERVISOR: u32 = 1 << 31;
    let (index, count) = (index as u32, count as u32);
    // Threads of one package, one per core: the shift that leaves the package's number, 0.
    let package_shift = count.next_power_of_two().trailing_zeros();
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        match (entry.function, entry.index) {
            (0x1, _) => {
                entry.ebx = entry.ebx & 0xFF00 | index << 24 | count.min(255) << 16;
                entry.ecx |= X2APIC | HYPERVISOR;
                if tsc_deadline {
                    entry.ecx |= TSC_DEADLINE;
                }
            }
            // Extended topology: threads of a core, cores of the package, nothing above.
            (0xB | 0x1F, 0) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 1, 1 << 8, index),
            (0xB | 0x1F, 1) => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (package_shift, count, 2 << 8 | 1, index);
            }
            (0xB | 0x1F, level) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, level, index),
            // AMD's count of cores and the bits that number them, and its APIC ID.
            (0x8000_0008, _) => entry.ecx = entry.ecx & !0xF0FF | package_shift << 12 | (count - 1),
            (0x8000_001E, _) => (entry.eax, entry.ebx, entry.ecx) = (index, index, 0),
            _ => {}
        }
    }
    cpuid
}

/// What firmware leaves in the model-specific registers.
fn msrs() -> Result<Msrs, Error> {
    const MISC_ENABLE: u32 = 0x1A0;
    const FAST_STRINGS: u64 = 1;
    const MTRR_DEF_TYPE: u32 = 0x2FF;
    // Enabled, everything write-back; the host decides about the rest.
    const WRITE_BACK: u64 = 1 << 11 | 6;
    let entry = |index, data| kvm_msr_entry { index, data, ..kvm_msr_entry::default() };
    Msrs::from_entries(&[entry(MISC_ENABLE, FAST_STRINGS), entry(MTRR_DEF_TYPE, WRITE_BACK)])
        .map_err(|error| Error::system("list registers", std::io::Error::other(format!("{error:?}"))))
}

/// The wires of a PC into the local APIC: the old interrupt controller and the NMI.
fn wire_local_apic(fd: &VcpuFd, index: usize) -> Result<(), Error> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const EXT_INT: u32 = 7 << 8;
    const NMI: u32 = 4 << 8;
    const MASKED: u32 = 1 << 16;
    let kvm = |error| Error::kvm(format!("wire the local APIC of virtual CPU {index}"), error);
    let mut apic = fd.get_lapic().map_err(kvm)?;
    let ext_int = if index == 0 { EXT_INT } else { EXT_INT | MASKED };
    for (register, value) in [(LVT_LINT0, ext_int), (LVT_LINT1, NMI)] {
        for (to, from) in apic.regs[register..register + 4].iter_mut().zip(value.to_le_bytes()) {
            *to = from as i8;
        }
    }
    fd.set_lapic(&apic).map_err(kvm)
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_cpuid_entry2;

    use super::*;

    #[test]
    fn each_virtual_cpu_knows_its_number_and_how_many_there_are() {
        let leaf = |function, index| kvm_cpuid_entry2 { function, index, ..kvm_cpuid_entry2::default() };
        let supported = CpuId::from_entries(&[leaf(1, 0), leaf(0xB, 0), leaf(0xB, 1), leaf(0xB, 2)]).unwrap();
        for (index, count, shift) in [(0, 1, 0), (1, 2, 1), (2, 3, 2), (4, 5, 3)] {
            let cpuid = describe(&supported, index, count, true);
            let leaves = cpuid.as_slice();
            assert_eq!(leaves[0].ebx, (index << 24 | count << 16) as u32);
            assert_eq!((leaves[2].eax, leaves[2].ebx), (shift, count as u32));
            assert!(leaves[1..].iter().all(|leaf| leaf.edx == index as u32));
            assert_eq!(leaves[3].ecx >> 8, 0, "no level above the package");
        }
    }
}

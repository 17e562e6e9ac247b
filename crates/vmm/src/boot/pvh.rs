//! ELF kernels with a PVH note (xen/include/public/arch-x86/hvm/start_info.h).

use std::io::{Read, Seek};

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use vm_memory::{GuestAddress, GuestMemoryMmap, ReadVolatile};

use super::{Boot, Loaded, initrd, memory_map};
use crate::Error;
use crate::layout;
use crate::memory::Ram;
use crate::vcpu::Entry;

/// `XEN_HVM_START_MAGIC_VALUE`.
const MAGIC: u32 = 0x336E_C578;
/// With a memory map.
const VERSION: u32 = 1;

pub(super) fn load<F: Read + ReadVolatile + Seek>(
    boot: &Boot<'_>,
    ram: &Ram,
    memory: &GuestMemoryMmap,
    image: &mut F,
    name: &str,
) -> Result<Loaded, Error> {
    let failed = |reason: String| Error::Kernel { kernel: name.to_owned(), reason };
    let kernel = Elf::load(memory, None, image, Some(GuestAddress(layout::HIGH_RAM)))
        .map_err(|error| failed(error.to_string()))?;
    let PvhBootCapability::PvhEntryPresent(entry) = kernel.pvh_boot_cap else {
        return Err(failed("it is an ELF file without a PVH entry (Linux: CONFIG_PVH)".to_owned()));
    };
    let map: Vec<_> = memory_map(ram.ranges())
        .into_iter()
        .map(|(range, kind)| hvm_memmap_table_entry {
            addr: range.start,
            size: range.end - range.start,
            type_: kind as u32,
            reserved: 0,
        })
        .collect();
    let mut info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        cmdline_paddr: layout::COMMAND_LINE,
        rsdp_paddr: layout::ACPI.start,
        memmap_paddr: layout::MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..hvm_start_info::default()
    };
    let initrd = initrd(boot, ram, memory, kernel.kernel_end, layout::HOLE_START)?;
    let module = initrd.map(|initrd| {
        info.nr_modules = 1;
        info.modlist_paddr = layout::MODULE_LIST;
        hvm_modlist_entry {
            paddr: initrd.start,
            size: initrd.end - initrd.start,
            ..hvm_modlist_entry::default()
        }
    });
    let mut params = BootParams::new(&info, GuestAddress(layout::START_INFO));
    params.set_sections(&map, GuestAddress(layout::MEMORY_MAP));
    if let Some(module) = module {
        params.set_modules(&[module], GuestAddress(layout::MODULE_LIST));
    }
    PvhBootConfigurator::write_bootparams(&params, memory).map_err(|error| failed(error.to_string()))?;
    Ok(Loaded { entry: Entry::Pvh { at: entry.0 } })
}

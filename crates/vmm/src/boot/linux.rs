//! Linux' own image, bzImage (Documentation/arch/x86/boot.rst, "64-bit boot protocol").

use std::io::{Read, Seek, SeekFrom};

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::bzimage::BzImage;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, ReadVolatile};

use super::{Boot, Loaded, initrd, memory_map};
use crate::Error;
use crate::layout;
use crate::memory::Ram;
use crate::vcpu::Entry;

/// The first version with a 64-bit entry.
const VERSION_MIN: u16 = 0x20C;
/// `XLF_KERNEL_64`.
const HAS_64_BIT_ENTRY: u16 = 1 << 0;
/// Where that is in the loaded image.
const ENTRY_OFFSET: u64 = 0x200;
/// A boot loader without a number of its own.
const LOADER_OTHER: u8 = 0xFF;
/// What page tables map for the kernel's first steps.
const MAPPED_BYTES: u64 = 4 << 30;

pub(super) fn load<F: Read + ReadVolatile + Seek>(
    boot: &Boot<'_>,
    ram: &Ram,
    memory: &GuestMemoryMmap,
    image: &mut F,
    name: &str,
) -> Result<Loaded, Error> {
    let failed = |reason: String| Error::Kernel { kernel: name.to_owned(), reason };
    let kernel =
        BzImage::load(memory, None, image, Some(GuestAddress(layout::HIGH_RAM))).map_err(|error| {
            failed(format!("it is neither ELF nor bzImage, or does not fit into memory ({error})"))
        })?;
    let mut header = kernel.setup_header.ok_or_else(|| failed("it has no header".to_owned()))?;
    if header.version < VERSION_MIN || header.xloadflags & HAS_64_BIT_ENTRY == 0 {
        return Err(failed("it has no 64-bit entry (it must be Linux 3.8 or later, for x86-64)".to_owned()));
    }
    let has = image.seek(SeekFrom::End(0)).map_err(|error| failed(error.to_string()))?;
    let needs = image_bytes(&header);
    if has < needs {
        return Err(failed(format!("it has been cut short: of {needs} bytes, there are {has}")));
    }
    // The kernel unpacks itself upwards from where it was loaded, and says how much room that takes.
    let kernel_end =
        kernel.kernel_load.0 + u64::from(header.init_size).max(kernel.kernel_end - kernel.kernel_load.0);
    let end_max = u64::from(header.initrd_addr_max).saturating_add(1);
    if let Some(initrd) = initrd(boot, ram, memory, kernel_end, end_max)? {
        header.ramdisk_image = initrd.start as u32;
        header.ramdisk_size = (initrd.end - initrd.start) as u32;
    }
    header.type_of_loader = LOADER_OTHER;
    header.cmd_line_ptr = layout::COMMAND_LINE as u32;
    header.cmdline_size = boot.command_line.len() as u32;
    let mut params =
        boot_params { hdr: header, acpi_rsdp_addr: layout::ACPI.start, ..boot_params::default() };
    for (to, (range, kind)) in params.e820_table.iter_mut().zip(memory_map(ram.ranges())) {
        *to = boot_e820_entry { addr: range.start, size: range.end - range.start, r#type: kind as u32 };
        params.e820_entries += 1;
    }
    LinuxBootConfigurator::write_bootparams(
        &BootParams::new(&params, GuestAddress(layout::ZERO_PAGE)),
        memory,
    )
    .map_err(|error| failed(error.to_string()))?;
    let tables = page_tables();
    memory
        .write_slice(&tables, GuestAddress(layout::PAGE_TABLES))
        .map_err(|error| failed(format!("its page tables cannot be written ({error})")))?;
    Ok(Loaded { entry: Entry::Linux { at: kernel.kernel_load.0 + ENTRY_OFFSET } })
}

/// How long an image with this header is, at least: a signature may follow.
fn image_bytes(header: &setup_header) -> u64 {
    const SECTOR_BYTES: u64 = 512;
    const PARAGRAPH_BYTES: u64 = 16;
    /// What 0 means, for the sake of ancient kernels.
    const SETUP_SECTORS_DEFAULT: u64 = 4;
    let setup = match header.setup_sects {
        0 => SETUP_SECTORS_DEFAULT,
        sectors => sectors.into(),
    };
    // The setup code comes after the boot sector, the kernel after that.
    (1 + setup) * SECTOR_BYTES + u64::from(header.syssize) * PARAGRAPH_BYTES
}

/// Tables that map the lowest 4 GiB to themselves, in pages of 2 MiB: not every host has larger ones.
fn page_tables() -> Vec<u8> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    const ENTRIES: u64 = 512;
    const TABLE_BYTES: u64 = 4096;
    const PAGE_BYTES: u64 = 2 << 20;
    let table = |number: u64| layout::PAGE_TABLES + number * TABLE_BYTES;
    let pages = MAPPED_BYTES / PAGE_BYTES;
    let pad = |entries: u64| std::iter::repeat_n(0, (ENTRIES - entries) as usize);
    // The root, the table of directories, and the directories.
    let directories = pages / ENTRIES;
    let root = std::iter::once(table(1) | PRESENT_WRITABLE).chain(pad(1));
    let middle = (0..directories).map(|number| table(2 + number) | PRESENT_WRITABLE).chain(pad(directories));
    let leaves = (0..pages).map(|page| (page * PAGE_BYTES) | PRESENT_WRITABLE | LARGE);
    root.chain(middle).chain(leaves).flat_map(u64::to_le_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_tables_map_every_address_to_itself() {
        let bytes = page_tables();
        let entry = |table: u64, index: u64| {
            let at = (table - layout::PAGE_TABLES + index * 8) as usize;
            u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
        };
        let walk = |address: u64| {
            let mut table = layout::PAGE_TABLES;
            for shift in [39, 30] {
                table = entry(table, address >> shift & 511) & !0xFFF;
            }
            entry(table, address >> 21 & 511) & !0x1F_FFFF | address & 0x1F_FFFF
        };
        for address in [0, 0x1234, 0x20_0000, 0x3FFF_FFFF, 0x4000_0000, MAPPED_BYTES - 1] {
            assert_eq!(walk(address), address);
        }
        assert!(layout::PAGE_TABLES + bytes.len() as u64 <= layout::COMMAND_LINE);
    }
}

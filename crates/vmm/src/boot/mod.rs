//! What firmware and boot loader do: put a kernel into memory, and what it asks for beside it.
//!
//! Two kinds of kernels: ELF files with a PVH note, which are entered in 32-bit mode and told where
//! `hvm_start_info` is, and Linux' bzImage, which is entered in 64-bit mode and told where the zero page is.

pub(crate) mod acpi;
mod linux;
mod pvh;

use std::fs::File;
use std::io::{Cursor, Read, Seek};
use std::ops::Range;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, ReadVolatile};

use crate::Error;
use crate::layout;
use crate::memory::Ram;
use crate::vcpu::Entry;

/// All there is of a BIOS: code that resets the machine by the keyboard controller. It is the same in 16 and in 32 bits.
const RESET: [u8; 7] = [
    0xB0, 0xFE, // mov al, 0xFE
    0xE6, 0x64, // out 0x64, al
    0xF4, 0xEB, 0xFD, // hlt; jmp to hlt
];

/// A kernel.
#[derive(Clone, Debug)]
pub enum Kernel {
    /// In this program: an ELF file with a PVH note.
    Embedded(&'static [u8]),
    /// A file: ELF with a PVH note (`vmlinux`), or bzImage (`vmlinuz`).
    Path(PathBuf),
}

/// What is to be booted.
pub(crate) struct Boot<'a> {
    pub(crate) kernel: &'a Kernel,
    pub(crate) initrd: Option<&'a Path>,
    pub(crate) command_line: &'a str,
    pub(crate) cpus: usize,
}

/// What a loader did.
struct Loaded {
    entry: Entry,
}

/// Loads everything into `ram`, and says where the first virtual CPU begins.
pub(crate) fn load(boot: &Boot<'_>, ram: &Ram) -> Result<Entry, Error> {
    let memory = ram.for_loaders()?;
    let bytes = boot.command_line.len();
    if bytes >= layout::COMMAND_LINE_BYTES || boot.command_line.contains('\0') {
        return Err(Error::CommandLine { bytes, max: layout::COMMAND_LINE_BYTES - 1 });
    }
    let write = |what: &str, bytes: &[u8], at: u64| {
        let failed = |error: vm_memory::GuestMemoryError| {
            Error::system(what, std::io::Error::other(error.to_string()))
        };
        memory.write_slice(bytes, GuestAddress(at)).map_err(failed)
    };
    write("write the command line", format!("{}\0", boot.command_line).as_bytes(), layout::COMMAND_LINE)?;
    write("write the GDT", crate::vcpu::GDT.map(u64::to_le_bytes).as_flattened(), layout::GDT)?;
    let tables = acpi::tables(boot.cpus);
    write("write the ACPI tables", &tables, layout::ACPI.start)?;
    write("write the reset vector", &RESET, layout::RESET_VECTOR)?;

    let loaded = match boot.kernel {
        Kernel::Embedded(image) => kernel(boot, ram, &memory, &mut Cursor::new(*image), "the embedded guest"),
        Kernel::Path(path) => {
            let name = path.display().to_string();
            let mut file = File::open(path)
                .map_err(|error| Error::Kernel { kernel: name.clone(), reason: error.to_string() })?;
            kernel(boot, ram, &memory, &mut file, &name)
        }
    };
    Ok(loaded?.entry)
}

fn kernel<F: Read + ReadVolatile + Seek>(
    boot: &Boot<'_>,
    ram: &Ram,
    memory: &GuestMemoryMmap,
    image: &mut F,
    name: &str,
) -> Result<Loaded, Error> {
    const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
    let failed = |reason: String| Error::Kernel { kernel: name.to_owned(), reason };
    let mut magic = [0; 4];
    image.read_exact(&mut magic).and_then(|()| image.rewind()).map_err(|error| failed(error.to_string()))?;
    if magic == ELF_MAGIC {
        pvh::load(boot, ram, memory, image, name)
    } else {
        linux::load(boot, ram, memory, image, name)
    }
}

/// The initrd in memory: below `end_max`, as high as it goes, above the kernel that ends at `kernel_end`.
fn initrd(
    boot: &Boot<'_>,
    ram: &Ram,
    memory: &GuestMemoryMmap,
    kernel_end: u64,
    end_max: u64,
) -> Result<Option<Range<u64>>, Error> {
    let Some(path) = boot.initrd else { return Ok(None) };
    let failed = |reason: String| Error::Initrd { path: path.to_owned(), reason };
    let mut file = File::open(path).map_err(|error| failed(error.to_string()))?;
    let bytes = file.metadata().map_err(|error| failed(error.to_string()))?.len();
    let range = place(bytes, kernel_end, end_max.min(ram.ranges()[0].end)).ok_or_else(|| {
        failed(format!(
            "its {bytes} bytes do not fit between the kernel, which ends at {kernel_end:#x}, and the end of \
                        the memory that it may be in"
        ))
    })?;
    memory
        .read_exact_volatile_from(GuestAddress(range.start), &mut file, bytes as usize)
        .map_err(|error| failed(error.to_string()))?;
    Ok(Some(range))
}

/// Where `bytes` go: on a page, ending at or below `end_max`.
fn place(bytes: u64, start_min: u64, end_max: u64) -> Option<Range<u64>> {
    const PAGE_BYTES: u64 = 4096;
    let start = end_max.checked_sub(bytes)? & !(PAGE_BYTES - 1);
    (bytes > 0 && start >= start_min).then(|| start..start + bytes)
}

/// What an entry of the memory map is; PVH and Linux number them alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Ram = 1,
    Reserved = 2,
}

/// The memory map of a machine with RAM at `ram`.
fn memory_map(ram: &[Range<u64>]) -> Vec<(Range<u64>, Kind)> {
    let mut map =
        vec![(0..layout::LOW_RAM_END, Kind::Ram), (layout::LOW_RAM_END..layout::HIGH_RAM, Kind::Reserved)];
    map.extend(ram.iter().map(|range| (range.start.max(layout::HIGH_RAM)..range.end, Kind::Ram)));
    map.push((layout::ECAM, Kind::Reserved));
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_initrd_lies_as_high_as_it_may_on_a_page() {
        assert_eq!(place(10, 0, 0x10_0000), Some(0xF_F000..0xF_F00A));
        assert_eq!(place(0x1000, 0xF_F000, 0x10_0000), Some(0xF_F000..0x10_0000));
        assert_eq!(place(0x1001, 0xF_F000, 0x10_0000), None);
        assert_eq!(place(u64::MAX, 0, 0x10_0000), None);
        assert_eq!(place(0, 0, 0x10_0000), None, "an empty file is none");
    }

    #[test]
    fn the_memory_map_is_in_order_and_does_not_overlap() {
        let ram = [0..layout::HOLE_START, layout::HOLE_END..layout::HOLE_END + (1 << 30)];
        let mut map = memory_map(&ram);
        map.sort_by_key(|(range, _)| range.start);
        assert!(map.windows(2).all(|pair| pair[0].0.end <= pair[1].0.start));
        assert!(map.iter().all(|(range, _)| range.start < range.end));
    }
}

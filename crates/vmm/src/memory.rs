//! The guest's RAM: one piece of shared memory, in one or two regions around the hole below 4 GiB.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create,
};
use virtio::memory::{Backing, Mapping};
use virtio::{GuestAddr, Memory, Region};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use crate::Error;
use crate::kvm::Vm;
use crate::layout::{HOLE_END, HOLE_START, RAM_BYTES_MAX, RAM_BYTES_MIN};
use crate::raw::Slot;

const PAGE_BYTES: u64 = 4 << 10;
const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// RAM.
pub(crate) struct Ram {
    file: File,
    /// Guest addresses; the file holds them one after the other.
    ranges: Vec<Range<u64>>,
    memory: Arc<Memory>,
    /// What keeps it in the machine's memory map.
    slots: Vec<Slot>,
}

impl Ram {
    /// `bytes` of memory, in pages of 2 MiB if `huge`.
    pub(crate) fn new(bytes: u64, huge: bool) -> Result<Self, Error> {
        let unit = if huge { HUGE_PAGE_BYTES } else { PAGE_BYTES };
        if !(RAM_BYTES_MIN..=RAM_BYTES_MAX).contains(&bytes) || !bytes.is_multiple_of(unit) {
            return Err(Error::MemorySize { bytes, unit });
        }
        let refused = |reason: String| Error::Memory { bytes, huge, reason };
        let file = file(bytes, huge).map_err(|errno| refused(errno.to_string()))?;
        let ranges = ranges(bytes);
        let mut offset = 0;
        let mut regions = Vec::new();
        for range in &ranges {
            let len = range.end - range.start;
            let mapping = Mapping::new(&file, offset, len).map_err(|error| refused(error.to_string()))?;
            let region = Region::new(GuestAddr(range.start), Arc::new(mapping));
            regions.push(region.map_err(|error| refused(error.to_string()))?);
            offset += len;
        }
        let memory = Memory::new(regions).map_err(|error| refused(error.to_string()))?;
        Ok(Self { file, ranges, memory: Arc::new(memory), slots: Vec::new() })
    }

    /// Shows it to the guest.
    pub(crate) fn attach(&mut self, vm: &Vm) -> Result<(), Error> {
        for region in self.memory.regions() {
            let mut slot = vm.slot()?;
            slot.show(region.start(), region.backing().clone()).map_err(|error| {
                Error::kvm(format!("show {} bytes at {} to the guest", region.len(), region.start()), error)
            })?;
            self.slots.push(slot);
        }
        Ok(())
    }

    /// As devices see it.
    pub(crate) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// As loaders see it: mapped once more, for as long as the value lives.
    pub(crate) fn for_loaders(&self) -> Result<GuestMemoryMmap, Error> {
        let mut offset = 0;
        let mut pieces = Vec::new();
        for range in &self.ranges {
            let len = range.end - range.start;
            let file = self.file.try_clone().map_err(|error| Error::system("share guest memory", error))?;
            pieces.push((GuestAddress(range.start), len as usize, Some(FileOffset::new(file, offset))));
            offset += len;
        }
        GuestMemoryMmap::from_ranges_with_files(pieces)
            .map_err(|error| Error::system("map guest memory", std::io::Error::other(error.to_string())))
    }

    /// Where it is.
    pub(crate) fn ranges(&self) -> &[Range<u64>] {
        &self.ranges
    }
}

fn file(bytes: u64, huge: bool) -> rustix::io::Result<File> {
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    if huge {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    }
    let fd = memfd_create("guest-memory", flags)?;
    ftruncate(&fd, bytes)?;
    if huge {
        // All at once: a huge page that is missing when the guest touches it could only end the guest.
        fallocate(&fd, FallocateFlags::empty(), 0, bytes)?;
    }
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(fd.into())
}

/// Guest addresses of `bytes` of RAM.
fn ranges(bytes: u64) -> Vec<Range<u64>> {
    let low = bytes.min(HOLE_START);
    let all = [0..low, HOLE_END..HOLE_END + (bytes - low)];
    all.into_iter().filter(|range| !range.is_empty()).collect()
}

/// One page of shared memory beside RAM.
pub(crate) fn page(name: &str) -> Result<Arc<dyn Backing>, virtio::memory::MappingError> {
    let (mapping, _) = Mapping::anonymous(name, PAGE_BYTES)?;
    Ok(Arc::new(mapping))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_a_hole_below_4_gib() {
        let first = |bytes| ranges(bytes)[0].clone();
        assert_eq!((ranges(1 << 30).len(), first(1 << 30)), (1, 0..1 << 30));
        assert_eq!((ranges(HOLE_START).len(), first(HOLE_START)), (1, 0..HOLE_START));
        assert_eq!(ranges(4 << 30), [0..HOLE_START, HOLE_END..HOLE_END + (1 << 30)]);
    }

    #[test]
    fn sizes_that_cannot_be_are_refused_with_what_is_allowed() {
        for bytes in [0, RAM_BYTES_MIN - PAGE_BYTES, RAM_BYTES_MIN + 1, RAM_BYTES_MAX + PAGE_BYTES, u64::MAX]
        {
            let error = Ram::new(bytes, false).err().unwrap();
            assert!(matches!(error, Error::MemorySize { .. }), "{error}");
        }
        let error = Ram::new(RAM_BYTES_MIN + PAGE_BYTES, true).err().unwrap();
        assert!(error.to_string().contains("2097152"), "{error}");
    }

    #[test]
    fn huge_pages_are_there_from_the_start_or_refused() {
        match Ram::new(RAM_BYTES_MIN, true) {
            Ok(ram) => assert_eq!(ram.ranges()[0], 0..RAM_BYTES_MIN),
            Err(error) => assert!(error.to_string().contains("nr_hugepages"), "{error}"),
        }
    }

    #[test]
    fn devices_and_loaders_see_the_same_memory() {
        use vm_memory::Bytes;
        let ram = Ram::new(HOLE_START + RAM_BYTES_MIN, false).unwrap();
        let mapped = ram.for_loaders().unwrap();
        for addr in [0x1000, HOLE_START - 8, HOLE_END] {
            mapped.write_obj(addr ^ 0x55, GuestAddress(addr)).unwrap();
            let area = ram.memory().area(GuestAddr(addr), 8, 8).unwrap();
            assert_eq!(area.u64(0).load(std::sync::atomic::Ordering::Relaxed), addr ^ 0x55);
        }
        assert!(ram.memory().area(GuestAddr(HOLE_START), 8, 8).is_err());
    }
}

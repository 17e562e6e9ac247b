//! The guest's memory: one region of shared memory, handed out from the bottom.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::VhostUserMemoryRegionInfo;
use virtio::memory::{Area, Backing, Mapping, Translator};
use virtio::{GuestAddr, Memory, Region, Segment};

use crate::peer::GuestPages;

/// Guest-physical address of the first byte. Not 0, which a server might take for a missing address.
const START: u64 = 0x10_0000;
const HUGE_PAGE_BYTES: u64 = 2 << 20;
const CACHE_LINE_BYTES: u64 = 64;

pub(crate) struct Guest {
    memory: Arc<Memory>,
    file: File,
    /// Address in this process of the first byte.
    user: u64,
    bytes: u64,
    next: u64,
}

impl Guest {
    /// `bytes` of memory, all of it present.
    pub(crate) fn new(bytes: u64, pages: GuestPages) -> Result<Self> {
        let bytes = bytes.next_multiple_of(HUGE_PAGE_BYTES);
        let (mapping, file) = match pages {
            GuestPages::Plain => {
                Mapping::anonymous("bench-guest", bytes).context("no memory for the guest")?
            }
            GuestPages::Huge => {
                huge(bytes).context("no huge pages for the guest (see /proc/sys/vm/nr_hugepages)")?
            }
        };
        let user = mapping.base().as_ptr().addr() as u64;
        let region = Region::new(GuestAddr(START), Arc::new(mapping)).context("the guest's memory")?;
        let memory = Arc::new(Memory::new(vec![region]).context("the guest's memory")?);
        let guest = Self { memory, file, user, bytes, next: START };
        // Present before anything is measured: a page fault costs more than most requests.
        let all = guest.area(GuestAddr(START), bytes)?;
        (0..bytes as usize).step_by(4096).for_each(|at| all.u8(at).store(0, Ordering::Relaxed));
        Ok(guest)
    }

    pub(crate) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Sets `bytes` aside at a multiple of `align`, a power of two.
    ///
    /// # Panics
    /// The memory is used up: whoever made the guest summed up wrongly.
    pub(crate) fn alloc(&mut self, bytes: u64, align: u64) -> GuestAddr {
        let at = self.next.next_multiple_of(align.max(CACHE_LINE_BYTES));
        self.next = at + bytes;
        assert!(self.next <= START + self.bytes, "the guest has too little memory");
        GuestAddr(at)
    }

    pub(crate) fn area(&self, addr: GuestAddr, bytes: u64) -> Result<Area> {
        Ok(self.memory.area(addr, bytes as usize, 1)?)
    }

    /// A buffer's bytes. The caller keeps `self` for as long as it uses them.
    pub(crate) fn segment(&self, addr: GuestAddr, bytes: u32) -> Result<Segment> {
        let mut found = None;
        Translator::new(self.memory.clone()).translate(addr, bytes, |segment| found = Some(segment))?;
        found.context("an empty piece of guest memory")
    }

    /// Where `addr` is in this process, which is how the protocol names ring addresses.
    pub(crate) fn user_addr(&self, addr: GuestAddr) -> u64 {
        self.user + (addr.0 - START)
    }

    /// What the server is told.
    pub(crate) fn region(&self) -> VhostUserMemoryRegionInfo {
        use std::os::fd::AsRawFd;
        VhostUserMemoryRegionInfo {
            guest_phys_addr: START,
            memory_size: self.bytes,
            userspace_addr: self.user,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }
}

fn huge(bytes: u64) -> Result<(Mapping, File)> {
    let fd = memfd_create("bench-guest", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)?;
    ftruncate(&fd, bytes)?;
    rustix::fs::fallocate(&fd, rustix::fs::FallocateFlags::empty(), 0, bytes)?;
    Ok((Mapping::new(&fd, 0, bytes)?, fd.into()))
}

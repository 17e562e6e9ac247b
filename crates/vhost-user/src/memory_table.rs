//! The guest's memory as the front end describes it: where each region is in the guest, in the front end's process,
//! and in a file.
//!
//! Buffers are named by guest address, rings by the address they have in the front end's process ("user address").

use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio::memory::{Mapping, MappingError, Quota, REGIONS_MAX};
use virtio::{GuestAddr, Memory, MemoryError, Region};

use crate::request::RegionInfo;

/// Regions begin at multiples of this in the guest, in bytes: a page. Each region that a buffer lies in makes another piece
/// of it, and like this no buffer has more pieces than pages.
const REGION_ALIGN: u64 = 4096;

/// Why a change of the memory table was refused. The table is as it was.
#[derive(Debug, thiserror::Error)]
pub enum MemoryTableError {
    /// A region that begins within a page.
    #[error("memory region at guest address {guest:#x}: it must begin at a multiple of {REGION_ALIGN}")]
    Unaligned {
        /// Where the region was to be.
        guest: u64,
    },
    /// The file cannot be mapped.
    #[error("memory region at guest address {guest:#x}: {source}")]
    Mapping {
        /// Where the region was to be.
        guest: u64,
        /// Why not.
        source: MappingError,
    },
    /// The regions do not make a map.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// There is no such region to remove.
    #[error("no memory region of {len} bytes at guest address {guest:#x}, user address {user:#x}")]
    NoSuchRegion {
        /// Guest address asked for.
        guest: u64,
        /// User address asked for.
        user: u64,
        /// Size asked for, in bytes.
        len: u64,
    },
}

#[derive(Clone)]
struct Entry {
    info: RegionInfo,
    region: Region,
}

/// The memory table of a session. Every change makes a new [`Memory`]; queues hold on to the one they started with.
pub(crate) struct MemoryTable {
    /// The device's share of the mappings in this process.
    quota: Quota,
    entries: Vec<Entry>,
    memory: Arc<Memory>,
}

impl MemoryTable {
    /// The most regions, to be told to the front end.
    pub(crate) const SLOTS_MAX: u64 = REGIONS_MAX as u64;

    /// The map as it is now.
    pub(crate) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// A table of no regions.
    pub(crate) fn new(quota: Quota) -> Self {
        Self { quota, entries: Vec::new(), memory: Arc::default() }
    }

    /// A table of these regions instead.
    pub(crate) fn replaced(&self, regions: Vec<(RegionInfo, OwnedFd)>) -> Result<Self, MemoryTableError> {
        self.of(regions.into_iter().map(|(info, fd)| self.map(info, &fd)).collect::<Result<_, _>>()?)
    }

    /// The table with one more region.
    pub(crate) fn with(&self, info: RegionInfo, fd: &OwnedFd) -> Result<Self, MemoryTableError> {
        // Before it is mapped: the number of mappings is limited too.
        if self.entries.len() >= REGIONS_MAX {
            return Err(MemoryError::TooManyRegions(self.entries.len() + 1).into());
        }
        let mut entries = self.entries.clone();
        entries.push(self.map(info, fd)?);
        self.of(entries)
    }

    /// The table without a region, which is named by its addresses and size.
    pub(crate) fn without(&self, info: RegionInfo) -> Result<Self, MemoryTableError> {
        let RegionInfo { guest, len, user, .. } = info;
        let same = |e: &Entry| (e.info.guest, e.info.len, e.info.user) == (guest, len, user);
        let at = self.entries.iter().position(same);
        let mut entries = self.entries.clone();
        entries.remove(at.ok_or(MemoryTableError::NoSuchRegion { guest, user, len })?);
        self.of(entries)
    }

    /// The guest address of a user address. Where the front end has two regions at the same user address, either
    /// names the same memory.
    pub(crate) fn guest_addr(&self, user: u64) -> Option<GuestAddr> {
        self.entries.iter().find_map(|Entry { info, .. }| {
            let offset = user.checked_sub(info.user).filter(|&offset| offset < info.len)?;
            Some(GuestAddr(info.guest + offset))
        })
    }

    fn of(&self, entries: Vec<Entry>) -> Result<Self, MemoryTableError> {
        let memory = Arc::new(Memory::new(entries.iter().map(|e| e.region.clone()).collect())?);
        Ok(Self { quota: self.quota.clone(), entries, memory })
    }

    fn map(&self, info: RegionInfo, fd: &OwnedFd) -> Result<Entry, MemoryTableError> {
        if !info.guest.is_multiple_of(REGION_ALIGN) {
            return Err(MemoryTableError::Unaligned { guest: info.guest });
        }
        let mapping = Mapping::within(&self.quota, fd, info.offset, info.len)
            .map_err(|source| MemoryTableError::Mapping { guest: info.guest, source })?;
        Ok(Entry { info, region: Region::new(GuestAddr(info.guest), Arc::new(mapping))? })
    }
}

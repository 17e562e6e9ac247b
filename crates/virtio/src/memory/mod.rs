//! Guest memory: the map from guest-physical addresses to this process.
//!
//! A [`Memory`] is an immutable snapshot of the map. Adding or removing a region makes a new snapshot; a queue keeps
//! the one it was started with alive until its last request is done, so nothing is unmapped under an operation.
//!
//! Guest memory is reached in two ways only: [`Area`], bounds-checked atomic words for the rings, and [`Segment`],
//! a piece of a buffer that bytes are copied to and from (or that the kernel is pointed at).

mod area;
mod backing;
#[cfg(feature = "crash-points")]
mod crash;
#[cfg(feature = "std")]
mod dirty;
#[cfg(feature = "std")]
mod lease;
#[cfg(feature = "std")]
mod mapping;
#[cfg(feature = "std")]
mod origin;
#[cfg(feature = "std")]
mod quota;
mod segment;
#[cfg(feature = "std")]
mod sigbus;
mod translate;

use alloc::{boxed::Box, sync::Arc, vec::Vec};
use core::fmt;

pub use area::{Area, Entries};
pub use backing::Backing;
#[cfg(feature = "crash-points")]
pub use crash::crash_at;
#[cfg(feature = "std")]
pub use dirty::{DirtyLog, LOG_PAGE_BYTES};
#[cfg(feature = "std")]
pub use lease::Lease;
#[cfg(feature = "std")]
pub use mapping::{Mapping, MappingError};
#[cfg(feature = "std")]
pub use quota::{MAPPED_BYTES_PER_DEVICE_MAX, MAPPINGS_PER_DEVICE_MAX, Quota};
pub use segment::{Segment, gather, scatter, total_len};
pub use translate::Translator;

/// The most regions one guest may have: the limit of vhost in the kernel (`max_mem_regions`), which every front end
/// is built for.
pub const REGIONS_MAX: usize = 509;

/// A guest-physical address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct GuestAddr(pub u64);

impl fmt::Display for GuestAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// One range of guest-physical addresses and the host memory behind it.
#[derive(Clone)]
pub struct Region {
    start: u64,
    backing: Arc<dyn Backing>,
}

impl Region {
    /// Places all of `backing` at guest-physical `start`.
    ///
    /// # Errors
    /// The range is empty or leaves the 64-bit address space.
    pub fn new(start: GuestAddr, backing: Arc<dyn Backing>) -> Result<Self, MemoryError> {
        let len = backing.len() as u64;
        if len == 0 || start.0.checked_add(len).is_none() {
            return Err(MemoryError::BadRange { start, len });
        }
        Ok(Self { start: start.0, backing })
    }

    /// The first guest-physical address.
    #[must_use]
    pub fn start(&self) -> GuestAddr {
        GuestAddr(self.start)
    }

    /// Bytes in the region.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.backing.len() as u64
    }

    /// Never true: an empty region is refused by [`Region::new`].
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The host memory behind the region.
    #[must_use]
    pub fn backing(&self) -> &Arc<dyn Backing> {
        &self.backing
    }

    fn end(&self) -> u64 {
        self.start + self.len()
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end())
    }
}

/// Why a memory map or an address in it was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// A region is empty or wraps around the address space.
    #[error("memory region at {start} of {len} bytes: it must be non-empty and end below 2^64")]
    BadRange {
        /// Where it starts.
        start: GuestAddr,
        /// Its length in bytes.
        len: u64,
    },
    /// Two regions share addresses.
    #[error("memory regions at {first} and {second} overlap")]
    Overlap {
        /// The lower one.
        first: GuestAddr,
        /// The higher one.
        second: GuestAddr,
    },
    /// More than [`REGIONS_MAX`].
    #[error("{0} memory regions: at most {REGIONS_MAX} are supported")]
    TooManyRegions(usize),
    /// No region holds the whole range.
    #[error("guest memory {addr} of {len} bytes is not mapped")]
    NotMapped {
        /// Where the range starts.
        addr: GuestAddr,
        /// Its length in bytes.
        len: u64,
    },
    /// The range must start at a multiple of `align`.
    #[error("guest address {addr} is not aligned to {align} bytes")]
    Unaligned {
        /// The address.
        addr: GuestAddr,
        /// The alignment asked for, in bytes.
        align: usize,
    },
}

/// An immutable snapshot of a guest's memory map: disjoint regions, sorted by address.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    regions: Box<[Region]>,
    /// The regions' indices in ascending order of their address in this process.
    by_host: Box<[u16]>,
    #[cfg(feature = "std")]
    lease: Option<Lease>,
}

impl Memory {
    /// Makes a map of `regions`, given in any order.
    ///
    /// # Errors
    /// Two regions overlap, or there are more than [`REGIONS_MAX`].
    pub fn new(mut regions: Vec<Region>) -> Result<Self, MemoryError> {
        if regions.len() > REGIONS_MAX {
            return Err(MemoryError::TooManyRegions(regions.len()));
        }
        regions.sort_by_key(|r| r.start);
        for pair in regions.windows(2) {
            if pair[0].end() > pair[1].start {
                return Err(MemoryError::Overlap { first: pair[0].start(), second: pair[1].start() });
            }
        }
        let mut by_host: Box<[u16]> = (0..regions.len() as u16).collect();
        by_host.sort_by_key(|&index| regions[usize::from(index)].backing.base());
        Ok(Self {
            regions: regions.into_boxed_slice(),
            by_host,
            #[cfg(feature = "std")]
            lease: None,
        })
    }

    /// The regions, in ascending order of address.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The same map, to be worked on under `lease`.
    #[cfg(feature = "std")]
    #[must_use]
    pub fn leased(&self, lease: Lease) -> Self {
        Self { lease: Some(lease), ..self.clone() }
    }

    /// Under what the memory is worked on. Whoever has the kernel work on it asynchronously must have the kernel keep
    /// the descriptor, too, for as long.
    #[cfg(feature = "std")]
    #[must_use]
    pub fn lease(&self) -> Option<&Lease> {
        self.lease.as_ref()
    }

    /// Whether memory behind any region has been taken away by the process that shares it.
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        self.regions.iter().any(|r| r.backing.is_poisoned())
    }

    /// How often memory has been taken away from any map of this process: while the number stands still,
    /// [`Memory::is_poisoned`] need not be asked again. Who reads a number finds poisoned what it counts.
    #[cfg(feature = "std")]
    #[inline(always)]
    #[must_use]
    pub fn poisonings() -> usize {
        sigbus::POISONINGS.load(core::sync::atomic::Ordering::Acquire)
    }

    /// A window of `len` bytes at `addr` for ring structures. It must lie in one region.
    ///
    /// # Errors
    /// The range is not mapped in one piece, or `addr` is not a multiple of `align`.
    pub fn area(&self, addr: GuestAddr, len: usize, align: usize) -> Result<Area, MemoryError> {
        let not_mapped = MemoryError::NotMapped { addr, len: len as u64 };
        let region = self.find(addr.0).ok_or(not_mapped)?;
        let offset = (addr.0 - region.start) as usize;
        let end = offset.checked_add(len).ok_or(not_mapped)?;
        if end > region.backing.len() {
            return Err(not_mapped);
        }
        Area::new(region.backing.clone(), offset, len, align).ok_or(MemoryError::Unaligned { addr, align })
    }

    /// The guest-physical address of a byte that is mapped at `host` in this process.
    #[must_use]
    pub fn guest_addr(&self, host: *const u8) -> Option<GuestAddr> {
        let region = |index: &u16| &self.regions[usize::from(*index)];
        let base = |index: &u16| region(index).backing.base().as_ptr().addr();
        let after = self.by_host.partition_point(|index| base(index) <= host.addr());
        let index = &self.by_host[after.checked_sub(1)?];
        let offset = (host.addr() - base(index)) as u64;
        (offset < region(index).len()).then(|| GuestAddr(region(index).start + offset))
    }

    /// The region that holds `addr`.
    fn find(&self, addr: u64) -> Option<&Region> {
        let after = self.regions.partition_point(|r| r.start <= addr);
        let region = &self.regions[after.checked_sub(1)?];
        (addr < region.end()).then_some(region)
    }
}

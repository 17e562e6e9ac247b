//! Descriptors, in the one layout and two readings of the two ring formats.

use core::sync::atomic::Ordering;

use crate::memory::{Area, GuestAddr};

use super::layout::{DESC_BYTES, Descriptors};

/// The chain continues (at `next` in a split ring, at the following descriptor in a packed one).
pub(crate) const NEXT: u16 = 1;
/// The device writes this buffer; without the flag it reads it.
pub(crate) const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub(crate) const INDIRECT: u16 = 4;
/// Packed: equals the driver's wrap counter when the descriptor is available.
pub(crate) const AVAIL: u16 = 1 << 7;
/// Packed: equals the device's wrap counter when the descriptor is used.
pub(crate) const USED: u16 = 1 << 15;

/// A copy of one descriptor. The last two fields are `flags, next` in a split ring and `id, flags` in a packed one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest-physical address of the buffer.
    pub addr: GuestAddr,
    /// Its length in bytes.
    pub len: u32,
    /// Bytes 12 and 13.
    pub(crate) third: u16,
    /// Bytes 14 and 15.
    pub(crate) fourth: u16,
}

impl Descriptor {
    #[inline(always)]
    pub(crate) fn from_words(low: u64, high: u64) -> Self {
        Self {
            addr: GuestAddr(low),
            len: high as u32,
            third: (high >> 32) as u16,
            fourth: (high >> 48) as u16,
        }
    }

    /// The two words as they stand in memory.
    #[inline(always)]
    pub(crate) fn to_words(self) -> (u64, u64) {
        let high = u64::from(self.len) | u64::from(self.third) << 32 | u64::from(self.fourth) << 48;
        (self.addr.0, high)
    }

    /// Reads descriptor `index` of a table.
    #[inline(always)]
    pub(crate) fn load(table: Descriptors<'_>, index: impl Into<usize>) -> Self {
        let index = index.into();
        Self::from_words(
            table.u64(index, 0).load(Ordering::Relaxed),
            table.u64(index, 8).load(Ordering::Relaxed),
        )
    }

    /// Writes descriptor `index` of a table.
    #[inline(always)]
    pub(crate) fn store(self, table: &Area, index: u16) {
        let at = usize::from(index) * DESC_BYTES;
        let (low, high) = self.to_words();
        table.u64(at).store(low, Ordering::Relaxed);
        table.u64(at + 8).store(high, Ordering::Relaxed);
    }
}

/// A buffer as the driver end offers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical address.
    pub addr: GuestAddr,
    /// Length in bytes.
    pub len: u32,
    /// The device writes it; otherwise it reads it.
    pub writable: bool,
}

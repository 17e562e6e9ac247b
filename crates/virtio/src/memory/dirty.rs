//! The log of guest pages that the device wrote, read by a front end that migrates the guest.
//!
//! One bit per 4 KiB page, set with an atomic OR in memory shared with the front end, which clears bits at the same
//! time (vhost-user specification, "Migration"). A bit is set only after the bytes are written: set before, the front
//! end could collect the bit, copy the old page and miss the write.

use alloc::sync::Arc;
use core::sync::atomic::{Ordering, fence};

use super::{Area, Backing, GuestAddr, Memory, MemoryError, Segment};

/// Bytes of guest memory behind one bit of the log (`VHOST_LOG_PAGE`).
pub const LOG_PAGE_BYTES: u64 = 4096;

/// A dirty log shared with the front end.
#[derive(Clone)]
pub struct DirtyLog {
    bits: Arc<Area>,
}

impl DirtyLog {
    /// A log in the `len` bytes at `offset` of `backing`.
    ///
    /// # Errors
    /// The range leaves the mapping or is not aligned to 8 bytes.
    pub fn new(backing: Arc<dyn Backing>, offset: usize, len: usize) -> Result<Self, MemoryError> {
        let bad = MemoryError::NotMapped { addr: GuestAddr(offset as u64), len: len as u64 };
        Ok(Self { bits: Arc::new(Area::new(backing, offset, len & !7, 8).ok_or(bad)?) })
    }

    /// Whether the log has a bit for every page of `memory`.
    #[must_use]
    pub fn covers(&self, memory: &Memory) -> bool {
        let end = memory.regions().last().map_or(0, |r| r.start().0 + r.len());
        end.div_ceil(LOG_PAGE_BYTES) <= self.bits.len() as u64 * 8
    }

    /// Marks the pages of `len` bytes at `addr` as written. Addresses beyond the log are ignored: the front end, which
    /// sized it, does not track them.
    pub fn mark(&self, addr: GuestAddr, len: u64) {
        if len == 0 {
            return;
        }
        // The data were stored before; the front end that sees the bit must see them.
        fence(Ordering::Release);
        let last = addr.0.saturating_add(len - 1) / LOG_PAGE_BYTES;
        for page in addr.0 / LOG_PAGE_BYTES..=last {
            let word = (page / 64) as usize * 8;
            if word >= self.bits.len() {
                return;
            }
            self.bits.u64(word).fetch_or(1 << (page % 64), Ordering::SeqCst);
        }
    }

    /// Marks the pages of a translated segment.
    pub fn mark_segment(&self, memory: &Memory, segment: &Segment) {
        if let Some(addr) = memory.guest_addr(segment.as_ptr()) {
            self.mark(addr, segment.len() as u64);
        }
    }
}

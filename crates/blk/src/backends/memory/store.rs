//! The bytes of a disk in memory.
//!
//! Several I/O threads reach them at once, and guests may make those accesses overlap; what is read then is a mixture,
//! as on any disk. So no reference to the bytes exists, they are copied with raw pointers, and each copy is checked
//! against what is mapped.
//!
//! The address range is reserved for good when the disk is made, larger than the disk, so that it can grow in place
//! under requests in flight. Shrinking gives pages back but leaves them accessible: a request that was checked against
//! the old size does no harm.
#![allow(unsafe_code)]

use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags, madvise, mmap_anonymous, mprotect, munmap};

use super::copy::Copier;
use crate::backend::BackendError;
use crate::data::{Piece, Pieces};

const PAGE_BYTES: u64 = 4096;
/// The most bytes given back to the system in one go, which takes as long as copying a few hundred kilobytes. A huge
/// page: less would split it.
const FREE_BYTES_MAX: u64 = 2 << 20;
/// The least address space reserved for a disk, so that small ones can grow.
const RESERVED_BYTES_MIN: u64 = 64 << 30;
/// The most: a quarter of what a process has.
const RESERVED_BYTES_MAX: u64 = 1 << 45;
/// How often its first size a disk may grow to.
const GROWTH_MAX: u64 = 4;

/// The bytes, and the room that they may grow to.
#[derive(Debug)]
pub(super) struct Store {
    base: NonNull<u8>,
    reserved: u64,
    /// Bytes from the start that are readable and writable. Never shrinks.
    accessible: AtomicU64,
    huge: bool,
    copier: Copier,
}

// SAFETY: the mapping belongs to no thread; its bytes are reached by raw copies only, see the module header.
unsafe impl Send for Store {}
// SAFETY: as for Send.
unsafe impl Sync for Store {}

impl Store {
    pub(super) fn new(bytes: u64, huge: bool) -> Result<Self, BackendError> {
        let reserved = bytes.saturating_mul(GROWTH_MAX).clamp(RESERVED_BYTES_MIN, RESERVED_BYTES_MAX);
        let failed = |error| BackendError(format!("reserving {reserved} bytes of address space: {error}"));
        let len = usize::try_from(reserved).map_err(|_| failed(rustix::io::Errno::NOMEM))?;
        // SAFETY: a new mapping at an address of the kernel's choice affects no existing memory.
        let base = unsafe {
            mmap_anonymous(ptr::null_mut(), len, ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::NORESERVE)
        };
        let base =
            NonNull::new(base.map_err(failed)?.cast()).expect("mmap without MAP_FIXED never returns 0");
        let store = Self { base, reserved, accessible: AtomicU64::new(0), huge, copier: Copier::new() };
        store.resize(0, bytes)?;
        Ok(store)
    }

    /// Makes `bytes` accessible; gives back what lies beyond, of the `before` bytes there were.
    pub(super) fn resize(&self, before: u64, bytes: u64) -> Result<(), BackendError> {
        if bytes > self.reserved {
            let max = self.reserved;
            return Err(BackendError(format!(
                "growing the disk in memory to {bytes} bytes: it can have up to {max}"
            )));
        }
        let end = bytes.next_multiple_of(PAGE_BYTES);
        if end > self.accessible.load(Ordering::Acquire) {
            let failed =
                |error| BackendError(format!("growing the disk in memory to {bytes} bytes: {error}"));
            // SAFETY: `end` is at most `reserved`, so the range is ours; it gains access rights, nothing else changes.
            unsafe {
                mprotect(self.base.as_ptr().cast(), end as usize, MprotectFlags::READ | MprotectFlags::WRITE)
                    .map_err(failed)?;
                let advice = if self.huge { Advice::LinuxHugepage } else { Advice::LinuxNoHugepage };
                // Without support for huge pages ordinary ones do.
                let _ = madvise(self.base.as_ptr().cast(), end as usize, advice);
            }
            self.accessible.store(end, Ordering::Release);
        }
        if bytes < before {
            self.zero(bytes, before - bytes).map_err(|e| BackendError(format!("shrinking the disk: {e}")))?;
        }
        Ok(())
    }

    /// Whether the range may be touched.
    #[inline(always)]
    fn holds(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.accessible.load(Ordering::Relaxed))
    }

    /// Copies to `pieces` from `offset` on, and asks for what is at `ahead`; returns the bytes copied, fewer than asked
    /// where the disk ends.
    #[inline(always)]
    pub(super) fn read(&self, offset: u64, pieces: Pieces<'_>, ahead: u64) -> u64 {
        let mut copied = 0;
        for Piece { ptr, len } in pieces {
            if !self.holds(offset + copied, len as u64) {
                break;
            }
            // SAFETY: the source was just checked to be mapped; the piece is guest memory, mapped while its chain is
            // in flight. The two mappings are distinct. Bytes may change during the copy; nothing is derived from them.
            unsafe {
                self.copier.copy(self.at(offset + copied), ptr, len, self.at(ahead.wrapping_add(copied)))
            };
            copied += len as u64;
        }
        copied
    }

    /// Copies from `pieces` to `offset` on, and asks for what is at `ahead`; returns the bytes copied, fewer than asked
    /// where the disk ends.
    #[inline(always)]
    pub(super) fn write(&self, offset: u64, pieces: Pieces<'_>, ahead: u64) -> u64 {
        let mut copied = 0;
        for Piece { ptr, len } in pieces {
            if !self.holds(offset + copied, len as u64) {
                break;
            }
            // SAFETY: as in `read`, with source and destination exchanged.
            unsafe {
                self.copier.copy(ptr, self.at(offset + copied), len, self.at(ahead.wrapping_add(copied)))
            };
            copied += len as u64;
        }
        copied
    }

    /// How much of a range to make zeros before others are to have their turn.
    pub(super) fn zeroed_at_once(&self, offset: u64, len: u64) -> u64 {
        len.min(FREE_BYTES_MAX - self.at(offset).addr() as u64 % FREE_BYTES_MAX)
    }

    /// Makes the range zeros, giving back the pages that it covers.
    pub(super) fn zero(&self, offset: u64, len: u64) -> rustix::io::Result<()> {
        if !self.holds(offset, len) {
            return Err(rustix::io::Errno::INVAL);
        }
        let end = offset + len;
        let (first, last) = (offset.next_multiple_of(PAGE_BYTES), end - end % PAGE_BYTES);
        if first >= last {
            // SAFETY: the range was checked to be mapped.
            unsafe { self.at(offset).write_bytes(0, len as usize) };
            return Ok(());
        }
        // SAFETY: head, whole pages and tail all lie in the range that was checked. Private anonymous pages that are
        // given back read as zeros again.
        unsafe {
            self.at(offset).write_bytes(0, (first - offset) as usize);
            self.at(last).write_bytes(0, (end - last) as usize);
            madvise(self.at(first).cast(), (last - first) as usize, Advice::LinuxDontNeed)
        }
    }

    #[inline(always)]
    fn at(&self, offset: u64) -> *mut u8 {
        self.base.as_ptr().wrapping_add(offset as usize)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length; channels keep the store alive, so no copy is under way.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.reserved as usize) };
    }
}

//! Bounds-checked words of shared memory.
//!
//! Rings live in memory that a hostile party writes at the same time. All access goes through the atomic types,
//! for which concurrent writes are defined, and every offset is checked, so the rings above are safe code and no
//! index of theirs, right or wrong, can leave the area.
#![allow(unsafe_code)]

use alloc::sync::Arc;
use core::marker::PhantomData;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};

use super::Backing;

/// A window into shared memory, which it keeps mapped.
pub struct Area {
    base: NonNull<u8>,
    len: usize,
    _backing: Arc<dyn Backing>,
}

// SAFETY: the memory is reached through atomics only and stays mapped while `_backing` lives.
unsafe impl Send for Area {}
// SAFETY: as for Send.
unsafe impl Sync for Area {}

macro_rules! word {
    ($(#[$doc:meta])* $name:ident, $atomic:ty, $size:literal) => {
        $(#[$doc])*
        ///
        /// # Panics
        /// The word leaves the area or is not aligned to its size: a mistake of the caller, never of the guest.
        #[inline(always)]
        #[must_use]
        pub fn $name(&self, offset: usize) -> &$atomic {
            let ptr = self.word(offset, $size);
            // SAFETY: `word` checked bounds and alignment; the memory lives as long as `self`, and all
            // access to it in this process is atomic or goes through `Segment`'s raw copies.
            unsafe { <$atomic>::from_ptr(ptr.cast()) }
        }
    };
}

impl Area {
    /// The `len` bytes at `offset` of `backing`; None if they leave it or do not start at a multiple of `align`.
    #[must_use]
    pub fn new(backing: Arc<dyn Backing>, offset: usize, len: usize, align: usize) -> Option<Self> {
        if offset.checked_add(len)? > backing.len() {
            return None;
        }
        // SAFETY: the offset was just checked to lie within the mapped length.
        let base = unsafe { backing.base().add(offset) };
        base.as_ptr().addr().is_multiple_of(align).then_some(Self { base, len, _backing: backing })
    }

    /// Bytes in the area.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the area has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    word!(
        /// The byte at `offset`.
        u8, AtomicU8, 1
    );
    word!(
        /// The 16-bit word at byte `offset`.
        u16, AtomicU16, 2
    );
    word!(
        /// The 32-bit word at byte `offset`.
        u32, AtomicU32, 4
    );
    word!(
        /// The 64-bit word at byte `offset`.
        u64, AtomicU64, 8
    );

    /// Asks for the cache line of `offset` ahead of its use. An offset outside the area is ignored.
    #[inline(always)]
    pub fn prefetch(&self, offset: usize) {
        if offset < self.len {
            prefetch(self.base.as_ptr().wrapping_add(offset));
        }
    }

    /// The same for a line that is going to be written.
    #[inline(always)]
    pub fn prefetch_for_write(&self, offset: usize) {
        if offset < self.len {
            prefetch_for_write(self.base.as_ptr().wrapping_add(offset));
        }
    }

    /// `count` entries of `BYTES` bytes from byte `offset` on.
    ///
    /// # Panics
    /// They leave the area or do not start at a multiple of `ALIGN`: a mistake of the caller, never of the guest.
    #[inline(always)]
    #[must_use]
    pub fn entries<const BYTES: usize, const ALIGN: usize>(
        &self,
        offset: usize,
        count: u16,
    ) -> Entries<'_, BYTES, ALIGN> {
        let base = self.base.as_ptr().wrapping_add(offset);
        let count = usize::from(count);
        assert!(
            offset <= self.len && count * BYTES <= self.len - offset && base.addr().is_multiple_of(ALIGN)
        );
        Entries { base, count, area: PhantomData }
    }

    #[inline(always)]
    fn word(&self, offset: usize, size: usize) -> *mut u8 {
        #[cfg(feature = "crash-points")]
        super::crash::point();
        let ptr = self.base.as_ptr().wrapping_add(offset);
        assert!(offset < self.len && self.len - offset >= size && ptr.addr() & (size - 1) == 0);
        ptr
    }
}

/// Equal entries, one after the other, in an [`Area`], which was asked for them once: all that is left to check at each word
/// is the entry's index.
#[derive(Clone, Copy)]
pub struct Entries<'a, const BYTES: usize, const ALIGN: usize> {
    base: *mut u8,
    count: usize,
    area: PhantomData<&'a Area>,
}

macro_rules! entry_word {
    ($(#[$doc:meta])* $name:ident, $atomic:ty) => {
        $(#[$doc])*
        ///
        /// # Panics
        /// There is no such entry: a mistake of the caller, never of the guest.
        #[inline(always)]
        #[must_use]
        pub fn $name(self, index: impl Into<usize>, at: usize) -> &'a $atomic {
            let ptr = self.word(index.into(), at, size_of::<$atomic>());
            // SAFETY: `word` checked bounds and alignment; the memory lives as long as the area, and all access to it in
            // this process is atomic or goes through `Segment`'s raw copies.
            unsafe { <$atomic>::from_ptr(ptr.cast()) }
        }
    };
}

impl<'a, const BYTES: usize, const ALIGN: usize> Entries<'a, BYTES, ALIGN> {
    entry_word!(
        /// The byte at byte `at` of an entry.
        u8, AtomicU8
    );
    entry_word!(
        /// The 16-bit word at byte `at` of an entry.
        u16, AtomicU16
    );
    entry_word!(
        /// The 32-bit word at byte `at` of an entry.
        u32, AtomicU32
    );
    entry_word!(
        /// The 64-bit word at byte `at` of an entry.
        u64, AtomicU64
    );

    /// Asks for the cache line in which an entry begins. Any index will do.
    #[inline(always)]
    pub fn prefetch(self, index: u16) {
        prefetch(self.base.wrapping_add(usize::from(index) * BYTES));
    }

    #[inline(always)]
    fn word(self, index: usize, at: usize, size: usize) -> *mut u8 {
        #[cfg(feature = "crash-points")]
        super::crash::point();
        // All but the first are known at compile time.
        assert!(index < self.count && at + size <= BYTES);
        assert!(BYTES.is_multiple_of(ALIGN) && ALIGN.is_multiple_of(size) && at.is_multiple_of(size));
        self.base.wrapping_add(index * BYTES + at)
    }
}

/// Asks for a cache line ahead of its use; any address will do.
#[inline(always)]
pub(super) fn prefetch(ptr: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch of any address, mapped or not, has no architectural effect.
    unsafe {
        core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(ptr.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = ptr;
}

/// The same for a line that is going to be written, so that it arrives with the right to do so. Any address will do.
#[inline(always)]
pub(super) fn prefetch_for_write(ptr: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as for `prefetch`; processors without the instruction take it for one that does nothing. The intrinsic
    // makes a prefetch for reading of it where the target's features do not name this one.
    unsafe {
        core::arch::asm!("prefetchw [{}]", in(reg) ptr.addr(), options(nomem, nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = ptr;
}

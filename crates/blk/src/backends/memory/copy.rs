//! Copying that already asks for what is copied next.
//!
//! A block of a large disk comes from memory, not from a cache, and the processor's own prefetching ends with the page.
//! So while one block is copied, the lines of the next operation's are asked for, in step with the copy so that the
//! few requests a core can have outstanding are always in use. That takes a tenth off a random 4 KiB read.
//!
//! Both ranges are raw memory that others may write meanwhile (guest memory, and a disk that other queues use), so there
//! are no slices; the caller vouches for the bounds, and nothing here looks at what is copied.
#![allow(unsafe_code)]

use std::ptr;

const LINE_BYTES: usize = 64;
/// Copied between two rounds of asking; a constant, so that it is done by a few wide moves and no call.
const CHUNK_BYTES: usize = 256;

/// How this processor copies best. Found out once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Copier {
    /// It has moves of 32 bytes.
    avx: bool,
}

impl Copier {
    pub(super) fn new() -> Self {
        #[cfg(target_arch = "x86_64")]
        let avx = std::arch::is_x86_feature_detected!("avx");
        #[cfg(not(target_arch = "x86_64"))]
        let avx = false;
        Self { avx }
    }

    /// Copies `len` bytes, and asks for as many at `ahead`, which may be any address.
    ///
    /// # Safety
    /// `len` bytes are readable at `from` and writable at `to`, and the two do not overlap.
    #[inline(always)]
    pub(super) unsafe fn copy(self, from: *const u8, to: *mut u8, len: usize, ahead: *const u8) {
        #[cfg(target_arch = "x86_64")]
        if self.avx {
            // SAFETY: the processor has it; for the ranges the caller vouches.
            return unsafe { copy_avx(from, to, len, ahead) };
        }
        // SAFETY: the caller vouches for the ranges.
        unsafe { copy(from, to, len, ahead) };
    }
}

/// # Safety
/// As for [`copy`], on a processor with AVX.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
unsafe fn copy_avx(from: *const u8, to: *mut u8, len: usize, ahead: *const u8) {
    // SAFETY: the caller vouches for the ranges.
    unsafe { copy(from, to, len, ahead) };
}

/// # Safety
/// As for [`Copier::copy`].
#[inline(always)]
unsafe fn copy(from: *const u8, to: *mut u8, len: usize, ahead: *const u8) {
    let whole = len - len % CHUNK_BYTES;
    for at in (0..whole).step_by(CHUNK_BYTES) {
        for line in (0..CHUNK_BYTES).step_by(LINE_BYTES) {
            prefetch(ahead.wrapping_add(at + line));
        }
        // SAFETY: the chunk ends at or before `whole`, which is at most `len`; the caller vouches for that range.
        unsafe { ptr::copy_nonoverlapping(from.add(at), to.add(at), CHUNK_BYTES) };
    }
    // SAFETY: `whole` and the rest make up `len`.
    unsafe { ptr::copy_nonoverlapping(from.add(whole), to.add(whole), len - whole) };
}

#[inline(always)]
fn prefetch(line: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch of any address, mapped or not, has no architectural effect.
    unsafe {
        core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(line.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

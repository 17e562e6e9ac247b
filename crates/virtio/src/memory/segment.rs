//! Pieces of buffers in guest memory.
//!
//! A [`Segment`] is made by translation only ([`super::Translator`]), so its bytes are mapped. It holds no reference
//! count: whoever stores segments keeps the [`super::Memory`] they came from beside them, and lends them out by
//! reference. It is neither `Clone` nor `Copy`, so none can outlive that memory.
//!
//! Bytes are copied with raw pointers. The guest may change them during the copy; the copy then holds a mixture,
//! which is why every check is made on the copy and never on guest memory. So that the compiler, too, reads once and then
//! uses the copy, what is small (headers, descriptors) is read by atomic loads, and what is large is handed to it as
//! changed after it was copied.
#![allow(unsafe_code)]

use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// The longest copies out of guest memory that are made by atomic loads, in bytes.
const ATOMIC_BYTES_MAX: usize = 64;

const WORD_BYTES: usize = size_of::<u64>();

/// A piece of a buffer: contiguous in this process, one or more guest pages long.
///
/// The layout is that of `struct iovec`, so a list of segments can be handed to the kernel as it is.
#[derive(Debug)]
#[repr(C)]
pub struct Segment {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: a segment is an address and a length; reaching the bytes is sound from any thread, see the module header.
unsafe impl Send for Segment {}
// SAFETY: as for Send.
unsafe impl Sync for Segment {}

impl Segment {
    /// The caller has checked that `len` bytes at `ptr` lie in a mapping that outlives the segment.
    #[inline(always)]
    pub(super) fn new(ptr: NonNull<u8>, len: usize) -> Self {
        Self { ptr, len }
    }

    /// Its length in bytes, never 0.
    #[inline(always)]
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never true; translation makes no empty segments.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address of the first byte in this process, for handing to the kernel.
    #[inline(always)]
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// Copies from `offset` into `to`; returns the bytes copied, fewer than asked where the segment ends.
    #[inline(always)]
    pub fn read(&self, offset: usize, to: &mut [u8]) -> usize {
        let n = to.len().min(self.len.saturating_sub(offset));
        let from = self.ptr.as_ptr().wrapping_add(offset);
        let to = &mut to[..n];
        // SAFETY: n bytes from `offset` lie within the segment, and `to`, a Rust slice, never overlaps guest memory.
        unsafe {
            if n <= ATOMIC_BYTES_MAX || cfg!(not(target_arch = "x86_64")) {
                load(from, to);
            } else {
                ptr::copy_nonoverlapping(from, to.as_mut_ptr(), n);
                settle(to);
            }
        }
        n
    }

    /// The `N` little-endian words from byte `offset` on, each read once; None where there are fewer.
    #[inline(always)]
    #[must_use]
    pub fn words<const N: usize>(&self, offset: usize) -> Option<[u64; N]> {
        if self.len < N * WORD_BYTES || self.len - N * WORD_BYTES < offset {
            return None;
        }
        let from = self.ptr.as_ptr().wrapping_add(offset);
        if !from.addr().is_multiple_of(WORD_BYTES) {
            return Some(self.unaligned_words(offset));
        }
        Some(core::array::from_fn(|i| {
            // SAFETY: within the segment, as was just checked, and aligned.
            let word = unsafe { AtomicU64::from_ptr(from.wrapping_add(WORD_BYTES * i).cast()) };
            u64::from_le(word.load(Ordering::Relaxed))
        }))
    }

    #[cold]
    fn unaligned_words<const N: usize>(&self, offset: usize) -> [u64; N] {
        core::array::from_fn(|i| {
            let mut word = [0; WORD_BYTES];
            self.read(offset + WORD_BYTES * i, &mut word);
            u64::from_le_bytes(word)
        })
    }

    /// Copies `from` to `offset`; returns the bytes copied, fewer than given where the segment ends.
    #[inline(always)]
    pub fn write(&self, offset: usize, from: &[u8]) -> usize {
        let n = from.len().min(self.len.saturating_sub(offset));
        // SAFETY: as in `read`, with source and destination exchanged.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), self.ptr.as_ptr().wrapping_add(offset), n) };
        n
    }

    /// Asks for the cache line of the first byte.
    #[inline(always)]
    pub fn prefetch(&self) {
        super::area::prefetch(self.ptr.as_ptr());
    }

    /// Asks for the cache line of the last byte, which is going to be written.
    ///
    /// Stores leave a core in order, so one that misses the cache holds up the used index behind it.
    #[inline(always)]
    pub fn prefetch_last_for_write(&self) {
        super::area::prefetch_for_write(self.ptr.as_ptr().wrapping_add(self.len - 1));
    }
}

/// Copies bytes by atomic loads, of words where they are aligned.
///
/// # Safety
/// As many bytes as `to` has can be read at `from`.
#[inline(always)]
unsafe fn load(from: *mut u8, to: &mut [u8]) {
    let words = if from.addr().is_multiple_of(WORD_BYTES) { to.len() / WORD_BYTES * WORD_BYTES } else { 0 };
    let (aligned, rest) = to.split_at_mut(words);
    for (i, word) in aligned.chunks_exact_mut(WORD_BYTES).enumerate() {
        // SAFETY: within the bytes that the caller vouches for, and aligned.
        let value = unsafe { AtomicU64::from_ptr(from.wrapping_add(WORD_BYTES * i).cast()) };
        word.copy_from_slice(&value.load(Ordering::Relaxed).to_ne_bytes());
    }
    for (i, byte) in rest.iter_mut().enumerate() {
        // SAFETY: within the bytes that the caller vouches for.
        *byte = unsafe { AtomicU8::from_ptr(from.wrapping_add(words + i)) }.load(Ordering::Relaxed);
    }
}

/// Makes the bytes of a copy the only ones the compiler can use from here on.
#[inline(always)]
fn settle(copy: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: no instruction; as far as the compiler knows it may have changed what the pointer, an exclusive one, leads to.
    unsafe {
        core::arch::asm!("/* {0} */", in(reg) copy.as_mut_ptr(), options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = copy;
}

/// The bytes in all of `segments`.
#[inline]
#[must_use]
pub fn total_len(segments: &[Segment]) -> u64 {
    segments.iter().map(|s| s.len as u64).sum()
}

/// Copies the bytes from `offset` on, across segments, into `to`; returns how many there were, at most `to.len()`.
#[inline]
pub fn gather(segments: &[Segment], mut offset: usize, to: &mut [u8]) -> usize {
    let mut copied = 0;
    for segment in segments {
        if copied == to.len() {
            break;
        }
        if offset >= segment.len {
            offset -= segment.len;
            continue;
        }
        copied += segment.read(offset, &mut to[copied..]);
        offset = 0;
    }
    copied
}

/// Copies `from` to the bytes from `offset` on, across segments; returns how many fitted.
#[inline]
pub fn scatter(segments: &[Segment], mut offset: usize, from: &[u8]) -> usize {
    let mut copied = 0;
    for segment in segments {
        if copied == from.len() {
            break;
        }
        if offset >= segment.len {
            offset -= segment.len;
            continue;
        }
        copied += segment.write(offset, &from[copied..]);
        offset = 0;
    }
    copied
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_of_any_length_from_any_place_are_exact() {
        let mut memory: [u8; 256] = core::array::from_fn(|i| i as u8);
        let base = NonNull::from(&mut memory).cast();
        for start in 0..17 {
            for len in 0..ATOMIC_BYTES_MAX + 40 {
                // SAFETY: within `memory`, which outlives the segment.
                let segment = Segment::new(unsafe { base.add(start) }, len + 1);
                let mut copy = [0xff; 128];
                assert_eq!(segment.read(1, &mut copy), len);
                assert!((0..len).all(|i| usize::from(copy[i]) == start + 1 + i), "{len} bytes at {start}");
                assert!(copy[len..].iter().all(|&byte| byte == 0xff), "{len} bytes at {start}");
            }
        }
    }

    #[test]
    fn words_at_any_place_are_exact_and_within_the_segment() {
        let mut memory: [u8; 64] = core::array::from_fn(|i| i as u8);
        let base = NonNull::from(&mut memory).cast();
        for (start, len) in (0..9).flat_map(|start| (1..33).map(move |len| (start, len))) {
            // SAFETY: within `memory`, which outlives the segment.
            let segment = Segment::new(unsafe { base.add(start) }, len);
            for offset in 0..40 {
                let expected = (offset + 16 <= len).then(|| {
                    [0, 8].map(|word| {
                        u64::from_le_bytes(core::array::from_fn(|i| (start + offset + word + i) as u8))
                    })
                });
                assert_eq!(segment.words(offset), expected, "{len} bytes at {start}, from {offset}");
            }
            assert_eq!(segment.words::<2>(usize::MAX), None);
        }
    }
}

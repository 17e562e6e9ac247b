//! From guest-physical ranges to segments, with the last region remembered.
//!
//! Nearly every guest has its buffers in one or two large regions, so one comparison with the region of the last hit
//! answers nearly every look-up; a binary search answers the rest.
#![allow(unsafe_code)]

use alloc::sync::Arc;
use core::ptr::NonNull;

use super::{GuestAddr, Memory, MemoryError, Segment};

/// Translates for one queue. Holds the memory map it translates with.
pub struct Translator {
    memory: Arc<Memory>,
    start: u64,
    len: u64,
    base: NonNull<u8>,
}

// SAFETY: `base` points into memory that `memory` keeps mapped; the translator only computes addresses from it.
unsafe impl Send for Translator {}

impl Translator {
    /// A translator with nothing remembered yet.
    #[must_use]
    pub fn new(memory: Arc<Memory>) -> Self {
        Self { memory, start: 0, len: 0, base: NonNull::dangling() }
    }

    /// The map it translates with.
    #[must_use]
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Calls `push` with the segments of the `len` bytes at `addr`, in order: one, or several where the range
    /// crosses from one region into the next. No call for an empty range.
    ///
    /// # Errors
    /// Part of the range is not mapped; `push` may have been called for what lies before it.
    #[inline(always)]
    pub fn translate(
        &mut self,
        addr: GuestAddr,
        len: u32,
        mut push: impl FnMut(Segment),
    ) -> Result<(), MemoryError> {
        if let Some(segment) = self.translate_whole(addr, len) {
            push(segment);
            return Ok(());
        }
        self.translate_slow(addr, len, &mut push)
    }

    /// The one segment of the `len` bytes at `addr`, if they lie in the region of the last hit. None says nothing: it may be
    /// another region, several, or none.
    #[inline(always)]
    #[must_use]
    pub fn translate_whole(&self, addr: GuestAddr, len: u32) -> Option<Segment> {
        let offset = addr.0.wrapping_sub(self.start);
        (offset < self.len && u64::from(len) <= self.len - offset && len != 0)
            .then(|| self.segment(offset, len))
    }

    #[inline(always)]
    fn segment(&self, offset: u64, len: u32) -> Segment {
        // SAFETY: the caller checked that `offset + len` does not exceed `self.len`, the length of the mapping at `base`.
        Segment::new(unsafe { self.base.add(offset as usize) }, len as usize)
    }

    #[cold]
    fn translate_slow(
        &mut self,
        addr: GuestAddr,
        len: u32,
        push: &mut dyn FnMut(Segment),
    ) -> Result<(), MemoryError> {
        let (mut at, mut left) = (addr.0, len);
        while left > 0 {
            let region = self
                .memory
                .find(at)
                .ok_or(MemoryError::NotMapped { addr: GuestAddr(at), len: u64::from(left) })?;
            (self.start, self.len, self.base) = (region.start, region.len(), region.backing.base());
            let offset = at - self.start;
            let here = u64::from(left).min(self.len - offset) as u32;
            push(self.segment(offset, here));
            left -= here;
            // `find` succeeded, so `at + here` is at most the region's end, which fits in 64 bits.
            at += u64::from(here);
        }
        Ok(())
    }
}

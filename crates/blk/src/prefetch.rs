//! Asking for a cache line that is about to be written.
//!
//! The status byte of a request lies in a line that the driver's core owns. Stores leave a core in order, so a status
//! byte that misses the cache holds up the used index behind it; asking for the line when the request is parsed hides
//! that.
#![allow(unsafe_code)]

use virtio::Segment;

/// Asks for the cache line of the segment's last byte, for writing.
#[inline(always)]
pub(crate) fn last_byte_for_write(segment: &Segment) {
    let last = segment.as_ptr().wrapping_add(segment.len().wrapping_sub(1));
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch of any address, mapped or not, has no architectural effect.
    unsafe {
        core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_ET0 }>(last.cast_const().cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = last;
}

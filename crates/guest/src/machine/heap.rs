//! Memory above the image, given out once and never taken back.
//!
//! The range is fixed at start, nothing else uses it, and a pointer that moves one way hands every byte to one owner
//! only. That is what [`GlobalAlloc`] asks for. What drops is not used again: a job allocates when it sets up, and the
//! machine ends with it.
#![allow(unsafe_code)]

use core::alloc::{GlobalAlloc, Layout};
use core::ptr::{null_mut, with_exposed_provenance_mut, write_bytes};
use core::sync::atomic::{AtomicUsize, Ordering};

use virtio::GuestAddr;

static NEXT: AtomicUsize = AtomicUsize::new(0);
static END: AtomicUsize = AtomicUsize::new(0);

/// Makes `start..end` the memory to give out: RAM that nothing else uses.
pub(super) fn init(start: usize, end: usize) {
    END.store(end, Ordering::Relaxed);
    NEXT.store(start, Ordering::Release);
}

/// Moves the end of the memory to give out.
pub(super) fn extend(end: usize) {
    END.store(end, Ordering::Relaxed);
}

/// The program's allocator.
pub struct Heap;

// SAFETY: see the header: every call returns memory of its own, aligned, or null.
unsafe impl GlobalAlloc for Heap {
    // SAFETY: nothing is asked of the caller.
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        place(layout.size(), layout.align()).map_or(null_mut(), with_exposed_provenance_mut)
    }

    // SAFETY: as above.
    unsafe fn dealloc(&self, _: *mut u8, _: Layout) {}
}

/// Zeroed memory for devices to read and write, which no Rust value is in. The machine ends where there is none left.
#[must_use]
pub fn take(bytes: usize, align: usize) -> GuestAddr {
    let Some(at) = place(bytes, align) else {
        panic!("no memory left for {bytes} bytes: the machine needs more (`--mem`)")
    };
    // SAFETY: the range was given out just now, to this call only.
    unsafe { write_bytes(with_exposed_provenance_mut::<u8>(at), 0, bytes) };
    GuestAddr(at as u64)
}

fn place(bytes: usize, align: usize) -> Option<usize> {
    let mut next = NEXT.load(Ordering::Relaxed);
    loop {
        let start = next.checked_next_multiple_of(align)?;
        let end = start.checked_add(bytes).filter(|&end| end <= END.load(Ordering::Relaxed))?;
        match NEXT.compare_exchange_weak(next, end, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => return Some(start),
            Err(now) => next = now,
        }
    }
}

//! Crash points: places between any two stores to shared memory at which a test can end the device.
//!
//! Rings and records are written through [`Area`](super::Area) only, which passes here before each word. What a killed
//! process leaves behind is what it had stored so far, and so is what a thread leaves that unwinds from here.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

thread_local! {
    /// Words until the end; None while nothing is to end.
    static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
}

/// What a thread that ended at a crash point unwinds with.
struct Crash;

/// Runs `device` and ends it before it touches its word number `words` of shared memory, counted from 0. Tells how many
/// words it touched if it came to its end before; None if it was ended.
///
/// # Panics
/// `device` does so by itself.
pub fn crash_at(words: u32, device: impl FnOnce()) -> Option<u32> {
    LEFT.set(Some(words));
    let result = catch_unwind(AssertUnwindSafe(device));
    let left = LEFT.take();
    match result {
        Ok(()) => left.map(|left| words - left),
        Err(panic) if panic.is::<Crash>() => None,
        Err(panic) => resume_unwind(panic),
    }
}

/// A word of shared memory is about to be touched.
#[inline]
pub(super) fn point() {
    match LEFT.get() {
        None => {}
        Some(0) => {
            LEFT.set(None);
            resume_unwind(Box::new(Crash));
        }
        Some(left) => LEFT.set(Some(left - 1)),
    }
}

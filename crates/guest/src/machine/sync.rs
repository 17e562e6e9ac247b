//! Sharing between processors that have no operating system: a lock and a barrier that spin.
//!
//! The lock hands out its value by a guard, one at a time, which is the whole argument for its unsafe code. No
//! interrupt stub takes it, so a processor cannot wait for itself.
#![allow(unsafe_code)]

use core::cell::UnsafeCell;
use core::hint::spin_loop;
use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// A value that one processor has at a time.
pub struct Spin<T> {
    taken: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: the value is reached through a guard only, and there is one guard at a time.
unsafe impl<T: Send> Sync for Spin<T> {}

impl<T> Spin<T> {
    /// A lock around `value`.
    pub const fn new(value: T) -> Self {
        Self { taken: AtomicBool::new(false), value: UnsafeCell::new(value) }
    }

    /// Waits for the value.
    pub fn lock(&self) -> SpinGuard<'_, T> {
        while self.taken.swap(true, Ordering::Acquire) {
            spin_loop();
        }
        SpinGuard { lock: self, _value: PhantomData }
    }

    /// The value, when nobody shares it any more.
    pub fn into_inner(self) -> T {
        self.value.into_inner()
    }
}

/// The value of a [`Spin`], given back when dropped.
///
/// ```compile_fail,E0277
/// fn share<T: Sync>(_: T) {}
/// let cell = exitless_guest::machine::sync::Spin::new(std::cell::Cell::new(0));
/// share(cell.lock());
/// ```
pub struct SpinGuard<'a, T> {
    lock: &'a Spin<T>,
    /// It is shared between processors as the value may be, not as the lock may.
    _value: PhantomData<&'a mut T>,
}

impl<T> Deref for SpinGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: this guard is the only one.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for SpinGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: this guard is the only one.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for SpinGuard<'_, T> {
    fn drop(&mut self) {
        self.lock.taken.store(false, Ordering::Release);
    }
}

/// A point that a fixed number of processors pass together, any number of times.
pub struct Barrier {
    processors: usize,
    arrived: AtomicUsize,
    round: AtomicUsize,
}

impl Barrier {
    /// A barrier for `processors`.
    #[must_use]
    pub const fn new(processors: usize) -> Self {
        Self { processors, arrived: AtomicUsize::new(0), round: AtomicUsize::new(0) }
    }

    /// Waits for the others until `gives_up`; false if it did. Nobody can use the barrier after that.
    #[must_use]
    pub fn wait(&self, mut gives_up: impl FnMut() -> bool) -> bool {
        let round = self.round.load(Ordering::Acquire);
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.processors {
            self.arrived.store(0, Ordering::Relaxed);
            self.round.store(round.wrapping_add(1), Ordering::Release);
            return true;
        }
        while self.round.load(Ordering::Acquire) == round {
            if gives_up() {
                return false;
            }
            spin_loop();
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_locked_value_has_one_owner_at_a_time_and_a_barrier_holds_back_all() {
        const THREADS: usize = 2;
        let (sum, barrier) = (Spin::new(0), Barrier::new(THREADS));
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    for round in 1..=20 {
                        *sum.lock() += 1;
                        assert!(barrier.wait(|| false));
                        assert_eq!(*sum.lock(), round * THREADS);
                        assert!(barrier.wait(|| false));
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 20 * THREADS);
    }

    #[test]
    fn who_waits_for_nobody_may_give_up() {
        let mut looks = 0;
        assert!(!Barrier::new(2).wait(|| {
            looks += 1;
            looks == 3
        }));
        assert!(Barrier::new(1).wait(|| true), "nobody to wait for");
    }
}

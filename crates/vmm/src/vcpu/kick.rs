//! Getting a virtual CPU out of the guest, from another thread.
//!
//! A signal ends `KVM_RUN`, but one that arrives just before it would be lost. So a byte that the kernel shares with us
//! is set first: `KVM_RUN` that finds `immediate_exit` set returns at once. The byte lies in a mapping that belongs to
//! the virtual CPU's descriptor, and the signal goes to a thread that ends: both are unsafe to touch later, so the
//! address and the thread are behind a lock, and are taken away before they become invalid.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, Once, PoisonError};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler, unblock_signal};

use crate::Error;

/// Which real-time signal kicks: the first; `reactor` takes the last that is free.
fn signal() -> libc::c_int {
    SIGRTMIN()
}

/// Whom to kick.
struct Target {
    thread: libc::pthread_t,
    immediate_exit: *mut u8,
}

// SAFETY: the byte is only accessed as an atomic, and only while the target is registered.
unsafe impl Send for Target {}

/// A virtual CPU's way of being kicked.
#[derive(Default)]
pub(crate) struct Kicker(Mutex<Option<Target>>);

/// Keeps a virtual CPU kickable, and its descriptor with it.
pub(crate) struct Kickable<'a> {
    kicker: &'a Kicker,
    /// The descriptor, whose mapping holds the byte.
    pub(crate) fd: VcpuFd,
}

impl Kicker {
    /// Makes the calling thread, which runs `fd`, kickable for as long as the result lives.
    pub(crate) fn register(&self, mut fd: VcpuFd) -> Result<Kickable<'_>, Error> {
        install()?;
        // The mask comes from whoever started the thread, and may hold back everything.
        unblock_signal(signal())
            .map_err(|error| Error::system("unblock a signal", std::io::Error::other(error.to_string())))?;
        let immediate_exit = &raw mut fd.get_kvm_run().immediate_exit;
        // SAFETY: takes no argument and cannot fail.
        let thread = unsafe { libc::pthread_self() };
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Target { thread, immediate_exit });
        Ok(Kickable { kicker: self, fd })
    }

    /// Gets it out of the guest, now or at its next entry. Does nothing if it does not run.
    pub(crate) fn kick(&self) {
        let target = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(target) = &*target {
            // SAFETY: while the target is registered its descriptor lives, and with it the mapping of the byte; the kernel
            // and other threads access it as one byte.
            unsafe { AtomicU8::from_ptr(target.immediate_exit) }.store(1, Ordering::SeqCst);
            // SAFETY: the thread runs: before it ends it takes the target away, which the lock held here prevents.
            unsafe { libc::pthread_kill(target.thread, signal()) };
        }
    }
}

impl Kickable<'_> {
    /// Takes note of every kick so far.
    pub(crate) fn answer(&mut self) {
        // SAFETY: as in `Kicker::kick`; `self` holds the descriptor.
        unsafe { AtomicU8::from_ptr(&raw mut self.fd.get_kvm_run().immediate_exit) }
            .store(0, Ordering::SeqCst);
    }
}

impl Drop for Kickable<'_> {
    fn drop(&mut self) {
        *self.kicker.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Gives the signal a handler that does nothing: without one it would end the process.
fn install() -> Result<(), Error> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| result = register_signal_handler(signal(), nothing));
    result.map_err(|error| Error::system("handle a real-time signal", error))
}

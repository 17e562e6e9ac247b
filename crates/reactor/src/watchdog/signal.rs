//! A signal that does nothing but end the system call that a thread is blocked in.
//!
//! It is a real-time signal, because the others have meanings and owners, and one whose action was the default, so
//! that a handler of the program around us is never replaced. Its handler is empty, and installed without
//! `SA_RESTART`: a call that waits returns `EINTR`. Unsafe is what `libc` calls are: the structures handed over are
//! local and whole, and the kernel checks the rest.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;

use rustix::thread::Pid;

/// The signal, with our handler installed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Interrupt(libc::c_int);

extern "C" fn do_nothing(_signal: libc::c_int) {}

fn handler() -> libc::sighandler_t {
    do_nothing as *const () as libc::sighandler_t
}

/// What happens on `signal`; None if there is no such signal.
fn action_of(signal: libc::c_int) -> Option<libc::sighandler_t> {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: a zeroed sigaction is a valid value; the kernel overwrites it, and nothing is changed.
    let (failed, action) = unsafe {
        let failed = libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr());
        (failed, action.assume_init())
    };
    (failed == 0).then_some(action.sa_sigaction)
}

/// Gives `signal` our handler; false if it cannot be handled.
fn install(signal: libc::c_int) -> bool {
    // SAFETY: a zeroed sigaction is a valid value (no flags, hence no SA_RESTART; an empty mask), and the handler has
    // the signature that a sigaction without SA_SIGINFO calls for. It touches nothing.
    let failed = unsafe {
        let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = handler();
        libc::sigaction(signal, &action, std::ptr::null_mut())
    };
    failed == 0
}

impl Interrupt {
    /// Takes the highest real-time signal that nobody uses; None if there is none.
    pub(super) fn take() -> Option<Self> {
        let free = |signal: &libc::c_int| action_of(*signal) == Some(libc::SIG_DFL) && install(*signal);
        (libc::SIGRTMIN()..=libc::SIGRTMAX()).rev().find(free).map(Self)
    }

    /// Lets the signal reach the calling thread, whose mask may come from a program that blocks all.
    pub(super) fn unblock(self) {
        let mut set = MaybeUninit::<libc::sigset_t>::zeroed();
        // SAFETY: the set is a local one, emptied before the signal, whose number is valid, is added to it.
        unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            libc::sigaddset(set.as_mut_ptr(), self.0);
            libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), std::ptr::null_mut());
        }
    }

    /// Sends it to a thread of this process; false if somebody else handles it now, who would not understand. A
    /// thread that has ended needs none.
    pub(super) fn send(self, thread: Pid) -> bool {
        match action_of(self.0) {
            Some(found) if found == handler() => {}
            // Reset behind our back: as it stands, the signal would end the process, or nothing.
            Some(libc::SIG_DFL | libc::SIG_IGN) if install(self.0) => {}
            _ => return false,
        }
        let (process, thread) = (rustix::process::getpid(), thread.as_raw_nonzero().get());
        // SAFETY: passes three numbers. The signal is ours to send, and its handler harms no thread it reaches.
        unsafe { libc::syscall(libc::SYS_tgkill, process.as_raw_nonzero().get(), thread, self.0) };
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_users_take_two_signals() {
        let (one, other) = (Interrupt::take().unwrap(), Interrupt::take().unwrap());
        assert_ne!(one.0, other.0);
        assert!((libc::SIGRTMIN()..=libc::SIGRTMAX()).contains(&other.0));
    }

    #[test]
    fn it_reaches_a_thread_that_blocks_it_and_does_no_harm() {
        let interrupt = Interrupt::take().unwrap();
        let mut set = MaybeUninit::<libc::sigset_t>::zeroed();
        // SAFETY: the set is a local one; blocking signals in the thread of one test disturbs nobody.
        unsafe {
            libc::sigfillset(set.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
        }
        interrupt.unblock();
        assert!(interrupt.send(rustix::thread::gettid()));
        let mut pending = MaybeUninit::<libc::sigset_t>::zeroed();
        // SAFETY: the kernel fills in the set.
        let waits = unsafe {
            libc::sigpending(pending.as_mut_ptr());
            libc::sigismember(pending.as_ptr(), interrupt.0)
        };
        assert_eq!(waits, 0, "it was delivered");
    }

    #[test]
    fn what_somebody_else_handles_is_not_sent_and_what_was_reset_is_taken_again() {
        extern "C" fn other(_signal: libc::c_int) {
            std::process::abort();
        }
        // It must not take the signal while that has its default action.
        crate::watchdog::start().unwrap();
        let interrupt = Interrupt::take().unwrap();
        let set = |action| {
            // SAFETY: sets the action of a signal that only this test uses.
            unsafe { libc::signal(interrupt.0, action) }
        };
        let me = rustix::thread::gettid();
        set(libc::SIG_DFL);
        assert!(interrupt.send(me), "by default it would end the process");
        set(other as *const () as libc::sighandler_t);
        assert!(!interrupt.send(me));
        set(libc::SIG_IGN);
        assert!(interrupt.send(me));
    }
}

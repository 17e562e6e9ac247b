//! System calls that somebody hostile could make block: announced before, watched, and interrupted.
//!
//! An eventfd that a peer sent is written to without blocking only as long as the peer pleases: `O_NONBLOCK` belongs
//! to the open file, which the peer shares, and there is no flag for a single write, nor a way to open the file anew.
//! So a thread that makes such a call says so ([`guarded`]). The watchdog looks at all of them from time to time, and
//! at those inside a call once more soon after; who still is in the same one gets a signal, which makes the call
//! return `EINTR` if it waits, and does nothing if it does not.
//!
//! A call thus blocks for hardly more than [`LOOK_MS`]; one that does not block at all costs two stores. While no
//! thread makes guarded calls, the watchdog sleeps, and the first call wakes it. Both sides store, then load what
//! the other stores, all in sequentially consistent order: of a call that begins while the watchdog falls asleep,
//! either the caller finds it asleep, or it finds the call.

mod signal;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Once, OnceLock, PoisonError};
use std::thread::{self, Thread};
use std::time::Duration;

use rustix::thread::{Pid, gettid};

use signal::Interrupt;

/// How often calls are looked for. A thread can be kept from its work for about so long before it is noticed.
const LOOK_MS: u64 = 20;
/// A call found at a look is looked at again after this time; hardly any that does not block takes so long.
const SECOND_LOOK_US: u64 = 100;
/// After so many looks that found nothing new, the watchdog sleeps.
const QUIET_LOOKS: u32 = 50;

/// The guarded calls of one thread. On its own cache lines: the thread writes it, the watchdog rarely reads it.
#[derive(Debug)]
#[repr(align(128))]
struct Pulse {
    /// Goes up when a call begins and when it ends: odd inside.
    beat: AtomicU64,
    thread: Pid,
}

/// What the watchdog has seen of a thread.
#[derive(Debug)]
struct Patient {
    pulse: Arc<Pulse>,
    seen: u64,
}

#[derive(Debug)]
struct Watchdog {
    interrupt: Interrupt,
    patients: Mutex<Vec<Patient>>,
    asleep: AtomicBool,
    /// To wake it; set once it runs.
    thread: OnceLock<Thread>,
}

/// What a look found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Look {
    /// Some call began or ended since the last one.
    moved: bool,
    /// Some thread is inside a call.
    inside: bool,
}

/// A thread's access to its pulse.
struct Watched {
    pulse: Arc<Pulse>,
    watchdog: &'static Watchdog,
}

thread_local! {
    /// None if there is no watchdog.
    static WATCHED: Option<Watched> = watchdog().as_ref().ok().map(|watchdog| watchdog.admit());
}

/// Makes a system call that may block by somebody's ill will, and that returns `EINTR` if it has.
///
/// It may return `EINTR` for other signals too, like any call. Costs a few ns more than the call alone. Not to be used
/// inside itself.
#[inline]
pub fn guarded<T>(call: impl FnOnce() -> T) -> T {
    let _inside = Inside::begin();
    call()
}

/// Ends the call, even if by a panic.
struct Inside;

impl Inside {
    #[inline]
    fn begin() -> Self {
        Self::tell(|watched| watched.begin());
        Self
    }

    /// A thread that is ending has lost its pulse; what it still calls is not watched.
    #[inline]
    fn tell(tell: impl FnOnce(&Watched)) {
        let _ = WATCHED.try_with(|watched| watched.as_ref().map(tell));
    }
}

impl Drop for Inside {
    #[inline]
    fn drop(&mut self) {
        Self::tell(|watched| watched.pulse.count(Ordering::Release));
    }
}

/// Starts the watchdog of this process, unless it runs. It inherits the CPUs it may run on: not to be called first on
/// a pinned thread.
pub(crate) fn start() -> std::io::Result<()> {
    let again = |error: &std::io::Error| std::io::Error::new(error.kind(), error.to_string());
    watchdog().as_ref().map(drop).map_err(again)
}

fn watchdog() -> &'static std::io::Result<Arc<Watchdog>> {
    static WATCHDOG: OnceLock<std::io::Result<Arc<Watchdog>>> = OnceLock::new();
    WATCHDOG.get_or_init(Watchdog::start)
}

impl Pulse {
    /// Only the owning thread calls this.
    #[inline]
    fn count(&self, order: Ordering) {
        self.beat.store(self.beat.load(Ordering::Relaxed).wrapping_add(1), order);
    }
}

impl Watched {
    #[inline]
    fn begin(&self) {
        // See the module's comment for the order.
        self.pulse.count(Ordering::SeqCst);
        if self.watchdog.asleep.load(Ordering::SeqCst) {
            self.watchdog.wake();
        }
    }
}

impl Patient {
    fn is_inside(&self) -> bool {
        self.seen % 2 == 1
    }

    /// Looks, and says whether anything has changed.
    fn look(&mut self) -> bool {
        let beat = self.pulse.beat.load(Ordering::SeqCst);
        std::mem::replace(&mut self.seen, beat) != beat
    }
}

impl Watchdog {
    fn start() -> std::io::Result<Arc<Self>> {
        let none_free = || std::io::Error::other("no real-time signal is free");
        let watchdog = Arc::new(Self {
            interrupt: Interrupt::take().ok_or_else(none_free)?,
            patients: Mutex::default(),
            asleep: AtomicBool::new(false),
            thread: OnceLock::new(),
        });
        let running = watchdog.clone();
        let thread = thread::Builder::new().name("watchdog".to_owned()).spawn(move || running.run())?;
        let _ = watchdog.thread.set(thread.thread().clone());
        Ok(watchdog)
    }

    /// Has the calling thread watched until it ends.
    fn admit(&'static self) -> Watched {
        self.interrupt.unblock();
        let pulse = Arc::new(Pulse { beat: AtomicU64::new(0), thread: gettid() });
        self.each(|patients| patients.push(Patient { pulse: pulse.clone(), seen: 0 }));
        Watched { pulse, watchdog: self }
    }

    fn each<T>(&self, act: impl FnOnce(&mut Vec<Patient>) -> T) -> T {
        act(&mut self.patients.lock().unwrap_or_else(PoisonError::into_inner))
    }

    #[cold]
    fn wake(&self) {
        if self.asleep.swap(false, Ordering::SeqCst)
            && let Some(thread) = self.thread.get()
        {
            thread.unpark();
        }
    }

    fn run(&self) {
        let mut quiet = 0;
        loop {
            thread::sleep(Duration::from_millis(LOOK_MS));
            let look = self.look();
            quiet = if look.moved || look.inside { 0 } else { quiet + 1 };
            if look.inside {
                thread::sleep(Duration::from_micros(SECOND_LOOK_US));
                self.interrupt_the_stuck();
            }
            if quiet >= QUIET_LOOKS {
                self.sleep();
                quiet = 0;
            }
        }
    }

    fn look(&self) -> Look {
        self.each(|patients| {
            // A thread that has ended has let go of its pulse.
            patients.retain(|patient| Arc::strong_count(&patient.pulse) > 1);
            let moved = patients.iter_mut().fold(false, |moved, patient| patient.look() | moved);
            Look { moved, inside: patients.iter().any(Patient::is_inside) }
        })
    }

    /// Interrupts every thread that is in the call it was found in.
    fn interrupt_the_stuck(&self) {
        self.each(|patients| {
            for patient in patients {
                if patient.is_inside() && !patient.look() && !self.interrupt.send(patient.pulse.thread) {
                    self.tell_of_theft();
                }
            }
        });
    }

    fn tell_of_theft(&self) {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            let signal = self.interrupt;
            tracing::error!(?signal, "a thread is blocked, and the signal that would free it was taken over");
        });
    }

    /// Sleeps until a guarded call begins.
    fn sleep(&self) {
        self.asleep.store(true, Ordering::SeqCst);
        let look = self.look();
        if look.moved || look.inside {
            self.asleep.store(false, Ordering::SeqCst);
        }
        while self.asleep.load(Ordering::SeqCst) {
            thread::park();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use rustix::event::{EventfdFlags, eventfd};
    use rustix::io::{Errno, write};

    use super::*;

    fn eventually(condition: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(120);
        while !condition() {
            assert!(Instant::now() < deadline, "waited in vain");
            thread::yield_now();
        }
    }

    fn running() -> &'static Watchdog {
        watchdog().as_ref().unwrap()
    }

    #[test]
    fn a_write_that_blocks_is_interrupted_as_often_as_it_is_tried() {
        let eventfd = eventfd(u32::MAX, EventfdFlags::CLOEXEC).unwrap();
        write(&eventfd, &(u64::MAX - 1 - u64::from(u32::MAX)).to_ne_bytes()).unwrap();
        let pipe = rustix::pipe::pipe().unwrap();
        let capacity = rustix::pipe::fcntl_getpipe_size(&pipe.1).unwrap();
        write(&pipe.1, &vec![0; capacity]).unwrap();
        for _ in 0..3 {
            for fd in [&eventfd, &pipe.1] {
                assert_eq!(guarded(|| write(fd, &1_u64.to_ne_bytes())), Err(Errno::INTR));
            }
        }
    }

    #[test]
    fn a_call_wakes_a_watchdog_that_sleeps() {
        // The other tests make calls too, but not for ever.
        eventually(|| running().asleep.load(Ordering::SeqCst));
        a_write_that_blocks_is_interrupted_as_often_as_it_is_tried();
        eventually(|| running().asleep.load(Ordering::SeqCst));
        // It goes to sleep again, which can be sooner than this thread looks.
        eventually(|| {
            assert_eq!(guarded(|| 7), 7);
            !running().asleep.load(Ordering::SeqCst)
        });
    }

    #[test]
    fn a_thread_that_ends_is_forgotten() {
        let thread = thread::spawn(|| {
            guarded(|| ());
            gettid()
        });
        let gone = thread.join().unwrap();
        let known = || running().each(|patients| patients.iter().any(|p| p.pulse.thread == gone));
        eventually(|| {
            guarded(|| ());
            !known()
        });
    }

    #[test]
    fn a_call_that_panics_has_ended() {
        let _ = std::panic::catch_unwind(|| guarded(|| panic!("on purpose")));
        let me = gettid();
        running().each(|patients| {
            let mine = patients.iter_mut().find(|patient| patient.pulse.thread == me).unwrap();
            mine.look();
            assert!(!mine.is_inside());
        });
    }
}

//! Waking an I/O thread that may be about to fall asleep, without a lock and without losing the wake-up.
//!
//! A sender puts its message where the thread will find it, then rings. The thread looks for work, then sleeps. If
//! the ring falls between the look and the sleep, somebody must notice. Both sides go through one word:
//!
//! ```text
//! sender:  queue the message;  old = fetch_or(RUNG);  if old == ASLEEP, write the eventfd
//! thread:  if RUNG: fetch_and(!RUNG), then empty the queue
//!          to sleep: compare_exchange(0 -> ASLEEP); if it fails, look again instead
//!          epoll_wait;  fetch_and(!ASLEEP)
//! ```
//!
//! Every step is a read-modify-write of the same word, so all of them happen in one order. A ring before the
//! thread's compare-exchange makes it fail; a ring after it sees `ASLEEP` and writes the eventfd. Of several rings
//! the first one writes; the later ones see `RUNG` and know it is being done. A write that arrives late, when the
//! thread has woken for another reason, costs one needless turn. The acquire and release halves make what was
//! written before a ring visible to the thread after it answers.

#[cfg(all(loom, test))]
use loom::sync::atomic::{AtomicU32, Ordering};
#[cfg(not(all(loom, test)))]
use std::sync::atomic::{AtomicU32, Ordering};

const RUNG: u32 = 1 << 0;
const ASLEEP: u32 = 1 << 1;

/// The word between the senders and the thread, alone on its cache lines: the thread reads it every turn.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Bell(AtomicU32);

impl Bell {
    pub(crate) fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    /// Sender: says that there is something. True if the thread sleeps and this caller has to wake it.
    #[must_use]
    pub(crate) fn ring(&self) -> bool {
        self.0.fetch_or(RUNG, Ordering::AcqRel) == ASLEEP
    }

    /// Thread: whether anybody rang since the last [`answer`](Self::answer). One plain load.
    #[inline]
    pub(crate) fn is_rung(&self) -> bool {
        self.0.load(Ordering::Relaxed) & RUNG != 0
    }

    /// Thread: takes note of every ring so far. What they announced is visible afterwards.
    pub(crate) fn answer(&self) {
        self.0.fetch_and(!RUNG, Ordering::AcqRel);
    }

    /// Thread: announces that it will sleep. False, and it must not, if anybody rang.
    #[must_use]
    pub(crate) fn try_sleep(&self) -> bool {
        self.0.compare_exchange(0, ASLEEP, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Thread: is awake again, whatever woke it.
    pub(crate) fn awake(&self) {
        self.0.fetch_and(!ASLEEP, Ordering::AcqRel);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_ring_of_a_sleeping_thread_wakes_it() {
        let bell = Bell::new();
        assert!(!bell.ring(), "an awake thread finds the ring by itself");
        assert!(!bell.try_sleep(), "a rung bell keeps the thread awake");
        bell.answer();
        assert!(bell.try_sleep());
        assert!(bell.ring());
        assert!(!bell.ring());
        bell.awake();
        assert!(bell.is_rung());
        bell.answer();
        assert!(!bell.is_rung());
    }

    #[test]
    fn a_ring_between_waking_and_answering_is_kept() {
        let bell = Bell::new();
        assert!(bell.try_sleep());
        bell.awake();
        assert!(!bell.ring());
        assert!(!bell.try_sleep());
    }
}

/// The interleavings of two senders with a thread that sleeps whenever it may.
#[cfg(all(test, loom))]
mod model {
    use std::collections::VecDeque;

    use loom::sync::{Arc, Condvar, Mutex};
    use loom::thread;

    use super::*;

    const PREEMPTIONS_MAX: usize = 3;

    /// An edge-triggered eventfd as the sleeper sees it: a write while it sleeps, or before, ends one wait.
    struct Edge(Mutex<bool>, Condvar);

    impl Edge {
        fn write(&self) {
            *self.0.lock().unwrap() = true;
            self.1.notify_one();
        }

        fn wait(&self) {
            let mut written = self.0.lock().unwrap();
            while !*written {
                written = self.1.wait(written).unwrap();
            }
            *written = false;
        }
    }

    #[test]
    fn no_message_is_left_behind_by_a_thread_that_sleeps() {
        let mut model = loom::model::Builder::new();
        // Without a bound it takes a minute and finds nothing more.
        model.preemption_bound = Some(PREEMPTIONS_MAX);
        model.check(|| {
            let shared =
                Arc::new((Bell::new(), Mutex::new(VecDeque::new()), Edge(Mutex::new(false), Condvar::new())));
            let senders: Vec<_> = (0..2)
                .map(|id| {
                    let shared = shared.clone();
                    thread::spawn(move || {
                        let (bell, queue, edge) = &*shared;
                        queue.lock().unwrap().push_back(id);
                        if bell.ring() {
                            edge.write();
                        }
                    })
                })
                .collect();

            let (bell, queue, edge) = &*shared;
            let mut received = 0;
            while received < 2 {
                if bell.is_rung() {
                    bell.answer();
                    received += queue.lock().unwrap().drain(..).count();
                } else if bell.try_sleep() {
                    edge.wait(); // A lost wake-up is a deadlock, which the model checker reports.
                    bell.awake();
                }
            }
            for sender in senders {
                sender.join().unwrap();
            }
        });
    }

    /// An in-band kick has no message: the ring itself must make the kicker's writes visible.
    #[test]
    fn what_was_written_before_a_ring_is_seen_after_the_answer() {
        loom::model(|| {
            let shared = Arc::new((Bell::new(), AtomicU32::new(0)));
            let kicker = {
                let shared = shared.clone();
                thread::spawn(move || {
                    shared.1.store(7, Ordering::Relaxed);
                    let _wakes = shared.0.ring();
                })
            };
            if shared.0.is_rung() {
                shared.0.answer();
                assert_eq!(shared.1.load(Ordering::Relaxed), 7);
            }
            kicker.join().unwrap();
        });
    }
}

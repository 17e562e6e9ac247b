//! An I/O thread as the other threads see it.

mod message;
mod slot;
mod turn;

use std::cell::Cell;
use std::fmt;
use std::num::NonZeroU64;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError, Weak, mpsc};
use std::thread::JoinHandle;

use rustix::thread::{CpuSet, sched_setaffinity, set_current_timer_slack};

pub(crate) use message::{Build, Message, Refusal};

use crate::epoll::Epoll;
use crate::mailbox::{Outbox, mailbox};
use crate::policy::Mode;
use crate::record::Record;
use crate::spare::TakenCpu;
use crate::stats::ThreadCounters;
use crate::{Budget, Clock, Error};

thread_local! {
    static IS_IO_THREAD: Cell<bool> = const { Cell::new(false) };
}

/// Fails if the calling thread is an I/O thread, which must not wait for one.
pub(crate) fn must_not_be_io_thread(call: &'static str) -> Result<(), Error> {
    if IS_IO_THREAD.get() { Err(Error::OnIoThread { call }) } else { Ok(()) }
}

/// The handle of a running thread.
pub(crate) struct Thread {
    pub(crate) name: String,
    pub(crate) cpu: u32,
    pub(crate) counters: Arc<ThreadCounters>,
    outbox: Outbox<Message>,
    /// The pollers on it. Only for those who report.
    roster: Mutex<Vec<Weak<Record>>>,
    join: Mutex<Option<JoinHandle<()>>>,
}

impl Thread {
    /// Starts a thread, bound to `cpu` if it is to `pin`. Its name is cut to the 15 bytes that Linux keeps.
    pub(crate) fn start(name: String, cpu: u32, pin: bool, budget: Budget) -> Result<Self, Error> {
        let failed = |source: std::io::Error| Error::Start { thread: name.clone(), source };
        let clock = Clock::get();
        let (outbox, inbox) = mailbox().map_err(|errno| failed(errno.into()))?;
        let epoll = Epoll::new(inbox.as_fd()).map_err(|errno| failed(errno.into()))?;
        let counters = Arc::new(ThreadCounters::default());
        let bound = pin.then(|| TakenCpu::bound(cpu));
        let join = std::thread::Builder::new()
            .name(name.clone())
            .spawn({
                let (name, counters) = (name.clone(), counters.clone());
                move || {
                    let _bound = bound;
                    IS_IO_THREAD.set(true);
                    settle(&name, pin.then_some(cpu));
                    turn::Turn::new(clock, inbox, epoll, budget, counters).run();
                }
            })
            .map_err(failed)?;
        let (roster, join) = (Mutex::default(), Mutex::new(Some(join)));
        Ok(Self { name, cpu, counters, outbox, roster, join })
    }

    /// Has a poller built and added, and waits for it.
    pub(crate) fn add(&self, record: &Arc<Record>, mode: Mode, build: Build) -> Result<(), Error> {
        let (reply, answer) = mpsc::sync_channel(1);
        let poller = || record.label.clone();
        let thread = || self.name.clone();
        self.tell(Message::Add { record: record.clone(), mode, build, reply });
        // A message that is not read is dropped, and the reply's sender with it.
        match answer.recv() {
            Ok(Ok(())) => {}
            Ok(Err(Refusal::Watch(source))) => {
                return Err(Error::Watch { poller: poller(), thread: thread(), source });
            }
            Ok(Err(Refusal::Panicked)) => return Err(Error::Panicked { poller: poller(), thread: thread() }),
            Ok(Err(Refusal::Stopping)) | Err(_) => return Err(Error::Stopped { thread: thread() }),
        }
        let mut roster = self.roster.lock().unwrap_or_else(PoisonError::into_inner);
        roster.retain(|record| record.strong_count() > 0);
        roster.push(Arc::downgrade(record));
        Ok(())
    }

    /// Sends a message; a thread that has ended needs none.
    pub(crate) fn tell(&self, message: Message) {
        self.outbox.send(message);
    }

    /// Makes it take a turn soon.
    pub(crate) fn ring(&self) {
        self.outbox.ring();
    }

    /// The pollers on it.
    pub(crate) fn pollers(&self) -> Vec<Arc<Record>> {
        let roster = self.roster.lock().unwrap_or_else(PoisonError::into_inner);
        roster.iter().filter_map(Weak::upgrade).filter(|record| !record.is_gone()).collect()
    }

    /// Waits until it has ended.
    pub(crate) fn join(&self) {
        let handle = self.join.lock().unwrap_or_else(PoisonError::into_inner).take();
        if handle.is_some_and(|handle| handle.join().is_err()) {
            tracing::error!(thread = self.name, "an I/O thread panicked");
        }
    }
}

impl fmt::Debug for Thread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Thread").field("name", &self.name).field("cpu", &self.cpu).finish_non_exhaustive()
    }
}

/// Pins the calling thread to `cpu`, if there is one, and makes its short sleeps exact.
fn settle(name: &str, cpu: Option<u32>) {
    if let Some(cpu) = cpu {
        let mut mask = CpuSet::new();
        mask.set(cpu as usize);
        if let Err(error) = sched_setaffinity(None, &mask) {
            tracing::warn!(thread = name, cpu, %error, "cannot pin an I/O thread; it runs anywhere");
        }
    }
    // The default lets a wake-up be 50 µs late (prctl(2), PR_SET_TIMERSLACK).
    if let Err(error) = set_current_timer_slack(NonZeroU64::new(1)) {
        tracing::debug!(thread = name, %error, "deadlines may be met up to 50 µs late");
    }
}

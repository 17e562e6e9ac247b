//! The I/O threads of a process.
//!
//! A pool knows which CPUs it may use and starts a thread on one of them when the first queue is placed there. The
//! program makes one, transports place their queues on it as devices are attached.

use std::sync::{Arc, Mutex};

use crate::book::{Book, Lease, lock};
use crate::cpus::Machine;
use crate::handle::Seat;
use crate::log_limit::LogLimit;
use crate::placement::{self, Warning, Wish};
use crate::policy::Mode;
use crate::record::PollerState;
use crate::spare::TakenCpu;
use crate::stats::{PollerStats, ThreadStats};
use crate::thread::{Message, Thread, must_not_be_io_thread};
use crate::{Budget, Clock, Error, watchdog};

/// How a pool is set up.
#[derive(Clone, Debug)]
pub struct Options {
    /// Threads are named `prefix-0`, `prefix-1` and so on; the first 10 printable ASCII characters count.
    pub prefix: String,
    /// Which CPUs, how many threads.
    pub wish: Wish,
    /// The quota of each poller per turn.
    pub budget: Budget,
    /// Whether each thread is bound to its CPU. One that is not runs where the kernel puts it, which is for comparison.
    pub pin: bool,
    /// Whether queues are to be polled for good. If not, nobody is told that only some of them could be.
    pub polls: bool,
}

/// Packets and bytes that the kernel's vhost-net lets one queue have before it is another's turn
/// (`VHOST_NET_PKT_WEIGHT` and `VHOST_NET_WEIGHT`, drivers/vhost/net.c).
pub const BUDGET_DEFAULT: Budget = Budget { requests: 256, bytes: 0x80000 };

impl Default for Options {
    fn default() -> Self {
        Self {
            prefix: "io".to_owned(),
            wish: Wish::default(),
            budget: BUDGET_DEFAULT,
            pin: true,
            polls: true,
        }
    }
}

/// The I/O threads. Shared by whoever attaches devices. Dropping it stops them.
#[derive(Debug)]
pub struct Pool {
    book: Arc<Mutex<Book>>,
    prefix: String,
    budget: Budget,
    pin: bool,
    /// Where its threads are or will be bound.
    _cpus: Vec<TakenCpu>,
    /// A guest can have its queues placed as often as it likes.
    degraded: LogLimit,
}

/// What one I/O thread does and has done.
#[derive(Clone, Debug)]
pub struct ThreadReport {
    /// Its name.
    pub name: String,
    /// Its CPU, if it is bound to it.
    pub cpu: u32,
    /// Its counters.
    pub stats: ThreadStats,
    /// The pollers on it.
    pub pollers: Vec<PollerReport>,
}

/// What one poller has done.
#[derive(Clone, Debug)]
pub struct PollerReport {
    /// Its label.
    pub label: String,
    /// Where it is in its life.
    pub state: PollerState,
    /// Its counters.
    pub stats: PollerStats,
}

impl Pool {
    /// Lays out the threads for this machine. They start when queues are placed on them. Takes about 10 ms the first
    /// time in a process, for the [`Clock`].
    ///
    /// # Errors
    /// [`Error::Placement`] if the CPUs wanted are not to be had, [`Error::Start`] if the thread that watches over
    /// [guarded](crate::guarded) calls cannot be started.
    pub fn start(options: Options) -> Result<Self, Error> {
        Self::start_on(&Machine::read(), options)
    }

    /// The same for a machine that was read before, or made up.
    ///
    /// # Errors
    /// See [`start`](Self::start).
    pub fn start_on(machine: &Machine, options: Options) -> Result<Self, Error> {
        /// Linux keeps 15 bytes of a thread's name; a dash and four digits must fit.
        const PREFIX_BYTES_MAX: usize = 10;
        let layout = placement::layout(machine, &options.wish)?;
        for warning in layout.warnings.iter().filter(|_| options.polls) {
            tracing::warn!("{warning}");
        }
        let _ = Clock::get();
        watchdog::start().map_err(|source| Error::Start { thread: "watchdog".to_owned(), source })?;
        let prefix = options.prefix.chars().filter(char::is_ascii_graphic).take(PREFIX_BYTES_MAX).collect();
        let bound_to = if options.pin { layout.seats.as_slice() } else { &[] };
        let cpus = bound_to.iter().copied().map(TakenCpu::planned).collect();
        Ok(Self {
            book: Arc::new(Mutex::new(Book::new(layout))),
            _cpus: cpus,
            prefix,
            budget: options.budget,
            pin: options.pin,
            degraded: LogLimit::new(),
        })
    }

    /// The CPUs of the threads there are or may be.
    #[must_use]
    pub fn cpus(&self) -> Vec<u32> {
        lock(&self.book).layout.seats.clone()
    }

    /// Reserves a place for one poller. Pollers of the same `group` (both directions of a queue pair, say) get the
    /// same thread; a new group gets the least loaded one.
    ///
    /// # Errors
    /// [`Error::Start`] if a thread cannot be started, [`Error::Stopped`] if the pool was stopped.
    pub fn place(&self, group: &str, mode: Mode) -> Result<Seat, Error> {
        self.place_apart(group, mode, &[])
    }

    /// The same, away from the CPUs `taken` by whoever makes the requests, as long as others are free.
    ///
    /// # Errors
    /// See [`place`](Self::place).
    pub fn place_apart(&self, group: &str, mode: Mode, taken: &[u32]) -> Result<Seat, Error> {
        let lease = Lease::take(&self.book, group, mode, taken);
        let thread = self.thread(lease.seat())?;
        if lease.mode() != mode {
            let pollers_max = lock(&self.book).layout.pollers_max;
            if self.degraded.admits() {
                tracing::warn!("{}", Warning::Degraded { group: group.to_owned(), pollers_max });
            }
        }
        Ok(Seat { thread, lease })
    }

    fn thread(&self, seat: usize) -> Result<Arc<Thread>, Error> {
        let mut book = lock(&self.book);
        let name = format!("{}-{seat}", self.prefix);
        if book.stopped {
            return Err(Error::Stopped { thread: name });
        }
        if let Some(thread) = &book.threads[seat] {
            return Ok(thread.clone());
        }
        let thread = Arc::new(Thread::start(name, book.layout.seats[seat], self.pin, self.budget)?);
        book.threads[seat] = Some(thread.clone());
        Ok(thread)
    }

    /// What every running thread and its pollers did so far.
    #[must_use]
    pub fn report(&self) -> Vec<ThreadReport> {
        let threads: Vec<_> = lock(&self.book).threads.iter().flatten().cloned().collect();
        let pollers = |thread: &Thread| {
            let report = |record: Arc<crate::record::Record>| PollerReport {
                label: record.label.clone(),
                state: record.state(),
                stats: record.counters.sample(),
            };
            thread.pollers().into_iter().map(report).collect()
        };
        let report = |thread: Arc<Thread>| ThreadReport {
            name: thread.name.clone(),
            cpu: thread.cpu,
            stats: thread.counters.sample(),
            pollers: pollers(&thread),
        };
        threads.into_iter().map(report).collect()
    }

    /// Stops it: every poller drains and is dropped on its thread, then the threads end. Returns after that. Later
    /// calls of [`place`](Self::place) fail; handles that are still held may be dropped or removed at leisure.
    ///
    /// # Errors
    /// [`Error::OnIoThread`] if called on an I/O thread; the threads stop all the same, but later.
    pub fn stop(&self) -> Result<(), Error> {
        let threads: Vec<_> = {
            let mut book = lock(&self.book);
            book.stopped = true;
            book.threads.iter().flatten().cloned().collect()
        };
        threads.iter().for_each(|thread| thread.tell(Message::Stop));
        must_not_be_io_thread("Pool::stop")?;
        threads.iter().for_each(|thread| thread.join());
        Ok(())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}

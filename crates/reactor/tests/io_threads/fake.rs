//! A queue with a driver on this side and a poller on the other.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

use reactor::{Budget, CpuList, Machine, Mode, Options, Poller, PollerHandle, Pool, Ticks, Work};
use rustix::event::{EventfdFlags, eventfd};

/// Long enough for the slowest machine; only a failing test waits for it.
const DEADLINE: Duration = Duration::from_secs(120);

/// Waits for a condition.
#[track_caller]
pub(crate) fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "waited in vain until {what}");
        std::thread::yield_now();
    }
}

/// A pool with one thread.
pub(crate) fn pool() -> Pool {
    let first = Machine::read().allowed[0].id.to_string();
    let cpus: Option<CpuList> = first.parse().ok();
    Pool::start(Options {
        wish: reactor::placement::Wish { cpus, ..Default::default() },
        ..Options::default()
    })
    .unwrap()
}

/// What the driver and the poller share.
#[derive(Debug)]
pub(crate) struct Queue {
    pending: AtomicU64,
    served: AtomicU64,
    armed: AtomicBool,
    kick: OwnedFd,
    /// Keeps `drain` from finishing.
    pub(crate) in_flight: AtomicBool,
    pub(crate) drains: AtomicU64,
    pub(crate) dropped: AtomicBool,
}

impl Queue {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            pending: AtomicU64::new(0),
            served: AtomicU64::new(0),
            armed: AtomicBool::new(false),
            kick: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap(),
            in_flight: AtomicBool::new(false),
            drains: AtomicU64::new(0),
            dropped: AtomicBool::new(false),
        })
    }

    /// Has it served on the pool.
    pub(crate) fn serve(self: &Arc<Self>, pool: &Pool, mode: Mode) -> PollerHandle {
        let queue = self.clone();
        pool.place("queue", mode).unwrap().add("queue", move || Box::new(Server(queue))).unwrap()
    }

    /// Makes requests available, without a kick.
    pub(crate) fn offer(&self, requests: u64) {
        self.pending.fetch_add(requests, Ordering::Release);
    }

    /// Makes one request available and kicks if the other side asked for it.
    pub(crate) fn submit(&self) {
        self.offer(1);
        fence(Ordering::SeqCst);
        if self.armed.load(Ordering::Relaxed) {
            self.kick();
        }
    }

    pub(crate) fn kick(&self) {
        rustix::io::write(&self.kick, &1_u64.to_ne_bytes()).unwrap();
    }

    pub(crate) fn served(&self) -> u64 {
        self.served.load(Ordering::Acquire)
    }

    #[track_caller]
    pub(crate) fn wait_served(&self, requests: u64) {
        wait_until("requests were served", || self.served() >= requests);
    }
}

/// The device's end.
pub(crate) struct Server(pub(crate) Arc<Queue>);

impl Poller for Server {
    fn poll(&mut self, _now: Ticks, budget: Budget) -> Work {
        let pending = self.0.pending.load(Ordering::Acquire);
        let done = pending.min(u64::from(budget.requests));
        if done > 0 {
            self.0.pending.fetch_sub(done, Ordering::AcqRel);
            self.0.served.fetch_add(done, Ordering::AcqRel);
        }
        Work { done: done as u32, more: done < pending, wake_at: None }
    }

    fn arm(&mut self) -> bool {
        self.0.armed.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.0.pending.load(Ordering::Relaxed) > 0
    }

    fn disarm(&mut self) {
        self.0.armed.store(false, Ordering::Relaxed);
    }

    fn wake_fds(&self) -> Vec<RawFd> {
        vec![self.0.kick.as_raw_fd()]
    }

    fn drain(&mut self, _now: Ticks) -> bool {
        self.0.drains.fetch_add(1, Ordering::AcqRel);
        !self.0.in_flight.load(Ordering::Acquire)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.0.dropped.store(true, Ordering::Release);
    }
}

/// What a [`Script`] is called for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Poll(Ticks),
    Arm,
    Drain,
    Drop,
}

/// A poller made of one closure, for misbehaviour. The closure's answer counts for `poll`; `arm` finds nothing and
/// `drain` has nothing in flight.
pub(crate) struct Script<F: FnMut(Call) -> Work>(pub(crate) F);

impl<F: FnMut(Call) -> Work> Poller for Script<F> {
    fn poll(&mut self, now: Ticks, _budget: Budget) -> Work {
        (self.0)(Call::Poll(now))
    }

    fn arm(&mut self) -> bool {
        (self.0)(Call::Arm).done > 0
    }

    fn disarm(&mut self) {}

    fn wake_fds(&self) -> Vec<RawFd> {
        Vec::new()
    }

    fn drain(&mut self, _now: Ticks) -> bool {
        (self.0)(Call::Drain).done == 0
    }
}

impl<F: FnMut(Call) -> Work> Drop for Script<F> {
    fn drop(&mut self) {
        (self.0)(Call::Drop);
    }
}

//! A driver that answers each completion with a new request, and then has none: polled, or asleep until it is called.
//!
//! It has no timeouts. A kick or a call that gets lost leaves it waiting for good, for the watchdog to find.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use virtio::fake::{FakeDriver, FakeOptions};
use virtio::ring::Buffer;
use virtio::{EventFdCall, Kick, QueueConfig, RingFormat, Trust};

/// A run ends after so many requests, or so much time: what is shorter.
const REQUESTS_MAX: u64 = 2000;
const RUN: Duration = Duration::from_millis(4);
/// Pauses last up to this power of two in ns, 262 µs: more than any polling window.
const PAUSE_BITS_MAX: u64 = 18;
const SECTOR_BYTES: usize = 512;
/// What a status byte holds before the device writes it.
const UNWRITTEN: u8 = 0xff;
const MEMORY_BYTES: u64 = 256 << 10;

/// xorshift64*.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn chance(&mut self) -> bool {
        self.next() >> 63 == 1
    }
}

/// Does nothing for a while, of a length that may be anything: what falls between looking and sleeping is rare, and
/// lengths around that of a polling window find it more often.
pub(crate) fn pause(random: &mut Random) {
    let nanos = random.next() % (1 << (random.next() % (PAUSE_BITS_MAX + 1)));
    let until = Instant::now() + Duration::from_nanos(nanos);
    while Instant::now() < until {
        std::hint::spin_loop();
    }
}

/// The ring and the ways of a client.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) format: RingFormat,
    pub(crate) depth: u16,
    pub(crate) event_idx: bool,
    pub(crate) sleeps: bool,
    pub(crate) pauses: bool,
    /// Kicks through [`virtio::QueueSet::wake`] instead of a descriptor.
    pub(crate) in_band: bool,
}

/// How far a client has come, for whoever looks on.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    pub(crate) submitted: AtomicU64,
    pub(crate) completed: AtomicU64,
    pub(crate) kicks: AtomicU64,
    /// Sleeps begun and ended.
    pub(crate) sleeps: AtomicU64,
    pub(crate) wakes: AtomicU64,
}

impl Progress {
    fn count(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Ordering::Relaxed);
    }
}

/// A queue's driver.
pub(crate) struct Client {
    driver: FakeDriver,
    shape: Shape,
    kick: Arc<OwnedFd>,
    call: Arc<OwnedFd>,
    progress: Arc<Progress>,
    /// Header, data and status of each request.
    chains: Vec<[Buffer; 3]>,
    /// The request of a chain in flight, by the ring's id.
    request_of: Vec<usize>,
    random: Random,
}

impl Client {
    pub(crate) fn new(shape: Shape, progress: Arc<Progress>, seed: u64) -> Self {
        // As small as it may be: it wraps around often.
        let size = (shape.depth * 3).next_power_of_two();
        let mut driver = FakeDriver::new(FakeOptions {
            format: shape.format,
            size,
            event_idx: shape.event_idx,
            memory_bytes: MEMORY_BYTES,
            ..FakeOptions::default()
        });
        driver.ring.disarm_calls();
        // A read of the first sector: a header of zeros.
        let chain = |_| [driver.readable(&[0; 16]), driver.writable(SECTOR_BYTES), driver.writable(1)];
        let chains = (0..shape.depth).map(chain).collect();
        let event = || Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap());
        let (kick, call) = (event(), event());
        let request_of = vec![usize::MAX; size.into()];
        Self { driver, shape, kick, call, progress, chains, request_of, random: Random(seed | 1) }
    }

    pub(crate) fn driver(&self) -> &FakeDriver {
        &self.driver
    }

    pub(crate) fn shape(&self) -> Shape {
        self.shape
    }

    pub(crate) fn kick(&self) -> &Arc<OwnedFd> {
        &self.kick
    }

    pub(crate) fn call(&self) -> &Arc<OwnedFd> {
        &self.call
    }

    /// What starts its queue.
    pub(crate) fn queue_config(&self, index: u16) -> QueueConfig {
        let kick = if self.shape.in_band { Kick::Wake } else { Kick::Fd(self.kick.try_clone().unwrap()) };
        let call = EventFdCall::new(self.call.try_clone().unwrap(), Trust::default()).unwrap();
        QueueConfig { index, kick, call: Some(Arc::new(call)), ..self.driver.queue_config() }
    }

    /// Has requests in flight for a while, and waits for the last of them. `wake` kicks in band.
    pub(crate) fn drive(&mut self, wake: impl Fn()) {
        let over = Instant::now() + RUN;
        (0..self.chains.len()).for_each(|request| self.submit(request));
        self.publish(&wake);
        let mut in_flight = self.chains.len();
        let mut submitted = in_flight as u64;
        while in_flight > 0 {
            let Some(request) = self.reap() else {
                self.wait();
                continue;
            };
            if submitted >= REQUESTS_MAX || Instant::now() >= over {
                in_flight -= 1;
                continue;
            }
            if self.shape.pauses && self.random.chance() {
                pause(&mut self.random);
            }
            self.submit(request);
            self.publish(&wake);
            submitted += 1;
        }
    }

    fn submit(&mut self, request: usize) {
        let chain = &self.chains[request];
        self.driver.write(chain[2].addr, &[UNWRITTEN]);
        let id = self.driver.ring.add(chain).unwrap();
        self.request_of[usize::from(id)] = request;
        Progress::count(&self.progress.submitted, 1);
    }

    fn publish(&mut self, wake: &impl Fn()) {
        self.driver.ring.publish();
        if !self.driver.ring.needs_kick() {
            return;
        }
        Progress::count(&self.progress.kicks, 1);
        if self.shape.in_band {
            wake();
        } else {
            rustix::io::write(&*self.kick, &1_u64.to_ne_bytes()).unwrap();
        }
    }

    /// The next request that is done, if there is one.
    fn reap(&mut self) -> Option<usize> {
        let completion = self.driver.ring.reap().unwrap()?;
        let request = std::mem::replace(&mut self.request_of[usize::from(completion.id)], usize::MAX);
        assert_eq!(self.driver.read(self.chains[request][2].addr, 1), [0], "the status of request {request}");
        Progress::count(&self.progress.completed, 1);
        Some(request)
    }

    fn wait(&mut self) {
        if !self.shape.sleeps {
            return std::hint::spin_loop();
        }
        if !self.driver.ring.arm_calls() {
            Progress::count(&self.progress.sleeps, 1);
            poll(&mut [PollFd::from_borrowed_fd(self.call.as_fd(), PollFlags::IN)], None).unwrap();
            Progress::count(&self.progress.wakes, 1);
        }
        self.driver.ring.disarm_calls();
        // What was called for so far. A counter of zero is an error.
        let _ = rustix::io::read(&*self.call, &mut [0_u8; 8]);
    }
}

//! Limits that are replaced while a queue pauses for them, on a real I/O thread that sleeps.
#![allow(clippy::unwrap_used, reason = "tests")]

mod fake;

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blk::backends::null::Null;
use blk::{Blk, Options, RateLimit};
use fake::{IN, header};
use reactor::{Mode, Pool};
use virtio::QueueSet;
use virtio::fake::{FakeDriver, FakeOptions};

/// Far below the pause, and far above what anything takes.
const DEADLINE: Duration = Duration::from_secs(120);

fn bytes_per_s(rate: u64) -> RateLimit {
    RateLimit { iops: None, bytes_per_s: NonZeroU64::new(rate), burst_ms: 1 }
}

struct Vm {
    disk: Arc<Blk>,
    pool: Arc<Pool>,
    guest: FakeDriver,
    queues: QueueSet,
}

impl Vm {
    fn new(rate: RateLimit) -> Self {
        let disk = Blk::new(Arc::new(Null::new(1 << 20)), Options { rate, ..Options::default() });
        let disk = Arc::new(disk.unwrap());
        let pool = Arc::new(Pool::start(reactor::Options::default()).unwrap());
        let guest = FakeDriver::new(FakeOptions::default());
        let mut queues = QueueSet::new(disk.clone(), pool.clone(), Mode::Notify, "disk");
        queues.start(guest.queue_config()).unwrap();
        Self { disk, pool, guest, queues }
    }

    fn send(&mut self) {
        let buffers = [self.guest.readable(&header(IN, 0)), self.guest.writable(4097)];
        self.guest.offer(&buffers, false);
        self.queues.wake(0);
    }

    fn is_answered(&mut self) -> bool {
        self.guest.ring.reap().unwrap().is_some()
    }

    /// Waits until the thread sleeps with a pause to end.
    fn wait_for_pause(&self) {
        let sleeps = || self.pool.report()[0].stats.sleeps;
        eventually("the pause begins", || self.disk.counters().throttled > 0);
        let before = sleeps();
        self.queues.wake(0);
        eventually("the thread sleeps", || sleeps() > before);
    }
}

fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < DEADLINE, "{what}: not within {DEADLINE:?}");
        std::thread::yield_now();
    }
}

#[test]
fn a_pause_ends_when_its_limit_is_replaced() {
    for replaced in [RateLimit::NONE, bytes_per_s(1 << 30)] {
        // After 4 KiB, a pause of more than an hour.
        let mut vm = Vm::new(bytes_per_s(1));
        vm.send();
        eventually("the first request is answered", || vm.is_answered());
        vm.send();
        vm.wait_for_pause();
        assert!(!vm.is_answered(), "it is held back");
        vm.disk.set_rate_limit(replaced);
        eventually("the pause ends", || vm.is_answered());
    }
}

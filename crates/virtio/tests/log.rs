//! A driver that breaks its ring after every reset fills no log.
#![allow(clippy::unwrap_used)]

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use reactor::{Budget, Mode, Options, Poller, Pool, Ticks, Work};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};
use virtio::fake::{FakeDriver, FakeOptions};
use virtio::{Device, GuestAddr, NotReady, PollerBuilder, Queue, QueueSet};

/// Counts what is logged, on any thread.
struct Count;

static LOGGED: AtomicU64 = AtomicU64::new(0);

impl Subscriber for Count {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        if event.metadata().target().starts_with("virtio") {
            LOGGED.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// Takes requests and never completes one.
struct Sink;

impl Device for Sink {
    fn device_id(&self) -> u32 {
        63
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> u16 {
        1
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn start_queue(&self, queue: Queue) -> Result<PollerBuilder, NotReady> {
        Ok(Box::new(move || Box::new(SinkQueue(queue))))
    }
}

struct SinkQueue(Queue);

impl Poller for SinkQueue {
    fn poll(&mut self, _now: Ticks, _budget: Budget) -> Work {
        self.0.pop(1, &mut Vec::new());
        Work { done: 0, more: false, wake_at: None }
    }

    fn arm(&mut self) -> bool {
        self.0.arm()
    }

    fn disarm(&mut self) {
        self.0.disarm();
    }

    fn wake_fds(&self) -> Vec<RawFd> {
        Vec::new()
    }

    fn drain(&mut self, _now: Ticks) -> bool {
        true
    }
}

#[test]
fn a_ring_that_breaks_again_and_again_is_mentioned_a_few_times_a_second() {
    const TIMES: u64 = 200;
    tracing::subscriber::set_global_default(Count).unwrap();
    let driver = FakeDriver::new(FakeOptions::default());
    let pool = Arc::new(Pool::start(Options::default()).unwrap());
    let mut queues = QueueSet::new(Arc::new(Sink), pool, Mode::Hybrid, "sink");
    // More available than the ring has.
    driver.write(GuestAddr(driver.ring_config().driver.0 + 2), &1000u16.to_le_bytes());
    let began = Instant::now();
    for _ in 0..TIMES {
        queues.start(driver.queue_config()).unwrap();
        while queues.error(0).is_none() {
            assert!(began.elapsed() < Duration::from_secs(120), "the ring does not break");
            std::thread::yield_now();
        }
        queues.stop(0);
    }
    let (logged, seconds) = (LOGGED.load(Ordering::SeqCst), began.elapsed().as_secs() + 2);
    assert!((1..=8 * seconds).contains(&logged), "{logged} messages in {seconds} s");
}

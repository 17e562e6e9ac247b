//! What a queue tells its doorbell, and what it makes of the answers.
#![allow(clippy::unwrap_used)]

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use rustix::event::{EventfdFlags, eventfd};
use virtio::fake::{FakeDriver, FakeOptions};
use virtio::{Doorbell, Kick, Queue, QueueConfig};

/// Notes what it is told.
#[derive(Debug)]
struct Bell {
    fd: OwnedFd,
    awake: AtomicUsize,
    listened: AtomicUsize,
    rung: AtomicBool,
}

impl Doorbell for Bell {
    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn awake(&self) {
        self.awake.fetch_add(1, Ordering::Relaxed);
    }

    fn listen(&self) -> bool {
        self.listened.fetch_add(1, Ordering::Relaxed);
        self.rung.swap(false, Ordering::Relaxed)
    }
}

fn queue(driver: &FakeDriver) -> (Arc<Bell>, Queue) {
    let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let bell = Arc::new(Bell {
        fd,
        awake: AtomicUsize::new(0),
        listened: AtomicUsize::new(0),
        rung: AtomicBool::new(false),
    });
    let config = QueueConfig { kick: Kick::Doorbell(bell.clone()), ..driver.queue_config() };
    (bell, Queue::new(config).unwrap().0)
}

#[test]
fn it_is_told_when_the_queue_sleeps_and_wakes_and_now_and_then_in_between() {
    let (bell, mut queue) = queue(&FakeDriver::new(FakeOptions::default()));
    assert!(queue.kick_fd().is_some());
    queue.disarm();
    assert_eq!(bell.awake.load(Ordering::Relaxed), 1);
    for _ in 0..10_000 {
        queue.pop(1, &mut Vec::new());
    }
    let looks = bell.awake.load(Ordering::Relaxed) - 1;
    assert!((1..1_000).contains(&looks), "{looks} looks");
    assert!(!queue.arm());
    assert_eq!(bell.listened.load(Ordering::Relaxed), 1);
}

#[test]
fn a_ring_that_nobody_noticed_keeps_the_thread_awake_for_one_more_turn() {
    let (bell, mut queue) = queue(&FakeDriver::new(FakeOptions::default()));
    bell.rung.store(true, Ordering::Relaxed);
    assert!(queue.arm());
    assert!(!queue.arm());
}

/// A doorbell whose driver makes a request at the last moment at which nobody would notice its kick.
struct LastMoment(OwnedFd, Mutex<FakeDriver>);

impl fmt::Debug for LastMoment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LastMoment")
    }
}

impl Doorbell for LastMoment {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn awake(&self) {}

    fn listen(&self) -> bool {
        let mut driver = self.1.lock().unwrap();
        let buffer = driver.readable(b"request");
        driver.offer(&[buffer], false);
        false
    }
}

#[test]
fn a_request_made_before_the_doorbell_listens_is_found() {
    let driver = FakeDriver::new(FakeOptions::default());
    let config = driver.queue_config();
    let bell = LastMoment(eventfd(0, EventfdFlags::CLOEXEC).unwrap(), Mutex::new(driver));
    let kick = Kick::Doorbell(Arc::new(bell));
    let (mut queue, _handle) = Queue::new(QueueConfig { kick, ..config }).unwrap();
    assert!(queue.arm(), "the ring is looked at after the doorbell");
}

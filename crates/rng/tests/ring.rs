//! The device through real rings: what a driver gets from it, and what it cannot make it do.

use std::num::NonZeroU64;

use reactor::{Budget, Poller, Ticks};
use rng::{BYTES_PER_REQUEST_MAX, BYTES_PER_TURN_MAX, Rng};
use virtio::fake::{FakeDriver, FakeOptions};
use virtio::{Device, QueueHandle, RingFormat};

const BUDGET: Budget = Budget { requests: 32, bytes: 1 << 20 };
const FORMATS: [RingFormat; 2] = [RingFormat::Split, RingFormat::Packed];

fn start(options: FakeOptions, device: &Rng) -> (FakeDriver, Box<dyn Poller>, QueueHandle) {
    let driver = FakeDriver::new(options);
    let (queue, handle) = driver.queue();
    let poller = (device.start_queue(queue).expect("it needs nothing"))();
    (driver, poller, handle)
}

fn limited(bytes_per_s: u64) -> Rng {
    Rng::new(NonZeroU64::new(bytes_per_s))
}

#[test]
fn it_says_what_it_is() {
    let device = Rng::new(None);
    assert_eq!((device.device_id(), device.features(), device.queues()), (4, 0, 1));
    assert!(device.config().is_empty());
}

#[test]
fn buffers_are_filled_with_bytes_that_differ() {
    for format in FORMATS {
        let (mut driver, mut poller, handle) =
            start(FakeOptions { format, ..FakeOptions::default() }, &Rng::new(None));
        let buffers = [driver.writable(64), driver.writable(64)];
        driver.offer(&buffers[..1], false);
        driver.offer(&buffers[1..], true);
        let done = driver.run(poller.as_mut(), 2);
        assert!(done.iter().all(|completion| completion.written == 64));
        let [first, second] = buffers.map(|buffer| driver.read(buffer.addr, 64));
        assert_ne!(first, second, "512 random bits");
        assert_ne!(first, [0; 64]);
        assert_eq!(handle.counters().requests, 2);
        assert!(poller.drain(Ticks(0)), "nothing is ever held");
    }
}

#[test]
fn a_chain_of_several_buffers_is_filled_in_order() {
    let options = FakeOptions { regions: 4, ..FakeOptions::default() };
    let (mut driver, mut poller, _) = start(options, &Rng::new(None));
    let buffers = [1, 31, 7].map(|len| driver.writable(len));
    driver.offer(&buffers, false);
    assert_eq!(driver.run(poller.as_mut(), 1)[0].written, 39);
}

#[test]
fn a_request_gets_no_more_than_its_share() {
    let (mut driver, mut poller, _) = start(FakeOptions::default(), &Rng::new(None));
    let buffer = driver.writable(1 << 20);
    driver.offer(&[buffer], false);
    let written = driver.run(poller.as_mut(), 1)[0].written;
    assert!(written > 0 && u64::from(written) <= BYTES_PER_REQUEST_MAX, "{written}");
}

#[test]
fn a_turn_ends_at_its_budget_and_says_that_there_is_more() {
    let (mut driver, mut poller, _) = start(FakeOptions::default(), &Rng::new(None));
    let offer = |driver: &mut FakeDriver, count: usize| {
        for _ in 0..count {
            let buffer = driver.writable(BYTES_PER_REQUEST_MAX as usize);
            driver.offer(&[buffer], false);
        }
    };
    offer(&mut driver, 5);
    let work = poller.poll(Ticks(1), Budget { requests: 3, bytes: 1 << 20 });
    assert_eq!((work.done, work.more), (3, true));
    let work = poller.poll(Ticks(2), BUDGET);
    assert_eq!((work.done, work.more), (2, false));

    let requests = (BYTES_PER_TURN_MAX / BYTES_PER_REQUEST_MAX) as usize + 2;
    offer(&mut driver, requests);
    let work = poller.poll(Ticks(3), BUDGET);
    assert!(work.more && (work.done as usize) < requests, "{work:?}");
}

#[test]
fn a_limited_device_rests_until_it_has_something_to_give() {
    let (mut driver, mut poller, _) = start(FakeOptions::default(), &limited(1000));
    let buffers = [100, 100].map(|len| driver.writable(len));
    for buffer in buffers {
        driver.offer(&[buffer], false);
    }
    let now = Ticks(1_000_000_000);
    let work = poller.poll(now, BUDGET);
    assert_eq!(work.done, 1, "100 ms at 1000 bytes per second");
    let at = work.wake_at.expect("a time to go on");
    assert_eq!(at, now.plus_ns(64_000_000));
    assert!(!poller.arm(), "a waiting chain does not keep the thread awake");
    assert_eq!(poller.poll(Ticks(at.0 - 1), BUDGET).done, 0);
    assert_eq!(poller.poll(at, BUDGET).done, 1);
    let written = std::iter::from_fn(|| driver.ring.reap().unwrap()).map(|done| done.written);
    assert_eq!(written.collect::<Vec<_>>(), [100, 64]);
}

#[test]
fn restarting_the_queue_buys_nothing() {
    let device = limited(1000);
    let now = Ticks(1_000_000_000);
    for expected in [1, 0] {
        let (mut driver, mut poller, _) = start(FakeOptions::default(), &device);
        let buffer = driver.writable(100);
        driver.offer(&[buffer], false);
        assert_eq!(poller.poll(now, BUDGET).done, expected);
    }
}

#[test]
fn a_buffer_that_cannot_be_written_comes_back_empty() {
    let (mut driver, mut poller, _) = start(FakeOptions::default(), &Rng::new(None));
    let buffer = driver.readable(b"not for writing");
    driver.offer(&[buffer], false);
    assert_eq!(driver.run(poller.as_mut(), 1)[0].written, 0);
    assert_eq!(driver.read(buffer.addr, 15), b"not for writing");
}

#[test]
fn a_broken_ring_stops_its_queue_and_nothing_else() {
    let (mut driver, mut poller, handle) = start(FakeOptions::default(), &Rng::new(None));
    let mut buffer = driver.writable(64);
    buffer.addr.0 = 1 << 40;
    driver.offer(&[buffer], false);
    assert_eq!(poller.poll(Ticks(1), BUDGET).done, 0);
    assert!(handle.error().is_some());
    assert!(!poller.arm());
    assert!(poller.drain(Ticks(2)));
}

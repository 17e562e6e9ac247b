//! Both ends of both formats, through wrap-around, suppression, ordering, recovery and logging.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use virtio::fake::{FakeDriver, FakeOptions, MEMORY_START};
use virtio::memory::{Area, DirtyLog, Mapping, gather, scatter};
use virtio::ring::{Buffer, RingFormat, Token, Used};
use virtio::{Call, GuestAddr, Queue, UsedLog};

#[derive(Default)]
struct CountCalls(AtomicUsize);

impl Call for CountCalls {
    fn call(&self) -> bool {
        self.0.fetch_add(1, Ordering::Relaxed);
        true
    }
}

fn pop(queue: &mut Queue, max: usize) -> Vec<Token> {
    let mut tokens = Vec::new();
    queue.pop(max, &mut tokens);
    tokens
}

fn give_back(queue: &mut Queue, tokens: Vec<Token>) {
    queue.complete(tokens.into_iter().map(|token| Used { token, written: 5 }));
    queue.publish();
}

/// Echoes each chain's readable bytes into its writable ones, in random order and batch sizes, many times around the
/// ring, and checks that each chain comes back with its own answer.
fn echo(options: FakeOptions, seed: u64, rounds: usize) {
    let mut random = seed | 1;
    let mut next = move |n: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random % n as u64) as usize
    };
    let mut fake = FakeDriver::new(options);
    let size = usize::from(options.size);
    let slots: Vec<(GuestAddr, GuestAddr, GuestAddr, Area)> = (0..size)
        .map(|_| {
            let (input, output, table) = (fake.alloc(16), fake.alloc(16), fake.alloc(64));
            let area = fake.area(table, 64);
            (input, output, table, area)
        })
        .collect();
    let mut busy: Vec<Option<(usize, [u8; 16])>> = vec![None; size];
    let mut free: Vec<usize> = (0..size).collect();
    let mut order = std::collections::VecDeque::new();
    let (mut queue, handle) = fake.queue();
    let mut held: Vec<Token> = Vec::new();
    let (mut sent, mut received) = (0u64, 0u64);

    for _ in 0..rounds {
        for _ in 0..next(size + 1) {
            let Some(&slot) = free.last() else { break };
            let (input, output, table, area) = &slots[slot];
            let message = ((u128::from(sent) << 64) | u128::from(seed)).to_le_bytes();
            fake.write(*input, &message);
            let part = |addr: GuestAddr, from: u64, len, writable| Buffer {
                addr: GuestAddr(addr.0 + from),
                len,
                writable,
            };
            let buffers = [
                part(*input, 0, 7, false),
                part(*input, 7, 9, false),
                part(*output, 0, 3, true),
                part(*output, 3, 13, true),
            ];
            let added = if next(2) == 0 {
                fake.ring.add_indirect(area, *table, &buffers)
            } else {
                fake.ring.add(&buffers)
            };
            let Some(id) = added else { break };
            free.pop();
            assert!(busy[usize::from(id)].replace((slot, message)).is_none());
            order.push_back(id);
            sent += 1;
        }
        fake.ring.publish();
        queue.pop(next(size) + 1, &mut held);
        for _ in 0..next(held.len() + 1) {
            let token = held.swap_remove(next(held.len()));
            let chain = queue.chain(&token);
            let mut data = [0; 16];
            assert_eq!(gather(chain.readable, 0, &mut data), 16);
            assert_eq!(scatter(chain.writable, 0, &data), 16);
            queue.complete(std::iter::once(Used { token, written: 16 }));
        }
        queue.publish();
        while let Some(done) = fake.ring.reap().unwrap() {
            let (slot, message) = busy[usize::from(done.id)].take().expect("in flight");
            assert_eq!((done.written, &fake.read(slots[slot].1, 16)[..]), (16, &message[..]));
            if options.in_order {
                assert_eq!(order.front(), Some(&done.id));
            }
            order.retain(|&id| id != done.id);
            free.push(slot);
            received += 1;
        }
    }
    assert_eq!(handle.error(), None);
    assert_eq!(sent - received, (size - free.len()) as u64);
    assert!(received as usize > rounds / 4, "only {received} in {rounds} rounds");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_chain_comes_back_with_its_answer(
        packed: bool, event_idx: bool, in_order: bool, regions in 1u64..4, log_size in 2u32..8, seed: u64,
    ) {
        let format = if packed { RingFormat::Packed } else { RingFormat::Split };
        let size = if packed { (1 << log_size) + 3 } else { 1 << log_size };
        echo(
            FakeOptions { format, size, event_idx, in_order, regions, memory_bytes: 3 << 20, ..FakeOptions::default() },
            seed,
            2000,
        );
    }
}

#[test]
fn split_indices_wrap_at_65536() {
    let mut fake = FakeDriver::new(FakeOptions { size: 4, event_idx: true, ..FakeOptions::default() });
    let (mut queue, handle) = fake.queue();
    queue.disarm();
    let buffer = [fake.writable(8)];
    let mut kicks = 0;
    for _ in 0..70_000 {
        fake.ring.add(&buffer).unwrap();
        fake.ring.publish();
        kicks += u32::from(fake.ring.needs_kick());
        let tokens = pop(&mut queue, 4);
        assert_eq!(tokens.len(), 1);
        give_back(&mut queue, tokens);
        assert!(fake.ring.reap().unwrap().is_some());
    }
    assert_eq!(handle.error(), None);
    assert_eq!(kicks, 0, "a polling device is not kicked, however long it polls");
}

#[test]
fn kicks_and_calls_come_exactly_when_asked_for() {
    for format in [RingFormat::Split, RingFormat::Packed] {
        for event_idx in [false, true] {
            let mut fake = FakeDriver::new(FakeOptions { format, event_idx, ..FakeOptions::default() });
            let calls = Arc::new(CountCalls::default());
            let mut config = fake.queue_config();
            config.call = Some(calls.clone());
            let (mut queue, handle) = Queue::new(config).unwrap();
            let count = || calls.0.load(Ordering::Relaxed);
            let buffer = [fake.writable(8)];
            let what = format!("{format:?} event_idx={event_idx}");

            assert!(!queue.arm(), "{what}: nothing waits yet");
            fake.ring.add(&buffer).unwrap();
            fake.ring.publish();
            assert!(fake.ring.needs_kick(), "{what}: armed");
            assert!(queue.arm(), "{what}: a chain slipped in");
            queue.disarm();
            fake.ring.add(&buffer).unwrap();
            fake.ring.publish();
            assert!(!fake.ring.needs_kick(), "{what}: polling");

            // The driver waits: one call for the whole burst.
            assert!(!fake.ring.arm_calls(), "{what}: nothing has come back yet");
            let tokens = pop(&mut queue, 8);
            assert_eq!(tokens.len(), 2);
            give_back(&mut queue, tokens);
            assert_eq!(count(), 1, "{what}");
            // The driver polls: none.
            while fake.ring.reap().unwrap().is_some() {}
            fake.ring.disarm_calls();
            fake.ring.add(&buffer).unwrap();
            fake.ring.publish();
            let tokens = pop(&mut queue, 8);
            give_back(&mut queue, tokens);
            assert_eq!(count(), 1, "{what}");
            // Something came back before the driver asked.
            assert!(fake.ring.arm_calls(), "{what}: a completion slipped in");
            // A call replaced while the queue runs is used from then on.
            while fake.ring.reap().unwrap().is_some() {}
            fake.ring.arm_calls();
            let other = Arc::new(CountCalls::default());
            handle.set_call(Some(other.clone()));
            fake.ring.add(&buffer).unwrap();
            fake.ring.publish();
            let tokens = pop(&mut queue, 8);
            give_back(&mut queue, tokens);
            assert_eq!((count(), other.0.load(Ordering::Relaxed)), (1, 1), "{what}");
        }
    }
}

#[test]
fn a_queue_goes_on_where_it_was_stopped() {
    for format in [RingFormat::Split, RingFormat::Packed] {
        let mut fake = FakeDriver::new(FakeOptions { format, size: 4, ..FakeOptions::default() });
        let buffer = [fake.writable(8)];
        let mut state = None;
        for _ in 0..50 {
            let mut config = fake.queue_config();
            config.state = state;
            let (mut queue, handle) = Queue::new(config).unwrap();
            for _ in 0..3 {
                fake.ring.add(&buffer).unwrap();
            }
            fake.ring.publish();
            let tokens = pop(&mut queue, 3);
            assert_eq!(tokens.len(), 3, "{format:?}");
            give_back(&mut queue, tokens);
            for _ in 0..3 {
                assert!(fake.ring.reap().unwrap().is_some());
            }
            assert_eq!(handle.stopped_at(), None);
            drop(queue);
            state = handle.stopped_at();
            assert!(state.is_some());
        }
    }
}

#[test]
fn writes_are_logged_by_page_and_reads_are_not() {
    let mut fake = FakeDriver::new(FakeOptions { size: 8, memory_bytes: 1 << 20, ..FakeOptions::default() });
    let (bits, _file) = Mapping::anonymous("log", 4096).unwrap();
    let bits: Arc<Mapping> = Arc::new(bits);
    let log = DirtyLog::new(bits.clone(), 0, 4096).unwrap();
    assert!(log.covers(fake.memory()));
    let mut config = fake.queue_config();
    config.log = Some(UsedLog { log, used_ring: Some(fake.ring_config().device) });
    let (mut queue, _) = Queue::new(config).unwrap();
    let page = |n: u64| MEMORY_START + 0x1_0000 + n * 4096;
    let buffers = [
        Buffer { addr: GuestAddr(page(0)), len: 4096, writable: false },
        Buffer { addr: GuestAddr(page(3) - 1), len: 2, writable: true },
        Buffer { addr: GuestAddr(page(9)), len: 4096, writable: true },
    ];
    fake.ring.add(&buffers).unwrap();
    fake.ring.publish();
    let dirty = || {
        let area = Area::new(bits.clone(), 0, 4096, 8).unwrap();
        (0..4096 * 8)
            .filter(|bit| area.u8(bit / 8).load(Ordering::Relaxed) >> (bit % 8) & 1 != 0)
            .collect::<Vec<_>>()
    };
    let tokens = pop(&mut queue, 8);
    assert_eq!(dirty(), [], "nothing is marked before it is written");
    give_back(&mut queue, tokens);
    let number = |addr: u64| (addr / 4096) as usize;
    assert_eq!(
        dirty(),
        [number(fake.ring_config().device.0), number(page(2)), number(page(3)), number(page(9))]
    );
}

//! The split ring against the `virtio-queue` crate: the same driver, the same chains, the same completions must give
//! the same descriptors and the same used ring.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use proptest::prelude::*;
use virtio::fake::{FakeDriver, FakeOptions, MEMORY_START};
use virtio::ring::{Buffer, Token, Used};
use virtio::{GuestAddr, Queue};
use virtio_queue::{Queue as OracleQueue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const SIZE: u16 = 16;
const MEMORY_BYTES: u64 = 8 << 20;

#[derive(Clone, Debug)]
enum Step {
    /// Offer a chain of (readable, writable) buffers, of these lengths, through a table or not.
    Offer { readable: Vec<u32>, writable: Vec<u32>, indirect: bool },
    /// Take up to this many chains.
    Pop(usize),
    /// Complete the nth chain in flight with this many bytes.
    Complete(usize, u32),
    /// Publish, ask whether a call is due, and let the driver reap.
    Publish,
}

fn step() -> impl Strategy<Value = Step> {
    let lens = || prop::collection::vec(1u32..9000, 0..4);
    prop_oneof![
        4 => (lens(), lens(), any::<bool>())
            .prop_filter("a chain has a buffer", |(r, w, _)| !r.is_empty() || !w.is_empty())
            .prop_map(|(readable, writable, indirect)| Step::Offer { readable, writable, indirect }),
        3 => (1usize..20).prop_map(Step::Pop),
        4 => (0usize..16, any::<u32>()).prop_map(|(n, w)| Step::Complete(n, w)),
        2 => Just(Step::Publish),
    ]
}

/// A copy of the fake guest's memory for the oracle to work in.
fn oracle(fake: &FakeDriver, event_idx: bool) -> (GuestMemoryMmap, OracleQueue) {
    let memory =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(MEMORY_START), MEMORY_BYTES as usize)]).unwrap();
    let mut queue = OracleQueue::new(SIZE).unwrap();
    let config = fake.ring_config();
    queue.set_size(SIZE);
    queue.try_set_desc_table_address(GuestAddress(config.desc.0)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(config.driver.0)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(config.device.0)).unwrap();
    queue.set_event_idx(event_idx);
    queue.set_ready(true);
    (memory, queue)
}

/// The driver writes the descriptors, tables and available ring; the used ring is each device's own.
fn sync(fake: &FakeDriver, memory: &GuestMemoryMmap) {
    let config = fake.ring_config();
    let copy = |from: u64, to: u64| {
        let bytes = fake.read(GuestAddr(from), (to - from) as usize);
        memory.write_slice(&bytes, GuestAddress(from)).unwrap();
    };
    copy(MEMORY_START, config.device.0);
    copy(MEMORY_START + 4096, MEMORY_START + MEMORY_BYTES);
}

fn used_ring(fake: &FakeDriver) -> Vec<u8> {
    fake.read(fake.ring_config().device, 4 + 8 * usize::from(SIZE))
}

/// Guest address and length of each buffer.
type Places = Vec<(u64, usize)>;

fn buffers_of(queue: &Queue, token: &Token, base: usize) -> (Places, Places) {
    let chain = queue.chain(token);
    let place = |s: &virtio::Segment| (MEMORY_START + (s.as_ptr().addr() - base) as u64, s.len());
    (chain.readable.iter().map(place).collect(), chain.writable.iter().map(place).collect())
}

fn check(steps: Vec<Step>, event_idx: bool) -> Result<(), TestCaseError> {
    let options = FakeOptions { size: SIZE, event_idx, memory_bytes: MEMORY_BYTES, ..FakeOptions::default() };
    let mut fake = FakeDriver::new(options);
    let (memory, mut oracle) = oracle(&fake, event_idx);
    let mut config = fake.queue_config();
    let calls = Arc::new(CountCalls::default());
    config.call = Some(calls.clone());
    let (mut queue, _handle) = Queue::new(config).unwrap();
    let base = fake.memory().regions()[0].backing().base().as_ptr().addr();
    let mut in_flight: Vec<(Token, u16)> = Vec::new();

    for step in steps {
        match step {
            Step::Offer { readable, writable, indirect } => {
                let count = readable.len() + writable.len();
                if fake.ring.free() < count {
                    continue;
                }
                let mut buffers: Vec<Buffer> = Vec::new();
                for (lens, writable) in [(readable, false), (writable, true)] {
                    for len in lens {
                        // Buffers may overlap: nobody writes to them here.
                        buffers.push(Buffer { addr: GuestAddr(MEMORY_START + 0x40_0000), len, writable });
                    }
                }
                fake.offer(&buffers, indirect);
            }
            Step::Pop(max) => {
                sync(&fake, &memory);
                let mut tokens = Vec::new();
                queue.pop(max, &mut tokens);
                for token in tokens {
                    let chain = oracle.pop_descriptor_chain(&memory).expect("the oracle sees the chain too");
                    prop_assert_eq!(queue.chains().id(&token), chain.head_index());
                    let (readable, writable) = buffers_of(&queue, &token, base);
                    let place = |d: virtio_queue::desc::split::Descriptor| (d.addr().0, d.len() as usize);
                    prop_assert_eq!(readable, chain.clone().readable().map(place).collect::<Vec<_>>());
                    prop_assert_eq!(writable, chain.clone().writable().map(place).collect::<Vec<_>>());
                    in_flight.push((token, chain.head_index()));
                }
            }
            Step::Complete(n, written) => {
                if in_flight.is_empty() {
                    continue;
                }
                let (token, head) = in_flight.remove(n % in_flight.len());
                queue.complete(std::iter::once(Used { token, written }));
                oracle.add_used(&memory, head, written).unwrap();
            }
            Step::Publish => {
                sync(&fake, &memory);
                let before = calls.0.load(std::sync::atomic::Ordering::Relaxed);
                let published = used_ring(&fake);
                queue.publish();
                let called = calls.0.load(std::sync::atomic::Ordering::Relaxed) != before;
                let news = used_ring(&fake)[2..4] != published[2..4];
                if news {
                    prop_assert_eq!(called, oracle.needs_notification(&memory).unwrap());
                }
                let mut theirs = vec![0; 4 + 8 * usize::from(SIZE)];
                memory.read_slice(&mut theirs, GuestAddress(fake.ring_config().device.0)).unwrap();
                // The flags are about kicks and not compared.
                prop_assert_eq!(&used_ring(&fake)[2..], &theirs[2..]);
                while fake.ring.reap().unwrap().is_some() {}
            }
        }
    }
    Ok(())
}

#[derive(Default)]
struct CountCalls(std::sync::atomic::AtomicUsize);

impl virtio::Call for CountCalls {
    fn call(&self) -> bool {
        self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        true
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn split_ring_agrees_with_virtio_queue(steps in prop::collection::vec(step(), 1..120), event_idx: bool) {
        check(steps, event_idx)?;
    }
}

//! Rings with anything in them. Whatever the driver writes: no panic, no endless loop, every chain accounted for, and
//! a broken ring stays quiet.

#![allow(clippy::unwrap_used)]
#![allow(unsafe_code, reason = "memory that counts is memory that a test vouches for")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use virtio::fake::{FakeDriver, FakeOptions, MEMORY_START};
use virtio::memory::{Area, Backing, Mapping, Memory, Region, total_len};
use virtio::ring::{RingFormat, Token, Used};
use virtio::{GuestAddr, Queue, RingError};

const SIZE: u16 = 8;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

fn options(format: RingFormat) -> FakeOptions {
    FakeOptions { format, size: SIZE, memory_bytes: 1 << 20, ..FakeOptions::default() }
}

/// Descriptors that are likely to be nearly right.
fn descriptor() -> impl Strategy<Value = [u8; 16]> {
    let addr = prop_oneof![
        4 => MEMORY_START..MEMORY_START + (1 << 20),
        1 => any::<u64>(),
        1 => Just(u64::MAX - 8),
        // The ring itself, as a table or a buffer.
        2 => Just(MEMORY_START),
    ];
    let len =
        prop_oneof![3 => 0u32..9000, 2 => (0u32..9).prop_map(|n| n * 16), 1 => any::<u32>(), 1 => Just(0)];
    let small = prop_oneof![5 => 0u16..SIZE, 1 => any::<u16>()];
    let flags = prop_oneof![5 => 0u16..8, 3 => (0u16..8).prop_map(|f| f | 0x80), 1 => any::<u16>()];
    (addr, len, small, flags, any::<bool>()).prop_map(|(addr, len, small, flags, swap)| {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&addr.to_le_bytes());
        raw[8..12].copy_from_slice(&len.to_le_bytes());
        // `flags, next` or `id, flags`: a format reads the other's as noise.
        let (third, fourth) = if swap { (small, flags) } else { (flags, small) };
        raw[12..14].copy_from_slice(&third.to_le_bytes());
        raw[14..].copy_from_slice(&fourth.to_le_bytes());
        raw
    })
}

fn pop(queue: &mut Queue) -> Vec<Token> {
    let mut tokens = Vec::new();
    queue.pop(64, &mut tokens);
    tokens
}

/// Takes chains, looks at every byte of them, and completes some, until the ring gives no more.
fn exercise(queue: &mut Queue) -> usize {
    let mut tokens = Vec::new();
    let mut total = 0;
    for round in 0..64 {
        let before = tokens.len();
        queue.pop(5, &mut tokens);
        total += tokens.len() - before;
        for token in &tokens {
            let chain = queue.chain(token);
            assert!(total_len(chain.readable) + total_len(chain.writable) <= 1 << 32);
            let mut byte = [0];
            for segment in chain.readable.iter().chain(chain.writable) {
                assert_eq!(segment.read(segment.len() - 1, &mut byte), 1);
            }
        }
        if round % 3 == 2 {
            queue.complete(tokens.drain(..).map(|token| Used { token, written: round }));
            queue.publish();
        }
        queue.arm();
        queue.disarm();
    }
    queue.complete(tokens.drain(..).map(|token| Used { token, written: 1 }));
    queue.publish();
    assert_eq!(queue.in_flight(), 0);
    total
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_split_ring_is_survived(
        table in prop::collection::vec(descriptor(), SIZE as usize),
        heads in prop::collection::vec(prop_oneof![5 => 0u16..SIZE, 1 => any::<u16>()], SIZE as usize),
        index in prop_oneof![5 => 0u16..=SIZE, 1 => any::<u16>()],
        event_idx: bool,
        in_order: bool,
    ) {
        let fake = FakeDriver::new(FakeOptions { event_idx, in_order, ..options(RingFormat::Split) });
        let config = fake.ring_config();
        fake.write(config.desc, &table.concat());
        fake.write(GuestAddr(config.driver.0 + 4), &heads.iter().flat_map(|h| h.to_le_bytes()).collect::<Vec<_>>());
        fake.write(GuestAddr(config.driver.0 + 2), &index.to_le_bytes());
        let (mut queue, handle) = fake.queue();
        let taken = exercise(&mut queue);
        prop_assert!(taken <= usize::from(SIZE));
        prop_assert_eq!(handle.error().is_some(), queue.is_broken());
        if index > SIZE {
            let jump = RingError::AvailJump { from: 0, to: index, size: SIZE };
            prop_assert_eq!(handle.error(), Some(jump));
        }
    }

    #[test]
    fn any_packed_ring_is_survived(
        table in prop::collection::vec(descriptor(), SIZE as usize),
        in_order: bool,
    ) {
        let fake = FakeDriver::new(FakeOptions { in_order, ..options(RingFormat::Packed) });
        fake.write(fake.ring_config().desc, &table.concat());
        let (mut queue, _handle) = fake.queue();
        exercise(&mut queue);
    }
}

/// A ring with the given descriptors, the first of which is offered. Returns what the queue found wrong.
fn split_with(table: &[(u64, u32, u16, u16)], extra: impl FnOnce(&FakeDriver)) -> Option<RingError> {
    let fake = FakeDriver::new(options(RingFormat::Split));
    let config = fake.ring_config();
    let raw: Vec<u8> = table
        .iter()
        .flat_map(|&(addr, len, flags, next)| {
            [&addr.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
        })
        .collect();
    fake.write(config.desc, &raw);
    extra(&fake);
    fake.write(GuestAddr(config.driver.0 + 2), &1u16.to_le_bytes());
    let errors = Arc::new(AtomicUsize::new(0));
    let seen = errors.clone();
    let mut config = fake.queue_config();
    config.on_error = Some(Box::new(move |_| {
        seen.fetch_add(1, Ordering::Relaxed);
    }));
    let (mut queue, handle) = Queue::new(config).unwrap();
    exercise(&mut queue);
    assert_eq!(
        errors.load(Ordering::Relaxed),
        usize::from(handle.error().is_some()),
        "the hook is called once"
    );
    handle.error()
}

const GOOD: u64 = MEMORY_START + 0x8000;

#[test]
fn faults_are_told_apart() {
    let plain = |_: &FakeDriver| {};
    assert_eq!(split_with(&[(GOOD, 64, 0, 0)], plain), None);
    assert_eq!(split_with(&[(GOOD, 0, 0, 0)], plain), None, "a buffer of no bytes is no fault");
    assert!(matches!(
        split_with(&[(GOOD, 64, NEXT, 1), (GOOD, 64, NEXT, 0)], plain),
        Some(RingError::ChainTooLong { head: 0, limit: 8 })
    ));
    assert!(matches!(
        split_with(&[(GOOD, 64, NEXT, 99)], plain),
        Some(RingError::BadNext { head: 0, next: 99, size: 8 })
    ));
    assert!(matches!(
        split_with(&[(GOOD, 64, WRITE | NEXT, 1), (GOOD, 64, 0, 0)], plain),
        Some(RingError::ReadableAfterWritable { head: 0 })
    ));
    assert!(matches!(split_with(&[(0, 64, 0, 0)], plain), Some(RingError::BadBuffer { head: 0, .. })));
    assert!(matches!(
        split_with(&[(MEMORY_START + (1 << 20) - 10, 64, 0, 0)], plain),
        Some(RingError::BadBuffer { head: 0, .. })
    ));
    assert!(matches!(split_with(&[(u64::MAX - 10, 64, 0, 0)], plain), Some(RingError::BadBuffer { .. })));
    for len in [0, 8, 17, 1025 * 16] {
        assert!(matches!(
            split_with(&[(GOOD, len, INDIRECT, 0)], plain),
            Some(RingError::BadIndirectLen { .. })
        ));
    }
    assert!(matches!(
        split_with(&[(GOOD, 16, INDIRECT | NEXT, 1)], plain),
        Some(RingError::BadIndirect { head: 0 })
    ));
    // A table in a table: flags INDIRECT inside.
    let nested = |fake: &FakeDriver| fake.write(GuestAddr(GOOD + 12), &INDIRECT.to_le_bytes());
    assert!(matches!(
        split_with(&[(GOOD, 16, INDIRECT, 0)], nested),
        Some(RingError::BadIndirect { head: 0 })
    ));
    // A table whose entry continues at itself.
    let loops = |fake: &FakeDriver| fake.write(GuestAddr(GOOD + 12), &NEXT.to_le_bytes());
    assert!(matches!(split_with(&[(GOOD, 16, INDIRECT, 0)], loops), Some(RingError::ChainTooLong { .. })));
}

#[test]
fn ring_outside_memory_or_unaligned_is_refused() {
    let fake = FakeDriver::new(options(RingFormat::Split));
    let refused = |change: fn(&mut virtio::RingConfig)| {
        let mut config = fake.queue_config();
        change(&mut config.ring);
        Queue::new(config).err()
    };
    assert!(matches!(refused(|r| r.desc = GuestAddr(0)), Some(RingError::Memory(_))));
    assert!(matches!(refused(|r| r.desc.0 += 8), Some(RingError::Memory(_))));
    assert!(matches!(refused(|r| r.driver.0 += 1), Some(RingError::Memory(_))));
    assert!(matches!(refused(|r| r.device.0 += 2), Some(RingError::Memory(_))));
    assert!(matches!(refused(|r| r.device.0 = MEMORY_START + (1 << 20) - 8), Some(RingError::Memory(_))));
    for size in [0, 7, 32769] {
        let mut config = fake.queue_config();
        config.ring.size = size;
        assert!(matches!(Queue::new(config).err(), Some(RingError::BadSize(_))), "{size}");
    }
}

/// A guest in as many regions as there may be, each a page long, and a table of descriptors in it, each of so many
/// pages at the same place; the last is writable.
fn scattered(descriptors: usize, pages: u32) -> (FakeDriver, Queue) {
    const REGIONS: u64 = 509;
    let options =
        FakeOptions { regions: REGIONS, memory_bytes: REGIONS * 4096, ..options(RingFormat::Split) };
    let mut fake = FakeDriver::new(options);
    let at = fake.alloc(1).0.next_multiple_of(4096);
    let table = fake.alloc(4096).0.next_multiple_of(4096);
    for i in 0..descriptors {
        let last = i + 1 == descriptors;
        let flags = if last { WRITE } else { NEXT };
        let mut raw = at.to_le_bytes().to_vec();
        raw.extend((pages * 4096).to_le_bytes());
        raw.extend([flags, i as u16 + 1].iter().flat_map(|word| word.to_le_bytes()));
        fake.write(GuestAddr(table + 16 * i as u64), &raw);
    }
    let ring = fake.ring_config();
    let mut raw = table.to_le_bytes().to_vec();
    raw.extend((16 * descriptors as u32).to_le_bytes());
    raw.extend([INDIRECT, 0].iter().flat_map(|word| word.to_le_bytes()));
    fake.write(ring.desc, &raw);
    fake.write(GuestAddr(ring.driver.0 + 2), &1u16.to_le_bytes());
    let queue = fake.queue().0;
    (fake, queue)
}

#[test]
fn no_chain_becomes_more_segments_than_are_allowed() {
    for (descriptors, pages) in [(1024, 500), (1024, 65), (1024, 2), (11, 100), (3, 500)] {
        let (_fake, mut queue) = scattered(descriptors, pages);
        assert!(pop(&mut queue).is_empty(), "{descriptors} descriptors over {pages} regions");
        assert!(queue.is_broken());
    }
    for (descriptors, pages) in [(1024, 1), (10, 100), (2, 500)] {
        let (_fake, mut queue) = scattered(descriptors, pages);
        let tokens = pop(&mut queue);
        let chain = queue.chain(&tokens[0]);
        let bytes = u64::from(pages) * 4096;
        assert_eq!(chain.readable.len(), (descriptors - 1) * pages as usize);
        assert_eq!(total_len(chain.readable), (descriptors as u64 - 1) * bytes);
        assert_eq!(total_len(chain.writable), bytes, "what is readable is not writable");
        assert!(!queue.is_broken());
        queue.complete(tokens.into_iter().map(|token| Used { token, written: 0 }));
    }
}

#[test]
fn truncated_guest_memory_breaks_the_queue_and_nothing_else() {
    let fake = FakeDriver::new(options(RingFormat::Split));
    // A file without seals, as a peer could pass it.
    let file = rustix::fs::memfd_create("victim", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, 1 << 20).unwrap();
    let mapping = Mapping::new(&file, 0, 1 << 20).unwrap();
    let memory = Arc::new(
        Memory::new(vec![Region::new(GuestAddr(MEMORY_START), Arc::new(mapping)).unwrap()]).unwrap(),
    );
    let mut config = fake.queue_config();
    config.memory = memory.clone();
    let (mut queue, handle) = Queue::new(config).unwrap();
    // One request, then the memory vanishes.
    let ring = fake.ring_config();
    let desc = memory.area(ring.desc, 16, 16).unwrap();
    desc.u64(0).store(GOOD, Ordering::Relaxed);
    desc.u32(8).store(64, Ordering::Relaxed);
    memory.area(ring.driver, 4, 2).unwrap().u16(2).store(1, Ordering::Release);
    rustix::fs::ftruncate(&file, 0).unwrap();
    let mut tokens = Vec::new();
    for _ in 0..3 {
        queue.pop(8, &mut tokens);
        queue.complete(tokens.drain(..).map(|token| Used { token, written: 0 }));
        queue.publish();
    }
    assert!(memory.is_poisoned());
    // The other guest's memory is untouched.
    assert!(!fake.memory().is_poisoned());
    drop(queue);
    assert!(handle.stopped_at().is_some());
}

/// A file of `pages` pages that can be truncated, and its mapping.
fn truncatable(pages: u64) -> (std::os::fd::OwnedFd, Arc<Mapping>) {
    let file = rustix::fs::memfd_create("victim", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, pages * 4096).unwrap();
    let mapping = Arc::new(Mapping::new(&file, 0, pages * 4096).unwrap());
    (file, mapping)
}

/// The kernel's list of a process's mappings ends, and a page that cannot be replaced ends the process.
#[test]
fn however_many_pages_are_lost_the_list_of_mappings_stays_short() {
    const PAGES: u64 = 4000;
    let (file, mapping) = truncatable(PAGES);
    let area = Area::new(mapping.clone(), 0, PAGES as usize * 4096, 4096).unwrap();
    let mappings = || std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    let before = mappings();
    rustix::fs::ftruncate(&file, 0).unwrap();
    for page in (0..PAGES as usize).step_by(2) {
        assert_eq!(area.u8(page * 4096).load(Ordering::Relaxed), 0);
    }
    assert!(mapping.is_poisoned());
    assert!(mappings() < before + 20, "{before} mappings have become {}", mappings());
}

/// Memory that counts how often it is asked whether it has been taken away.
struct Asked(Mapping, Arc<AtomicUsize>);

// SAFETY: all it says is what the mapping says.
unsafe impl Backing for Asked {
    fn base(&self) -> std::ptr::NonNull<u8> {
        self.0.base()
    }

    fn len(&self) -> usize {
        self.0.len()
    }

    fn is_poisoned(&self) -> bool {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.is_poisoned()
    }
}

#[test]
fn memory_taken_away_elsewhere_is_looked_for_once() {
    let asked = Arc::new(AtomicUsize::new(0));
    let (mapping, _file) = Mapping::anonymous("guest", 1 << 20).unwrap();
    let backing = Arc::new(Asked(mapping, asked.clone()));
    let memory = Memory::new(vec![Region::new(GuestAddr(MEMORY_START), backing).unwrap()]).unwrap();
    let mut fake = FakeDriver::in_memory(options(RingFormat::Split), memory);
    let (mut queue, _handle) = fake.queue();
    let buffer = fake.readable(&[1]);
    let mut serve = || {
        fake.offer(&[buffer], false);
        let tokens = pop(&mut queue);
        assert_eq!(tokens.len(), 1);
        queue.complete(tokens.into_iter().map(|token| Used { token, written: 0 }));
        queue.publish();
        fake.ring.reap().unwrap().unwrap();
        asked.swap(0, Ordering::Relaxed)
    };
    serve();
    for _ in 0..3 {
        let (file, elsewhere) = truncatable(1);
        rustix::fs::ftruncate(&file, 0).unwrap();
        let area = Area::new(elsewhere, 0, 4096, 4096).unwrap();
        assert_eq!(area.u8(0).load(Ordering::Relaxed), 0);
        assert_eq!(serve(), 1, "looked for");
        for _ in 0..10 {
            assert_eq!(serve(), 0, "found to be elsewhere");
        }
    }
}

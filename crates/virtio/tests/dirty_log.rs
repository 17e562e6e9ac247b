//! The dirty log of a migration has exactly the pages that the device changed.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio::fake::{FakeDriver, FakeOptions, MEMORY_START};
use virtio::memory::{Area, DirtyLog, LOG_PAGE_BYTES, Mapping};
use virtio::ring::{RingFormat, Token, Used};
use virtio::{GuestAddr, Inflight, Queue, UsedLog};

const MEMORY_BYTES: usize = 2 << 20;
const LOG_BYTES: usize = 4096;
const ROUNDS: usize = 40;

type Pages = BTreeSet<u64>;

struct Scene {
    fake: FakeDriver,
    bits: Arc<Mapping>,
    /// Memory when it was last looked at.
    seen: Vec<u8>,
}

impl Scene {
    fn new(options: FakeOptions) -> Self {
        let (bits, _file) = Mapping::anonymous("log", LOG_BYTES as u64).unwrap();
        let fake = FakeDriver::new(FakeOptions { memory_bytes: MEMORY_BYTES as u64, ..options });
        Self { fake, bits: Arc::new(bits), seen: Vec::new() }
    }

    /// A queue that logs its ring as QEMU has it logged: under the address of the used ring or what takes its place.
    fn queue(&self, inflight: Option<Inflight>) -> Queue {
        let mut config = self.fake.queue_config();
        let log = DirtyLog::new(self.bits.clone(), 0, LOG_BYTES).unwrap();
        config.log = Some(UsedLog { log, used_ring: Some(self.fake.ring_config().device) });
        config.inflight = inflight;
        Queue::new(config).unwrap().0
    }

    /// The pages marked since the last time, and those that are no longer as they were then.
    fn look(&mut self) -> (Pages, Pages) {
        let area = Area::new(self.bits.clone(), 0, LOG_BYTES, 8).unwrap();
        let bits: Vec<u8> = (0..LOG_BYTES).map(|at| area.u8(at).swap(0, Ordering::SeqCst)).collect();
        let marked = (0..8 * LOG_BYTES as u64).filter(|bit| bits[*bit as usize / 8] >> (bit % 8) & 1 != 0);
        let now = self.fake.read(GuestAddr(MEMORY_START), MEMORY_BYTES);
        let page = LOG_PAGE_BYTES as usize;
        let pages = now.chunks(page).zip(self.seen.chunks(page)).enumerate();
        let changed = pages.filter(|(_, (now, before))| now != before);
        let changed = changed.map(|(index, _)| MEMORY_START / LOG_PAGE_BYTES + index as u64).collect();
        self.seen = now;
        (marked.collect(), changed)
    }

    /// Nothing changed since but for what the device does next.
    fn begin(&mut self) {
        self.look();
    }

    fn assert_exact(&mut self, what: &str) {
        let (marked, changed) = self.look();
        assert_eq!(marked, changed, "{what}: marked and changed");
    }

    fn offer(&mut self, random: &mut impl FnMut(usize) -> usize, indirect: bool) -> bool {
        let count = 1 + random(3);
        if self.fake.ring.free() < if indirect { 1 } else { count + 1 } {
            return false;
        }
        let mut buffers = vec![self.fake.readable(&[7; 16])];
        buffers.extend((0..count).map(|_| self.fake.writable(1 + random(5000))));
        self.fake.offer(&buffers, indirect);
        true
    }
}

/// Fills all that a device may write.
fn fill(queue: &Queue, token: &Token, byte: u8) -> u32 {
    let segments = queue.chain(token).writable;
    segments.iter().map(|segment| segment.write(0, &vec![byte; segment.len()]) as u32).sum()
}

fn arm(queue: &mut Queue) {
    queue.arm();
}

fn exact(format: RingFormat, size: u16, indirect: bool, event_idx: bool) {
    let mut scene = Scene::new(FakeOptions { format, size, event_idx, ..FakeOptions::default() });
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |n: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % n as u64) as usize
    };
    let what = format!("{format:?} ring of {size}, indirect {indirect}, EVENT_IDX {event_idx}");
    let mut queue = scene.queue(None);
    let mut held: Vec<Token> = Vec::new();
    for round in 0..ROUNDS {
        for _ in 0..random(6) {
            if !scene.offer(&mut random, indirect) {
                break;
            }
        }
        scene.begin();
        queue.pop(64, &mut held);
        for _ in 0..random(held.len() + 1) {
            let token = held.swap_remove(random(held.len()));
            let written = fill(&queue, &token, 1 + round as u8);
            queue.complete(std::iter::once(Used { token, written }));
        }
        scene.assert_exact(&format!("{what}, round {round}, completed"));
        queue.publish();
        scene.assert_exact(&format!("{what}, round {round}, published"));
        while scene.fake.ring.reap().unwrap().is_some() {}

        let device = scene.fake.ring_config().device;
        scene.begin();
        for change in [arm as fn(&mut Queue), Queue::disarm] {
            change(&mut queue);
            let (marked, changed) = scene.look();
            assert!(marked.is_superset(&changed), "{what}: {changed:?} changed, {marked:?} marked");
            let ring = [0, 2, 4 + 8 * u64::from(size)].map(|at| (device.0 + at) / LOG_PAGE_BYTES);
            assert!(marked.iter().all(|page| ring.contains(page)), "{what}: {marked:?} marked");
        }
    }
}

#[test]
fn the_log_has_exactly_the_pages_that_the_device_changed() {
    for format in [RingFormat::Split, RingFormat::Packed] {
        for size in [8, 1024] {
            for (indirect, event_idx) in [(false, false), (false, true), (true, false), (true, true)] {
                exact(format, size, indirect, event_idx);
            }
        }
    }
}

#[test]
fn what_a_recovery_writes_into_a_ring_is_logged() {
    let options = FakeOptions { format: RingFormat::Packed, size: 1024, ..FakeOptions::default() };
    let mut scene = Scene::new(options);
    let (record, _file) = Mapping::anonymous("inflight", 1 << 20).unwrap();
    let record = Arc::new(record);
    let inflight = || Some(Inflight::new(RingFormat::Packed, record.clone(), 0, 1024).unwrap());
    let buffer = scene.fake.writable(8);
    for _ in 0..1024 {
        scene.fake.offer(&[buffer], false);
    }
    let mut queue = scene.queue(inflight());
    let mut held = Vec::new();
    (0..16).for_each(|_| queue.pop(64, &mut held));
    // Written into the ring and never published.
    queue.complete(held.drain(..).map(|token| Used { token, written: 8 }));
    drop(queue);
    scene.begin();
    let _queue = scene.queue(inflight());
    scene.assert_exact("recovered");
}

#[test]
fn suppression_that_is_renewed_is_logged() {
    let mut scene = Scene::new(FakeOptions { size: 1024, event_idx: true, ..FakeOptions::default() });
    let device = scene.fake.ring_config().device;
    let event = (device.0 + 4 + 8 * 1024) / LOG_PAGE_BYTES;
    let buffer = scene.fake.writable(8);
    let mut queue = scene.queue(None);
    queue.disarm();
    let mut held = Vec::new();
    let mut renewed = false;
    for round in 0..0x8000 {
        scene.fake.offer(&[buffer], false);
        let before = scene.fake.read(GuestAddr(device.0 + 4 + 8 * 1024), 2);
        let log = Area::new(scene.bits.clone(), 0, LOG_BYTES, 8).unwrap();
        let byte = log.u8(event as usize / 8);
        byte.store(0, Ordering::SeqCst);
        queue.pop(1, &mut held);
        let changed = scene.fake.read(GuestAddr(device.0 + 4 + 8 * 1024), 2) != before;
        let marked = byte.load(Ordering::SeqCst) >> (event % 8) & 1 != 0;
        assert_eq!(marked, changed, "round {round}");
        renewed |= changed;
        queue.complete(held.drain(..).map(|token| Used { token, written: 8 }));
        queue.publish();
        assert!(scene.fake.ring.reap().unwrap().is_some());
    }
    assert!(renewed);
}

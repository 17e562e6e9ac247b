//! The mapping of guest clusters, shared by all threads of an image: the L1 table and a bounded cache of L2 slices.
//!
//! Any thread looks entries up without a lock. Only the engine changes them, and its caller lets one thread at a time do
//! that. A slice is a sequence lock: a reader that met a change looks again.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use crate::entry::{L1Entry, L2Entry};
use crate::layout::Layout;

/// Places where a slice may be cached.
const WAYS: u64 = 8;
/// How often a reader looks again before it asks the engine.
const RETRIES: u32 = 8;
/// Entries of the L1 table that are kept together.
const L1_CHUNK: usize = 4096;

/// The mapping.
#[derive(Debug)]
pub struct Map {
    layout: Layout,
    l1: Box<[OnceLock<Box<[AtomicU64]>>]>,
    slots: Box<[Slot]>,
}

#[derive(Debug)]
struct Slot {
    /// Odd while the slot is being changed.
    sequence: AtomicU64,
    /// Number of the slice and 1, 0 for none.
    tag: AtomicU64,
    /// Only the engine may look.
    hidden: AtomicBool,
    /// Used since somebody last looked for a slot to empty.
    used: AtomicBool,
    words: OnceLock<Box<[AtomicU64]>>,
}

/// An answer of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// The entry.
    Entry(L2Entry),
    /// The slice is not cached: the engine loads it.
    Miss,
}

impl Map {
    /// An empty map of an image with `l1_entries_max` entries in its L1 table, now or after it has grown, and a cache of
    /// at most `cache_bytes` bytes of L2 tables, but always of some slices.
    #[must_use]
    pub fn new(layout: Layout, l1_entries_max: u64, cache_bytes: u64) -> Self {
        let slices = l1_entries_max.saturating_mul(layout.cluster_bytes() / layout.slice_bytes());
        let slots = (cache_bytes / layout.slice_bytes()).min(slices).max(WAYS * 2).next_multiple_of(WAYS);
        let chunks = (l1_entries_max as usize).div_ceil(L1_CHUNK);
        Self {
            layout,
            l1: (0..chunks).map(|_| OnceLock::new()).collect(),
            slots: (0..slots).map(|_| Slot::new()).collect(),
        }
    }

    /// The image's units.
    #[must_use]
    pub const fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Number of the slice that maps an offset of the disk.
    #[must_use]
    pub const fn slice_of(&self, guest_offset: u64) -> u64 {
        (guest_offset >> self.layout.cluster_bits) / self.layout.slice_entries()
    }

    /// The entry for an offset of the disk.
    #[inline]
    #[must_use]
    pub fn look_up(&self, guest_offset: u64) -> Lookup {
        let slice = self.slice_of(guest_offset);
        let index = (guest_offset >> self.layout.cluster_bits) & (self.layout.slice_entries() - 1);
        for at in self.places(slice) {
            if let Some(entry) = self.slots[at].read(slice, index as usize, self.layout.extended) {
                return Lookup::Entry(entry);
            }
        }
        match self.l1(self.layout.l1_index(guest_offset)).table() {
            None => Lookup::Entry(L2Entry::UNALLOCATED),
            Some(_) => Lookup::Miss,
        }
    }

    /// An entry of the L1 table; an empty one beyond its end.
    #[must_use]
    pub fn l1(&self, index: u64) -> L1Entry {
        let chunk = self.l1.get(index as usize / L1_CHUNK).and_then(OnceLock::get);
        chunk.map_or_else(L1Entry::default, |chunk| {
            L1Entry(chunk[index as usize % L1_CHUNK].load(Ordering::Acquire))
        })
    }

    /// Changes an entry of the L1 table. The engine's.
    pub(crate) fn set_l1(&self, index: u64, entry: L1Entry) {
        let Some(chunk) = self.l1.get(index as usize / L1_CHUNK) else { return };
        if entry.0 == 0 && chunk.get().is_none() {
            return;
        }
        let chunk = chunk.get_or_init(|| (0..L1_CHUNK).map(|_| AtomicU64::new(0)).collect());
        chunk[index as usize % L1_CHUNK].store(entry.0, Ordering::Release);
    }

    /// The words of a slice, if it is cached. The engine's, which alone changes them.
    pub(crate) fn slice(&self, slice: u64) -> Option<Vec<u64>> {
        let slot = self.find(slice)?;
        Some(slot.words().iter().map(|word| word.load(Ordering::Relaxed)).collect())
    }

    /// An entry as the engine sees it.
    pub(crate) fn entry(&self, slice: u64, index: u64) -> Option<L2Entry> {
        let slot = self.find(slice)?;
        Some(slot.entry(index as usize, self.layout.extended))
    }

    /// Whether a slice is cached.
    pub(crate) fn has(&self, slice: u64) -> bool {
        self.find(slice).is_some()
    }

    /// Caches a slice. Slices for which `pinned` holds stay; false if no place is free of those.
    pub(crate) fn fill(&self, slice: u64, words: &[u64], pinned: impl Fn(u64) -> bool) -> bool {
        let Some(slot) = self.place_for(slice, pinned) else { return false };
        slot.write(|slot| {
            slot.tag.store(slice + 1, Ordering::Relaxed);
            slot.hidden.store(false, Ordering::Relaxed);
            for (to, &word) in slot.words_of(words.len()).iter().zip(words) {
                to.store(word, Ordering::Relaxed);
            }
        });
        slot.used.store(true, Ordering::Relaxed);
        true
    }

    /// Makes a changed entry visible to all threads.
    pub(crate) fn publish(&self, slice: u64, index: u64, entry: L2Entry) {
        let Some(slot) = self.find(slice) else { return };
        let extended = self.layout.extended;
        slot.write(|slot| {
            let words = slot.words();
            if extended {
                words[index as usize * 2].store(entry.descriptor, Ordering::Relaxed);
                words[index as usize * 2 + 1].store(entry.subclusters, Ordering::Relaxed);
            } else {
                words[index as usize].store(entry.descriptor, Ordering::Relaxed);
            }
        });
    }

    /// Hides a cached slice from the threads, or shows it again: they miss it.
    pub(crate) fn hide(&self, slice: u64, hidden: bool) {
        if let Some(slot) = self.find(slice) {
            slot.write(|slot| slot.hidden.store(hidden, Ordering::Relaxed));
        }
    }

    fn find(&self, slice: u64) -> Option<&Slot> {
        self.places(slice)
            .map(|at| &self.slots[at])
            .find(|slot| slot.tag.load(Ordering::Relaxed) == slice + 1)
    }

    /// Where a slice may be.
    fn places(&self, slice: u64) -> std::ops::Range<usize> {
        let sets = self.slots.len() as u64 / WAYS;
        // Fibonacci hashing: neighbours go to different sets, and so do tables at equal distances.
        let set = (slice.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) % sets;
        (set * WAYS) as usize..((set + 1) * WAYS) as usize
    }

    /// A place for a slice: its own, an empty one, or one that was not used lately.
    fn place_for(&self, slice: u64, pinned: impl Fn(u64) -> bool) -> Option<&Slot> {
        if let Some(slot) = self.find(slice) {
            return Some(slot);
        }
        let places = || self.places(slice).map(|at| &self.slots[at]);
        let tag = |slot: &Slot| slot.tag.load(Ordering::Relaxed);
        if let Some(empty) = places().find(|slot| tag(slot) == 0) {
            return Some(empty);
        }
        for _ in 0..2 {
            for slot in places().filter(|slot| !pinned(tag(slot) - 1)) {
                if !slot.used.swap(false, Ordering::Relaxed) {
                    return Some(slot);
                }
            }
        }
        None
    }
}

impl Slot {
    fn new() -> Self {
        Self {
            sequence: AtomicU64::new(0),
            tag: AtomicU64::new(0),
            hidden: AtomicBool::new(false),
            used: AtomicBool::new(false),
            words: OnceLock::new(),
        }
    }

    fn words(&self) -> &[AtomicU64] {
        self.words.get().map_or(&[], |words| words)
    }

    fn words_of(&self, len: usize) -> &[AtomicU64] {
        self.words.get_or_init(|| (0..len).map(|_| AtomicU64::new(0)).collect())
    }

    fn entry(&self, index: usize, extended: bool) -> L2Entry {
        let word = |at: usize| self.words().get(at).map_or(0, |word| word.load(Ordering::Relaxed));
        if extended {
            L2Entry { descriptor: word(index * 2), subclusters: word(index * 2 + 1) }
        } else {
            L2Entry { descriptor: word(index), subclusters: 0 }
        }
    }

    #[inline]
    fn read(&self, slice: u64, index: usize, extended: bool) -> Option<L2Entry> {
        for _ in 0..RETRIES {
            let before = self.sequence.load(Ordering::Acquire);
            if self.tag.load(Ordering::Relaxed) != slice + 1 || self.hidden.load(Ordering::Relaxed) {
                return None;
            }
            let entry = self.entry(index, extended);
            // The entry was read before the sequence is looked at again.
            fence(Ordering::Acquire);
            if before.is_multiple_of(2) && self.sequence.load(Ordering::Relaxed) == before {
                if !self.used.load(Ordering::Relaxed) {
                    self.used.store(true, Ordering::Relaxed);
                }
                return Some(entry);
            }
            std::hint::spin_loop();
        }
        None
    }

    /// Changes the slot, as the only writer.
    fn write(&self, change: impl FnOnce(&Self)) {
        let before = self.sequence.load(Ordering::Relaxed);
        self.sequence.store(before + 1, Ordering::Relaxed);
        // Readers that see a part of the change see the odd number too.
        fence(Ordering::Release);
        change(self);
        self.sequence.store(before + 2, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const LAYOUT: Layout =
        Layout { cluster_bits: 16, refcount_order: 4, extended: true, external_data: false };

    fn words(value: u64) -> Vec<u64> {
        vec![value; 512]
    }

    #[test]
    fn what_no_l2_table_maps_is_unallocated_without_a_slice() {
        let map = Map::new(LAYOUT, 4, 0);
        assert_eq!(map.look_up(0), Lookup::Entry(L2Entry::UNALLOCATED));
        map.set_l1(0, L1Entry::owned(0x50000));
        assert_eq!(map.look_up(0), Lookup::Miss);
        assert_eq!(map.look_up(LAYOUT.l2_covers_bytes()), Lookup::Entry(L2Entry::UNALLOCATED));
    }

    #[test]
    fn the_cache_is_bounded_and_keeps_what_is_pinned() {
        let map = Map::new(LAYOUT, 1 << 20, 64 << 10);
        let slices = map.slots.len() as u64;
        assert_eq!(slices, 16);
        for slice in 0..1000 {
            assert!(map.fill(slice, &words(slice << 16), |_| false));
            assert_eq!(map.entry(slice, 3).map(|entry| entry.descriptor), Some(slice << 16));
        }
        let cached: Vec<_> = (0..1000).filter(|&slice| map.has(slice)).collect();
        assert!(cached.len() as u64 <= slices);
        for slice in 1000..2000 {
            map.fill(slice, &words(0), |other| cached.contains(&other));
        }
        assert!(cached.iter().all(|&slice| map.has(slice)));
    }

    #[test]
    fn readers_never_see_half_a_change() {
        let map = Arc::new(Map::new(LAYOUT, 1 << 20, 0));
        map.set_l1(0, L1Entry::owned(1 << 16));
        let done = Arc::new(AtomicBool::new(false));
        let reader = std::thread::spawn({
            let (map, done) = (map.clone(), done.clone());
            move || {
                let mut seen = 0_u64;
                while !done.load(Ordering::Relaxed) {
                    if let Lookup::Entry(entry) = map.look_up(0)
                        && entry != L2Entry::UNALLOCATED
                    {
                        assert_eq!(entry.descriptor, entry.subclusters);
                        assert!(entry.descriptor < 1 << 32, "an entry of another slice");
                        seen += 1;
                    }
                }
                seen
            }
        });
        // The slice comes and goes, and its entry changes, as a pair of equal words.
        for round in 1..20_000_u64 {
            map.fill(0, &words(round), |_| false);
            map.publish(0, 0, L2Entry { descriptor: round + 1, subclusters: round + 1 });
            for other in 1..40 {
                map.fill(other, &words(1 << 32 | round), |_| false);
            }
        }
        done.store(true, Ordering::Relaxed);
        assert!(reader.join().is_ok());
    }
}

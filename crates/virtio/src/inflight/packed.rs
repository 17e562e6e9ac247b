//! The record of a packed queue: copies of the descriptors taken, since the ring's own are overwritten by used ones.
//!
//! Entries in use form a list per chain, the others the free list. Position and head of the free list exist twice, now
//! and as of the last publication (`old_…`), so that a service that died in between can be told to have published or not.
//! What changes together lies in one word and is stored at once.

use std::sync::atomic::Ordering;

use crate::memory::Area;
use crate::ring::{Chains, Descriptor, PackedDevice, RingError, RingState, Token};

use super::{InflightError, RECORD_VERSION};

/// Offsets in the record: the header (`struct QueueRegionPacked`), then the entries (`struct DescStatePacked`).
mod layout {
    /// `version`, `desc_num`, and the heads of the free list, 16 bits each.
    pub(super) const HEADER: usize = 8;
    pub(super) const VERSION: usize = 8;
    pub(super) const DESC_NUM: usize = 10;
    pub(super) const FREE_HEAD: usize = 12;
    pub(super) const OLD_FREE_HEAD: usize = 14;
    /// `used_idx`, `old_used_idx` of 16 bits, `used_wrap_counter`, `old_used_wrap_counter` of 8, 16 bits of padding.
    pub(super) const POSITIONS: usize = 16;
    pub(super) const ENTRIES: usize = 32;
    pub(super) const ENTRY_BYTES: usize = 32;
    /// `inflight` and padding of 8 bits, `next`, `last`, `num` of 16. All but `next` mean something in a chain's first
    /// entry only: taken and not given back, its last entry, and how many there are.
    pub(super) const LINKS: usize = 0;
    pub(super) const INFLIGHT: usize = 0;
    /// The next entry of the chain or of the free list; the ring's size ends it.
    pub(super) const NEXT: usize = 2;
    pub(super) const LAST_AND_NUM: usize = 4;
    /// In a chain's first entry: when it was taken.
    pub(super) const COUNTER: usize = 8;
    /// The descriptor: `id` and `flags` of 16 bits, `len` of 32; then `addr`.
    pub(super) const DESCRIPTOR: usize = 16;
    pub(super) const ADDR: usize = 24;
}
use layout::{
    ADDR, COUNTER, DESC_NUM, DESCRIPTOR, ENTRIES, ENTRY_BYTES, FREE_HEAD, HEADER, INFLIGHT, LAST_AND_NUM,
    LINKS, NEXT, OLD_FREE_HEAD, POSITIONS, VERSION,
};

/// Bytes that the record takes.
pub(super) fn bytes(size: u16) -> usize {
    (ENTRIES + usize::from(size) * ENTRY_BYTES).next_multiple_of(64)
}

/// The entries of one chain.
#[derive(Clone, Copy, Default)]
struct List {
    first: u16,
    last: u16,
}

/// A chain of a previous service: its entries and their descriptors.
pub(super) struct Left {
    counter: u64,
    list: List,
    descriptors: Vec<Descriptor>,
}

/// A used index and its wrap counter.
type Position = (u16, bool);

/// The record of one packed queue.
pub(super) struct PackedInflight {
    area: Area,
    pub(super) size: u16,
    /// It was all zeros: the ring stands where the front end says.
    fresh: bool,
    counter: u64,
    /// The links of all entries and the head of the free list. The record has the same, but the front end can write it.
    next: Box<[u16]>,
    free: u16,
    /// Where the ring stood at the last publication.
    committed: Position,
    /// By slot.
    chains: Box<[List]>,
    /// Chains in flight as of the last time that some were taken or published.
    in_flight: usize,
    /// Room for the first entries of those that are published together.
    batch: Box<[u16]>,
    /// Chains of a previous service, the next one last.
    pub(super) resubmit: Vec<Left>,
}

impl PackedInflight {
    pub(super) fn new(area: Area, size: u16) -> Result<Self, InflightError> {
        let version = area.u16(VERSION).load(Ordering::Relaxed);
        let found = area.u16(DESC_NUM).load(Ordering::Relaxed);
        if version != 0 && (version, found) != (RECORD_VERSION, size) {
            return Err(InflightError::Mismatch { version, size: found, expected: size });
        }
        Ok(Self {
            area,
            size,
            fresh: version == 0,
            counter: 0,
            next: (1..=size).collect(),
            free: 0,
            committed: (0, true),
            chains: (0..size).map(|_| List::default()).collect(),
            batch: (0..size).collect(),
            in_flight: 0,
            resubmit: Vec::new(),
        })
    }

    pub(super) fn recover(
        &mut self,
        ring: &PackedDevice,
        state: Option<RingState>,
    ) -> Result<RingState, RingError> {
        if self.fresh {
            return Ok(self.begin(state.unwrap_or(RingState::NEW)));
        }
        let (now, old) = self.positions();
        for (offset, _) in [now, old] {
            if offset >= self.size {
                return Err(RingError::BadState(offset, self.size));
            }
        }
        // The head of the free list goes first either way: while the positions differ, the next service does this again.
        if now != old && !ring.is_available_at(old.0, old.1) {
            // It died after publishing and before saying so. The driver may have used the descriptor again since.
            self.area.u16(OLD_FREE_HEAD).store(self.u16(FREE_HEAD), Ordering::Relaxed);
            self.committed = now;
        } else {
            self.area.u16(FREE_HEAD).store(self.u16(OLD_FREE_HEAD), Ordering::Relaxed);
            self.committed = old;
        }
        self.store_positions(self.committed, self.committed);
        let outstanding = self.read_lists()?;
        Ok(ring.forget_used(self.committed, outstanding))
    }

    /// Lays out a record for a ring that stands at `state`; the version, which makes it valid, goes last.
    fn begin(&mut self, state: RingState) -> RingState {
        for (index, &next) in self.next.iter().enumerate() {
            self.area.u16(entry(index as u16) + NEXT).store(next, Ordering::Relaxed);
        }
        self.committed = (state.used, state.used_wrap);
        self.store_positions(self.committed, self.committed);
        // Both heads are 0.
        let header = u64::from(RECORD_VERSION) | u64::from(self.size) << 16;
        self.area.u64(HEADER).store(header, Ordering::Release);
        state
    }

    /// Reads the free list and the chains in flight; returns how many descriptors those have. Each entry must be in one of
    /// them: the front end, which keeps the record, could have written it.
    fn read_lists(&mut self) -> Result<u16, RingError> {
        let damaged = RingError::BadRecord { size: self.size };
        let mut seen: Vec<bool> = vec![false; self.size.into()];
        let mut visit = |index: u16| match seen.get_mut(usize::from(index)) {
            Some(seen) if !*seen => {
                *seen = true;
                Ok(())
            }
            _ => Err(damaged),
        };
        let (mut index, mut free) = (self.u16(FREE_HEAD), 0);
        self.free = index.min(self.size);
        while index < self.size {
            visit(index)?;
            if self.is_inflight(index) {
                self.area.u8(entry(index) + INFLIGHT).store(0, Ordering::Relaxed);
            }
            free += 1;
            let next = self.u16(entry(index) + NEXT);
            self.next[usize::from(index)] = next.min(self.size);
            index = next;
        }
        let mut left = Vec::new();
        for first in 0..self.size {
            if !self.is_inflight(first) {
                continue;
            }
            let num = (self.area.u64(entry(first) + LINKS).load(Ordering::Relaxed) >> 48) as u16;
            let counter = self.area.u64(entry(first) + COUNTER).load(Ordering::Relaxed);
            let mut descriptors = Vec::new();
            let mut list = List { first, last: first };
            let mut index = first;
            for _ in 0..num {
                visit(index)?;
                descriptors.push(self.descriptor(index));
                list.last = index;
                let next = self.u16(entry(index) + NEXT).min(self.size);
                self.next[usize::from(index)] = next;
                index = next;
            }
            left.push(Left { counter, list, descriptors });
        }
        let outstanding: usize = left.iter().map(|left| left.descriptors.len()).sum();
        if left.iter().any(|left| left.descriptors.is_empty()) || outstanding + free != self.size.into() {
            return Err(damaged);
        }
        left.sort_unstable_by_key(|left| std::cmp::Reverse(left.counter));
        self.counter = left.first().map_or(0, |left| left.counter.wrapping_add(1));
        self.resubmit = left;
        Ok(outstanding as u16)
    }

    /// Takes the oldest chain of the previous service again.
    pub(super) fn take_again(&mut self, chains: &mut Chains) -> Option<Result<Token, RingError>> {
        let Left { list, descriptors, .. } = self.resubmit.pop()?;
        let token = PackedDevice::take_copies(&descriptors, chains);
        if let Ok(token) = &token {
            self.chains[token.slot()] = list;
        }
        self.in_flight = chains.in_flight();
        Some(token)
    }

    pub(super) fn pop(
        &mut self,
        ring: &mut PackedDevice,
        max: usize,
        chains: &mut Chains,
        out: &mut Vec<Token>,
    ) -> Result<(), RingError> {
        let (from, before) = (ring.state().avail, out.len());
        let result = ring.pop(max, chains, out);
        if out.len() > before {
            self.take(ring, from, &out[before..], chains);
            self.in_flight = chains.in_flight();
        }
        result
    }

    /// Notes that the chains in `burst` were taken, from the ring's position `offset` on.
    #[inline(always)]
    fn take(&mut self, ring: &PackedDevice, offset: u16, burst: &[Token], chains: &Chains) {
        let (ring, size) = (ring.descriptors(), usize::from(self.size));
        let entries: Entries<'_> = self.area.entries(ENTRIES, self.size);
        let (lists, next) = (&mut self.chains[..size], &self.next[..size]);
        let (mut offset, mut free, mut counter) = (usize::from(offset), usize::from(self.free), self.counter);
        for token in burst {
            let count = chains.descriptors(token);
            let (first, mut last) = (free, free);
            for _ in 0..count {
                let (addr, word) = Descriptor::load(ring, offset).to_words();
                // The same fields, but the length stands behind id and flags.
                entries.u64(free, DESCRIPTOR).store(word.rotate_left(32), Ordering::Relaxed);
                entries.u64(free, ADDR).store(addr, Ordering::Relaxed);
                last = free;
                free = usize::from(next[free]);
                offset = if offset + 1 == size { 0 } else { offset + 1 };
            }
            // The place in the free list links the first entry to the second.
            let ends = last as u32 | u32::from(count) << 16;
            entries.u32(first, LAST_AND_NUM).store(ends, Ordering::Relaxed);
            entries.u64(first, COUNTER).store(counter, Ordering::Relaxed);
            entries.u8(first, INFLIGHT).store(1, Ordering::Relaxed);
            counter = counter.wrapping_add(1);
            lists[token.slot()] = List { first: first as u16, last: last as u16 };
        }
        (self.free, self.counter) = (free as u16, counter);
        // By one store: the whole burst is taken, or the free list holds all of it.
        self.area.u32(FREE_HEAD).store(u32::from(self.free) * 0x1_0001, Ordering::Release);
    }

    #[inline(always)]
    pub(super) fn publish(&mut self, ring: &mut PackedDevice, chains: &Chains) -> bool {
        let done = chains.released(self.in_flight - chains.in_flight());
        if done.is_empty() {
            return false;
        }
        let size = usize::from(self.size);
        let entries: Entries<'_> = self.area.entries(ENTRIES, self.size);
        let (lists, next) = (&self.chains[..size], &mut self.next[..size]);
        for (slot, batched) in done.iter().zip(&mut self.batch) {
            let List { first, last } = lists[usize::from(*slot)];
            entries.u16(last, NEXT).store(self.free, Ordering::Relaxed);
            next[usize::from(last)] = self.free;
            (self.free, *batched) = (first, first);
        }
        // The ring's publication is a release store behind these.
        let RingState { used, used_wrap, .. } = ring.state();
        self.area.u16(FREE_HEAD).store(self.free, Ordering::Relaxed);
        self.store_positions((used, used_wrap), self.committed);
        ring.publish();
        // Each is a release store, so that none comes before the publication.
        for &first in &self.batch[..done.len()] {
            entries.u8(first, INFLIGHT).store(0, Ordering::Release);
        }
        self.area.u16(OLD_FREE_HEAD).store(self.free, Ordering::Release);
        self.committed = (used, used_wrap);
        self.store_positions(self.committed, self.committed);
        self.in_flight = chains.in_flight();
        true
    }

    fn positions(&self) -> (Position, Position) {
        let word = self.area.u64(POSITIONS).load(Ordering::Relaxed);
        let [now, now_high, old, old_high, now_wrap, old_wrap, _, _] = word.to_le_bytes();
        let index = |low, high| u16::from_le_bytes([low, high]);
        ((index(now, now_high), now_wrap != 0), (index(old, old_high), old_wrap != 0))
    }

    #[inline(always)]
    fn store_positions(&self, now: Position, old: Position) {
        let indices = u64::from(now.0) | u64::from(old.0) << 16;
        let wraps = u64::from(now.1) << 32 | u64::from(old.1) << 40;
        self.area.u64(POSITIONS).store(indices | wraps, Ordering::Release);
    }

    fn is_inflight(&self, index: u16) -> bool {
        self.area.u8(entry(index) + INFLIGHT).load(Ordering::Relaxed) != 0
    }

    /// The copy in an entry.
    fn descriptor(&self, index: u16) -> Descriptor {
        let word = |at| self.area.u64(entry(index) + at).load(Ordering::Relaxed);
        Descriptor::from_words(word(ADDR), word(DESCRIPTOR).rotate_right(32))
    }

    fn u16(&self, offset: usize) -> u16 {
        self.area.u16(offset).load(Ordering::Relaxed)
    }
}

#[inline(always)]
fn entry(index: u16) -> usize {
    ENTRIES + usize::from(index) * ENTRY_BYTES
}

type Entries<'a> = crate::memory::Entries<'a, ENTRY_BYTES, 8>;

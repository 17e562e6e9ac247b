//! The record of a packed queue: copies of the descriptors taken, since the ring's own are overwritten by used ones.
//!
//! Entries in use form a list per chain, the others the free list. Position and free list exist twice, now and as of
//! the last publication (`old_…`), so that a service that died in between can be told to have published or not.

use std::sync::atomic::{Ordering, compiler_fence};

use crate::memory::Area;
use crate::ring::{Chains, Descriptor, PackedDevice, RingError, RingState, Token};

use super::{InflightError, RECORD_VERSION};

/// Offsets in the record: the header (`struct QueueRegionPacked`), then the entries (`struct DescStatePacked`).
mod layout {
    pub(super) const VERSION: usize = 8;
    pub(super) const DESC_NUM: usize = 10;
    pub(super) const FREE_HEAD: usize = 12;
    pub(super) const OLD_FREE_HEAD: usize = 14;
    pub(super) const USED_IDX: usize = 16;
    pub(super) const OLD_USED_IDX: usize = 18;
    pub(super) const USED_WRAP: usize = 20;
    pub(super) const OLD_USED_WRAP: usize = 21;
    pub(super) const ENTRIES: usize = 32;
    pub(super) const ENTRY_BYTES: usize = 32;
    /// In a chain's first entry: taken and not given back.
    pub(super) const INFLIGHT: usize = 0;
    /// The next entry of the chain or of the free list; the ring's size ends it.
    pub(super) const NEXT: usize = 2;
    /// In a chain's first entry: its last one, and how many there are.
    pub(super) const LAST: usize = 4;
    pub(super) const NUM: usize = 6;
    /// In a chain's first entry: when it was taken.
    pub(super) const COUNTER: usize = 8;
    /// The descriptor: id and flags, length, address.
    pub(super) const ID: usize = 16;
    pub(super) const FLAGS: usize = 18;
    pub(super) const LEN: usize = 20;
    pub(super) const ADDR: usize = 24;
}
use layout::{
    ADDR, COUNTER, DESC_NUM, ENTRIES, ENTRY_BYTES, FLAGS, FREE_HEAD, ID, INFLIGHT, LAST, LEN, NEXT, NUM,
    OLD_FREE_HEAD, OLD_USED_IDX, OLD_USED_WRAP, USED_IDX, USED_WRAP, VERSION,
};

/// Bytes that the record takes.
pub(super) fn bytes(size: u16) -> usize {
    (ENTRIES + usize::from(size) * ENTRY_BYTES).next_multiple_of(64)
}

/// A chain of a previous service: its first entry and its descriptors.
pub(super) struct Left {
    first: u16,
    descriptors: Vec<Descriptor>,
}

/// The record of one packed queue.
pub(super) struct PackedInflight {
    area: Area,
    size: u16,
    /// It was all zeros: the ring stands where the front end says.
    fresh: bool,
    counter: u64,
    /// By slot: the chain's first entry.
    first_of: Box<[u16]>,
    /// First entries of chains completed since the last publication.
    batch: Vec<u16>,
    /// Chains of a previous service, the next one last.
    pub(super) resubmit: Vec<Left>,
}

impl PackedInflight {
    pub(super) fn new(area: Area, size: u16) -> Result<Self, InflightError> {
        let version = area.u16(VERSION).load(Ordering::Relaxed);
        let found = area.u16(DESC_NUM).load(Ordering::Relaxed);
        match (version, found) {
            (0, _) => {
                for index in 0..size {
                    area.u16(entry(index) + NEXT).store(index + 1, Ordering::Relaxed);
                }
                area.u16(DESC_NUM).store(size, Ordering::Relaxed);
                area.u16(VERSION).store(RECORD_VERSION, Ordering::Release);
            }
            (RECORD_VERSION, found) if found == size => {}
            (version, found) => return Err(InflightError::Mismatch { version, size: found, expected: size }),
        }
        Ok(Self {
            area,
            size,
            fresh: version == 0,
            counter: 0,
            first_of: (0..size).collect(),
            batch: Vec::with_capacity(size.into()),
            resubmit: Vec::new(),
        })
    }

    pub(super) fn recover(&mut self, ring: &PackedDevice, state: Option<RingState>) -> RingState {
        if self.fresh {
            let state = state.unwrap_or(RingState::NEW);
            self.publishing(state);
            self.published(state);
            return state;
        }
        let (now, old) = (self.position(USED_IDX, USED_WRAP), self.position(OLD_USED_IDX, OLD_USED_WRAP));
        if now != old && ring.is_used_at(old.0, old.1) {
            // It died after publishing and before saying so.
            self.commit();
        } else {
            self.roll_back();
        }
        let mut index = self.u16(FREE_HEAD);
        for _ in 0..self.size {
            if index >= self.size {
                break;
            }
            self.area.u8(entry(index) + INFLIGHT).store(0, Ordering::Relaxed);
            index = self.u16(entry(index) + NEXT);
        }
        let mut left: Vec<(u64, Left)> = (0..self.size)
            .filter(|&first| self.area.u8(entry(first) + INFLIGHT).load(Ordering::Relaxed) != 0)
            .map(|first| {
                let counter = self.area.u64(entry(first) + COUNTER).load(Ordering::Relaxed);
                (counter, Left { first, descriptors: self.chain_at(first) })
            })
            .collect();
        left.sort_unstable_by_key(|&(counter, _)| std::cmp::Reverse(counter));
        self.counter = left.first().map_or(0, |(counter, _)| counter.wrapping_add(1));
        let outstanding: usize = left.iter().map(|(_, left)| left.descriptors.len()).sum();
        self.resubmit = left.into_iter().map(|(_, left)| left).collect();
        let (used, used_wrap) = self.position(USED_IDX, USED_WRAP);
        ring.forget_used((used, used_wrap), outstanding.min(self.size.into()) as u16)
    }

    /// Takes the oldest chain of the previous service again.
    pub(super) fn take_again(&mut self, chains: &mut Chains) -> Option<Result<Token, RingError>> {
        let Left { first, descriptors } = self.resubmit.pop()?;
        let token = PackedDevice::take_copies(&descriptors, chains);
        if let Ok(token) = &token {
            self.first_of[token.slot()] = first;
        }
        Some(token)
    }

    pub(super) fn take(&mut self, ring: &PackedDevice, from: RingState, burst: &[Token], chains: &Chains) {
        let mut offset = from.avail;
        for token in burst {
            let first = self.u16(OLD_FREE_HEAD).min(self.size - 1);
            let count = chains.descriptors(token);
            self.area.u64(entry(first) + COUNTER).store(self.counter, Ordering::Relaxed);
            self.counter = self.counter.wrapping_add(1);
            let mut index = first;
            let mut last = first;
            for _ in 0..count {
                let copy = ring.descriptor(offset);
                let at = entry(index);
                self.area.u64(at + ADDR).store(copy.addr.0, Ordering::Relaxed);
                self.area.u32(at + LEN).store(copy.len, Ordering::Relaxed);
                self.area.u16(at + FLAGS).store(copy.flags_packed(), Ordering::Relaxed);
                self.area.u16(at + ID).store(copy.id_packed(), Ordering::Relaxed);
                last = index;
                // The front end shares the record; an index of its making must not lead outside.
                index = self.u16(at + NEXT).min(self.size);
                if index == self.size {
                    break;
                }
                offset = if offset + 1 == self.size { 0 } else { offset + 1 };
            }
            self.area.u16(entry(first) + LAST).store(last, Ordering::Relaxed);
            self.area.u16(entry(first) + NUM).store(count, Ordering::Relaxed);
            self.area.u16(FREE_HEAD).store(index, Ordering::Relaxed);
            self.area.u8(entry(first) + INFLIGHT).store(1, Ordering::Release);
            self.area.u16(OLD_FREE_HEAD).store(index, Ordering::Release);
            self.first_of[token.slot()] = first;
        }
    }

    #[inline(always)]
    pub(super) fn put(&mut self, token: &Token) {
        let first = self.first_of[token.slot()];
        let last = self.u16(entry(first) + LAST).min(self.size - 1);
        self.area.u16(entry(last) + NEXT).store(self.u16(FREE_HEAD), Ordering::Relaxed);
        self.area.u16(FREE_HEAD).store(first, Ordering::Release);
        self.batch.push(first);
    }

    #[inline(always)]
    pub(super) fn publishing(&mut self, state: RingState) {
        self.area.u16(USED_IDX).store(state.used, Ordering::Relaxed);
        self.area.u8(USED_WRAP).store(state.used_wrap.into(), Ordering::Release);
        // All of this must be in memory before the ring: neither compiler nor processor (x86-64) reorders stores.
        compiler_fence(Ordering::SeqCst);
    }

    #[inline(always)]
    pub(super) fn published(&mut self, _state: RingState) {
        compiler_fence(Ordering::SeqCst);
        for first in self.batch.drain(..) {
            self.area.u8(entry(first) + INFLIGHT).store(0, Ordering::Relaxed);
        }
        self.commit();
    }

    /// What is now becomes what was last published.
    fn commit(&self) {
        self.copy(FREE_HEAD, OLD_FREE_HEAD, USED_IDX, OLD_USED_IDX, USED_WRAP, OLD_USED_WRAP);
    }

    /// What was last published becomes what is now.
    fn roll_back(&self) {
        self.copy(OLD_FREE_HEAD, FREE_HEAD, OLD_USED_IDX, USED_IDX, OLD_USED_WRAP, USED_WRAP);
    }

    fn copy(&self, head: usize, to_head: usize, used: usize, to_used: usize, wrap: usize, to_wrap: usize) {
        self.area.u16(to_head).store(self.u16(head), Ordering::Relaxed);
        self.area.u16(to_used).store(self.u16(used), Ordering::Relaxed);
        self.area.u8(to_wrap).store(self.area.u8(wrap).load(Ordering::Relaxed), Ordering::Release);
    }

    /// Used index, kept inside the ring, and wrap counter.
    fn position(&self, index: usize, wrap: usize) -> (u16, bool) {
        (self.u16(index).min(self.size - 1), self.area.u8(wrap).load(Ordering::Relaxed) != 0)
    }

    /// The saved descriptors of the chain that begins at `first`.
    fn chain_at(&self, first: u16) -> Vec<Descriptor> {
        let count = self.u16(entry(first) + NUM).min(self.size);
        let mut index = first;
        let mut descriptors = Vec::with_capacity(count.into());
        while descriptors.len() < count.into() && index < self.size {
            let at = entry(index);
            let words = (
                self.area.u64(at + ADDR).load(Ordering::Relaxed),
                self.area.u32(at + LEN).load(Ordering::Relaxed),
            );
            descriptors.push(Descriptor::packed(words.0, words.1, self.u16(at + ID), self.u16(at + FLAGS)));
            index = self.u16(at + NEXT);
        }
        descriptors
    }

    #[inline(always)]
    fn u16(&self, offset: usize) -> u16 {
        self.area.u16(offset).load(Ordering::Relaxed)
    }
}

#[inline(always)]
fn entry(index: u16) -> usize {
    ENTRIES + usize::from(index) * ENTRY_BYTES
}

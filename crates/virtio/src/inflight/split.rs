//! The record of a split queue: an entry for each descriptor, found by a chain's head.

use std::sync::atomic::Ordering;

use crate::memory::Area;
use crate::ring::{Chains, RingError, RingState, SplitDevice, Token};

use super::{InflightError, RECORD_VERSION};

/// Offsets in the record: the header (`struct QueueRegionSplit`), then the entries (`struct DescStateSplit`).
mod layout {
    pub(super) const VERSION: usize = 8;
    pub(super) const DESC_NUM: usize = 10;
    pub(super) const LAST_BATCH_HEAD: usize = 12;
    pub(super) const USED_IDX: usize = 14;
    pub(super) const ENTRIES: usize = 16;
    pub(super) const ENTRY_BYTES: usize = 16;
    /// In an entry: taken and not given back.
    pub(super) const INFLIGHT: usize = 0;
    /// In an entry: the chain completed before this one.
    pub(super) const NEXT: usize = 6;
    /// In an entry: when it was taken.
    pub(super) const COUNTER: usize = 8;
}
use layout::{COUNTER, DESC_NUM, ENTRIES, ENTRY_BYTES, INFLIGHT, LAST_BATCH_HEAD, NEXT, USED_IDX, VERSION};

/// The record of one split queue.
pub(super) struct SplitInflight {
    area: Area,
    pub(super) size: u16,
    /// It was all zeros.
    fresh: bool,
    /// The next value of the entries' counter.
    counter: u64,
    /// The last chain completed.
    last_batch_head: u16,
    /// Chains in flight as of the last time that some were taken or published.
    in_flight: usize,
    /// Room for those that are published together.
    batch: Box<[u16]>,
    /// Chains of a previous service, the next one last.
    pub(super) resubmit: Vec<u16>,
}

/// Bytes that the record takes.
pub(super) fn bytes(size: u16) -> usize {
    (ENTRIES + usize::from(size) * ENTRY_BYTES).next_multiple_of(64)
}

impl SplitInflight {
    pub(super) fn new(area: Area, size: u16) -> Result<Self, InflightError> {
        let version = area.u16(VERSION).load(Ordering::Relaxed);
        let found = area.u16(DESC_NUM).load(Ordering::Relaxed);
        if version != 0 && (version, found) != (RECORD_VERSION, size) {
            return Err(InflightError::Mismatch { version, size: found, expected: size });
        }
        Ok(Self {
            last_batch_head: area.u16(LAST_BATCH_HEAD).load(Ordering::Relaxed),
            area,
            size,
            fresh: version == 0,
            counter: 0,
            batch: (0..size).collect(),
            in_flight: 0,
            resubmit: Vec::new(),
        })
    }

    /// `used` is the ring's used index, which is where the previous service had come to.
    pub(super) fn recover(&mut self, used: u16) -> RingState {
        if self.fresh {
            return self.begin(used);
        }
        let recorded = self.area.u16(USED_IDX).load(Ordering::Relaxed);
        if recorded != used {
            // It died between publishing a batch and clearing it: the batch, linked from its last chain, is done.
            let mut head = self.last_batch_head;
            for _ in 0..used.wrapping_sub(recorded).min(self.size) {
                if head >= self.size {
                    break;
                }
                self.area.u8(entry(head) + INFLIGHT).store(0, Ordering::Relaxed);
                head = self.area.u16(entry(head) + NEXT).load(Ordering::Relaxed);
            }
            self.area.u16(USED_IDX).store(used, Ordering::Release);
        }
        let mut left: Vec<(u64, u16)> = (0..self.size)
            .filter(|&head| self.area.u8(entry(head) + INFLIGHT).load(Ordering::Relaxed) != 0)
            .map(|head| (self.area.u64(entry(head) + COUNTER).load(Ordering::Relaxed), head))
            .collect();
        left.sort_unstable_by(|a, b| b.cmp(a));
        self.counter = left.first().map_or(0, |&(counter, _)| counter.wrapping_add(1));
        self.resubmit = left.into_iter().map(|(_, head)| head).collect();
        RingState { avail: used.wrapping_add(self.resubmit.len() as u16), used, ..RingState::NEW }
    }

    /// Lays out a record for a ring with nothing in flight; the version, which makes it valid, goes last.
    fn begin(&mut self, used: u16) -> RingState {
        self.area.u16(USED_IDX).store(used, Ordering::Relaxed);
        self.area.u16(DESC_NUM).store(self.size, Ordering::Relaxed);
        self.area.u16(VERSION).store(RECORD_VERSION, Ordering::Release);
        RingState { avail: used, used, ..RingState::NEW }
    }

    /// Takes the oldest chain of the previous service again.
    pub(super) fn take_again(
        &mut self,
        ring: &SplitDevice,
        chains: &mut Chains,
    ) -> Option<Result<Token, RingError>> {
        let token = ring.take(self.resubmit.pop()?, chains);
        self.in_flight = chains.in_flight();
        Some(token)
    }

    pub(super) fn pop(
        &mut self,
        ring: &mut SplitDevice,
        max: usize,
        chains: &mut Chains,
        out: &mut Vec<Token>,
    ) -> Result<(), RingError> {
        let before = out.len();
        let result = ring.pop(max, chains, out);
        let entries: Entries<'_> = self.area.entries(ENTRIES, self.size);
        let mut counter = self.counter;
        for token in &out[before..] {
            let head = chains.id(token);
            entries.u64(head, COUNTER).store(counter, Ordering::Relaxed);
            entries.u8(head, INFLIGHT).store(1, Ordering::Release);
            counter = counter.wrapping_add(1);
        }
        self.counter = counter;
        self.in_flight = chains.in_flight();
        result
    }

    #[inline(always)]
    pub(super) fn publish(&mut self, ring: &mut SplitDevice, chains: &Chains) -> bool {
        let done = chains.released(self.in_flight - chains.in_flight());
        if done.is_empty() {
            return false;
        }
        let entries: Entries<'_> = self.area.entries(ENTRIES, self.size);
        for (slot, batched) in done.iter().zip(&mut self.batch) {
            let head = chains.id_in(*slot);
            entries.u16(head, NEXT).store(self.last_batch_head, Ordering::Relaxed);
            (self.last_batch_head, *batched) = (head, head);
        }
        // The batch must be found from its last chain before the ring is published, which is a release store.
        self.area.u16(LAST_BATCH_HEAD).store(self.last_batch_head, Ordering::Relaxed);
        ring.publish();
        // Each is a release store, so that none comes before the publication.
        for &head in &self.batch[..done.len()] {
            entries.u8(head, INFLIGHT).store(0, Ordering::Release);
        }
        self.area.u16(USED_IDX).store(ring.state().used, Ordering::Release);
        self.in_flight = chains.in_flight();
        true
    }
}

type Entries<'a> = crate::memory::Entries<'a, ENTRY_BYTES, 8>;

fn entry(head: u16) -> usize {
    ENTRIES + usize::from(head) * ENTRY_BYTES
}

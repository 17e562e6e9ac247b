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
    size: u16,
    /// It was all zeros.
    fresh: bool,
    /// The next value of the entries' counter.
    counter: u64,
    /// By slot: the chain's head. The last one completed.
    heads: Box<[u16]>,
    last_batch_head: u16,
    /// Chains completed since the last publication.
    batch: Vec<u16>,
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
            heads: (0..size).collect(),
            batch: Vec::with_capacity(size.into()),
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
        let head = self.resubmit.pop()?;
        let token = ring.take(head, chains);
        if let Ok(token) = &token {
            self.heads[token.slot()] = head;
        }
        Some(token)
    }

    /// Notes that the chains in `burst` were taken, in this order.
    #[inline(always)]
    pub(super) fn take(&mut self, burst: &[Token], chains: &Chains) {
        for token in burst {
            let head = chains.id(token);
            self.heads[token.slot()] = head;
            let entry = entry(head);
            self.area.u64(entry + COUNTER).store(self.counter, Ordering::Relaxed);
            self.area.u8(entry + INFLIGHT).store(1, Ordering::Release);
            self.counter = self.counter.wrapping_add(1);
        }
    }

    /// Notes that a chain is done and about to be published.
    #[inline(always)]
    pub(super) fn put(&mut self, token: &Token) {
        let head = self.heads[token.slot()];
        self.area.u16(entry(head) + NEXT).store(self.last_batch_head, Ordering::Relaxed);
        self.last_batch_head = head;
        self.batch.push(head);
    }

    /// The batch must be found from its last chain before the ring is published, which is a release store behind this one.
    #[inline(always)]
    pub(super) fn publishing(&mut self) {
        if !self.batch.is_empty() {
            self.area.u16(LAST_BATCH_HEAD).store(self.last_batch_head, Ordering::Relaxed);
        }
    }

    /// Notes that everything since the last call was published, up to used index `used`.
    #[inline(always)]
    pub(super) fn published(&mut self, used: u16) {
        // Each is a release store, so that none comes before the publication.
        for head in self.batch.drain(..) {
            self.area.u8(entry(head) + INFLIGHT).store(0, Ordering::Release);
        }
        self.area.u16(USED_IDX).store(used, Ordering::Release);
    }
}

#[inline(always)]
fn entry(head: u16) -> usize {
    ENTRIES + usize::from(head) * ENTRY_BYTES
}

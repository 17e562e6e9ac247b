//! The record of requests in flight that outlives the service (vhost-user specification, "Inflight I/O tracking").
//!
//! It stands in memory shared with the front end, which keeps it when the service dies and hands it to the next one.
//! That one finds there which chains were taken and not given back, and takes them again. Every step is a plain store
//! in program order (x86-64 keeps the order of stores), so the record is right wherever the service is killed.

use std::sync::atomic::{Ordering, compiler_fence};

use crate::memory::{Area, Backing};
use crate::ring::{Chains, DeviceRing, RingError, RingState, Token};
use std::sync::Arc;

/// Offsets in the record of one split queue: the header, then an entry for each descriptor.
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

/// The version of the layout above.
const RECORD_VERSION: u16 = 1;

/// Why a record cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InflightError {
    /// The queue's part leaves the shared memory or is unaligned.
    #[error("the inflight record has no room for a queue of {0} descriptors at byte {1}")]
    NoRoom(u16, usize),
    /// Written by something else.
    #[error(
        "inflight record of version {version} for {size} descriptors: expected version {RECORD_VERSION} for {expected}"
    )]
    Mismatch {
        /// The version found.
        version: u16,
        /// The ring size found.
        size: u16,
        /// The ring size of this queue.
        expected: u16,
    },
}

/// The record of one split queue.
pub struct SplitInflight {
    area: Area,
    size: u16,
    /// The next value of the entries' counter.
    counter: u64,
    /// Chains completed since the last publication.
    batch: Vec<u16>,
    /// Chains of a previous service, the next one last.
    resubmit: Vec<u16>,
}

impl SplitInflight {
    /// Bytes that the record of a queue of `size` descriptors takes, a multiple of 64.
    #[must_use]
    pub fn bytes(size: u16) -> usize {
        (ENTRIES + usize::from(size) * ENTRY_BYTES).next_multiple_of(64)
    }

    /// Opens the record at `offset` of `backing`, and begins it if it is all zeros.
    ///
    /// # Errors
    /// It does not fit, or belongs to a ring of another size or layout.
    pub fn new(backing: Arc<dyn Backing>, offset: usize, size: u16) -> Result<Self, InflightError> {
        let area =
            Area::new(backing, offset, Self::bytes(size), 8).ok_or(InflightError::NoRoom(size, offset))?;
        let version = area.u16(VERSION).load(Ordering::Relaxed);
        let found = area.u16(DESC_NUM).load(Ordering::Relaxed);
        match (version, found) {
            (0, _) => {
                area.u16(DESC_NUM).store(size, Ordering::Relaxed);
                area.u16(VERSION).store(RECORD_VERSION, Ordering::Release);
            }
            (RECORD_VERSION, found) if found == size => {}
            (version, found) => return Err(InflightError::Mismatch { version, size: found, expected: size }),
        }
        Ok(Self { area, size, counter: 0, batch: Vec::with_capacity(size.into()), resubmit: Vec::new() })
    }

    /// Finds out what a previous service left, and where the ring therefore stands.
    pub(crate) fn recover(&mut self, ring: &DeviceRing) -> RingState {
        let used = ring.state().used;
        let recorded = self.area.u16(USED_IDX).load(Ordering::Relaxed);
        if recorded != used {
            // It died between publishing a batch and clearing it: the batch, linked from its last chain, is done.
            let mut head = self.area.u16(LAST_BATCH_HEAD).load(Ordering::Relaxed);
            for _ in 0..used.wrapping_sub(recorded).min(self.size) {
                if head >= self.size {
                    break;
                }
                self.area.u8(Self::entry(head) + INFLIGHT).store(0, Ordering::Relaxed);
                head = self.area.u16(Self::entry(head) + NEXT).load(Ordering::Relaxed);
            }
            self.area.u16(USED_IDX).store(used, Ordering::Relaxed);
        }
        let mut left: Vec<(u64, u16)> = (0..self.size)
            .filter(|&head| self.area.u8(Self::entry(head) + INFLIGHT).load(Ordering::Relaxed) != 0)
            .map(|head| (self.area.u64(Self::entry(head) + COUNTER).load(Ordering::Relaxed), head))
            .collect();
        left.sort_unstable_by(|a, b| b.cmp(a));
        self.counter = left.first().map_or(0, |&(counter, _)| counter.wrapping_add(1));
        self.resubmit = left.into_iter().map(|(_, head)| head).collect();
        if !self.resubmit.is_empty() {
            tracing::info!(requests = self.resubmit.len(), "taking up requests of a previous service");
        }
        RingState { avail: used.wrapping_add(self.resubmit.len() as u16), used, ..RingState::NEW }
    }

    /// Whether chains of a previous service are still to be taken again.
    #[inline(always)]
    pub(crate) fn has_resubmissions(&self) -> bool {
        !self.resubmit.is_empty()
    }

    /// Takes up to `max` of them, oldest first.
    pub(crate) fn resubmit(
        &mut self,
        ring: &DeviceRing,
        max: usize,
        chains: &mut Chains,
        out: &mut Vec<Token>,
    ) -> Result<(), RingError> {
        let DeviceRing::Split(ring) = ring else {
            self.resubmit.clear();
            return Ok(());
        };
        for _ in 0..max {
            let Some(head) = self.resubmit.pop() else { break };
            out.push(ring.take(head, chains)?);
        }
        Ok(())
    }

    /// Notes that a chain was taken.
    #[inline(always)]
    pub(crate) fn take(&mut self, head: u16) {
        let entry = Self::entry(head);
        self.area.u64(entry + COUNTER).store(self.counter, Ordering::Relaxed);
        self.area.u8(entry + INFLIGHT).store(1, Ordering::Release);
        self.counter = self.counter.wrapping_add(1);
    }

    /// Notes that a chain is done and about to be published.
    #[inline(always)]
    pub(crate) fn put(&mut self, head: u16) {
        let last = self.area.u16(LAST_BATCH_HEAD).load(Ordering::Relaxed);
        self.area.u16(Self::entry(head) + NEXT).store(last, Ordering::Relaxed);
        self.area.u16(LAST_BATCH_HEAD).store(head, Ordering::Release);
        self.batch.push(head);
        // The link must be in memory before the used index: neither compiler nor processor (x86-64) reorders stores.
        compiler_fence(Ordering::SeqCst);
    }

    /// Notes that everything since the last call was published, up to used index `used`.
    #[inline(always)]
    pub(crate) fn published(&mut self, used: u16) {
        compiler_fence(Ordering::SeqCst);
        for head in self.batch.drain(..) {
            self.area.u8(Self::entry(head) + INFLIGHT).store(0, Ordering::Relaxed);
        }
        self.area.u16(USED_IDX).store(used, Ordering::Release);
    }

    #[inline(always)]
    fn entry(head: u16) -> usize {
        ENTRIES + usize::from(head) * ENTRY_BYTES
    }
}

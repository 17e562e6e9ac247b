//! The record of requests in flight that outlives the service (vhost-user specification, "Inflight I/O tracking").
//!
//! It stands in memory shared with the front end, which keeps it when the service dies and hands it to the next one.
//! That one finds there which chains were taken and not given back, and takes them again. The service can be killed
//! between any two stores, and the record is right after each of them. Where their order matters, the later one is a
//! release store.
//!
//! The layouts are the specification's: a front end may hand a record from one back end to another.

mod packed;
mod split;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::memory::{Area, Backing};
use crate::ring::{Chains, DeviceRing, RingError, RingFormat, RingState, Token};

use packed::PackedInflight;
use split::SplitInflight;

/// The version of both layouts, and where it stands in both. All zeros, a record is not begun.
const RECORD_VERSION: u16 = 1;
const VERSION_AT: usize = 8;

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
    /// It is for the other ring format than the queue's.
    #[error("the inflight record is for {0:?} rings")]
    Format(RingFormat),
}

/// The record of one queue.
pub struct Inflight(Record);

enum Record {
    Split(SplitInflight),
    Packed(PackedInflight),
}

impl Inflight {
    /// Bytes that the record of a queue of `size` descriptors takes, a multiple of 64.
    #[must_use]
    pub fn bytes(format: RingFormat, size: u16) -> usize {
        match format {
            RingFormat::Split => split::bytes(size),
            RingFormat::Packed => packed::bytes(size),
        }
    }

    /// Whether the record at `offset` of `backing` has been begun, by this process or another.
    #[must_use]
    pub fn is_begun(backing: Arc<dyn Backing>, offset: usize) -> bool {
        let header = Area::new(backing, offset, VERSION_AT + 2, 8);
        header.is_some_and(|header| header.u16(VERSION_AT).load(Ordering::Relaxed) != 0)
    }

    /// Opens the record at `offset` of `backing`. One that is all zeros begins with its queue.
    ///
    /// # Errors
    /// It does not fit, or belongs to a ring of another size or layout.
    pub fn new(
        format: RingFormat,
        backing: Arc<dyn Backing>,
        offset: usize,
        size: u16,
    ) -> Result<Self, InflightError> {
        let area = Area::new(backing, offset, Self::bytes(format, size), 8)
            .ok_or(InflightError::NoRoom(size, offset))?;
        Ok(Self(match format {
            RingFormat::Split => Record::Split(SplitInflight::new(area, size)?),
            RingFormat::Packed => Record::Packed(PackedInflight::new(area, size)?),
        }))
    }

    /// The ring format it is for.
    #[must_use]
    pub fn format(&self) -> RingFormat {
        match &self.0 {
            Record::Split(_) => RingFormat::Split,
            Record::Packed(_) => RingFormat::Packed,
        }
    }

    /// Finds out what a previous service left, and where the ring therefore stands. `ring` is the ring as it was found;
    /// `state` where the front end says it stands.
    ///
    /// # Errors
    /// The record is damaged, or for the other ring format.
    pub(crate) fn recover(
        &mut self,
        ring: &DeviceRing,
        state: Option<RingState>,
    ) -> Result<RingState, RingError> {
        let state = match (&mut self.0, ring) {
            (Record::Split(record), DeviceRing::Split(ring)) => record.recover(ring.state().used),
            (Record::Packed(record), DeviceRing::Packed(ring)) => record.recover(ring, state)?,
            (Record::Split(SplitInflight { size, .. }) | Record::Packed(PackedInflight { size, .. }), _) => {
                return Err(RingError::BadRecord { size: *size });
            }
        };
        let requests = self.resubmissions();
        if requests > 0 {
            tracing::info!(requests, "taking up requests of a previous service");
        }
        Ok(state)
    }

    /// Chains of a previous service that are still to be taken again.
    #[inline(always)]
    pub(crate) fn resubmissions(&self) -> usize {
        match &self.0 {
            Record::Split(record) => record.resubmit.len(),
            Record::Packed(record) => record.resubmit.len(),
        }
    }

    /// Takes up to `max` of them, oldest first.
    #[cold]
    pub(crate) fn resubmit(
        &mut self,
        ring: &DeviceRing,
        max: usize,
        chains: &mut Chains,
        out: &mut Vec<Token>,
    ) -> Result<(), RingError> {
        for _ in 0..max {
            let token = match (&mut self.0, ring) {
                (Record::Split(record), DeviceRing::Split(ring)) => record.take_again(ring, chains),
                (Record::Packed(record), DeviceRing::Packed(_)) => record.take_again(chains),
                _ => None,
            };
            match token {
                Some(token) => out.push(token?),
                None => break,
            }
        }
        Ok(())
    }

    /// Takes up to `max` chains from `ring` and records them; otherwise as [`DeviceRing::pop`].
    #[inline(always)]
    pub(crate) fn pop(
        &mut self,
        ring: &mut DeviceRing,
        max: usize,
        chains: &mut Chains,
        out: &mut Vec<Token>,
    ) -> Result<(), RingError> {
        match (&mut self.0, ring) {
            (Record::Split(record), DeviceRing::Split(ring)) => record.pop(ring, max, chains, out),
            (Record::Packed(record), DeviceRing::Packed(ring)) => record.pop(ring, max, chains, out),
            // `recover` has refused it.
            _ => Ok(()),
        }
    }

    /// Shows the driver what was given back as [`DeviceRing::publish`] does, and notes that it is out of flight. `chains` are
    /// as they were when the last of it was given back.
    #[inline(always)]
    pub(crate) fn publish(&mut self, ring: &mut DeviceRing, chains: &Chains) -> bool {
        match (&mut self.0, ring) {
            (Record::Split(record), DeviceRing::Split(ring)) => record.publish(ring, chains),
            (Record::Packed(record), DeviceRing::Packed(ring)) => record.publish(ring, chains),
            _ => false,
        }
    }
}

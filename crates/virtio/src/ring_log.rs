//! The dirty log of what a device writes into a ring: used entries, and when it wants to be kicked.
//!
//! A split ring is logged under the address that the front end names for its used ring. In a packed one that address is the
//! device's event suppression area, which takes the used ring's place; used descriptors lie in the descriptor ring.

use crate::memory::{DirtyLog, GuestAddr};
use crate::ring::{RingConfig, RingFormat, RingState};

/// Where writes are logged for a migration.
#[derive(Clone)]
pub struct UsedLog {
    /// The log.
    pub log: DirtyLog,
    /// Under which guest address the used ring, or the device's event suppression area, is logged; None if the ring is not.
    pub used_ring: Option<GuestAddr>,
}

/// Bytes of a used entry of a split ring, and of a descriptor (virtio 1.2, sections 2.7.8 and 2.8.13).
const USED_BYTES: u64 = 8;
const DESC_BYTES: u64 = 16;

/// The log of one ring.
pub(crate) struct RingLog {
    log: DirtyLog,
    /// The used ring or the event suppression area.
    device: GuestAddr,
    ring: RingConfig,
    /// Packed: the first descriptor used since the last publication, which is written by it.
    first: Option<u16>,
}

impl RingLog {
    pub(crate) fn new(log: &UsedLog, ring: RingConfig) -> Option<Self> {
        Some(Self { log: log.log.clone(), device: log.used_ring?, ring, first: None })
    }

    /// A used entry was written at used index `at`.
    pub(crate) fn used(&mut self, at: u16) {
        match self.ring.format {
            RingFormat::Split => {
                self.mark(4 + USED_BYTES * u64::from(at & (self.ring.size - 1)), USED_BYTES);
            }
            RingFormat::Packed => {
                self.first.get_or_insert(at);
                self.mark_descriptor(at);
            }
        }
    }

    /// The used entries were published.
    pub(crate) fn published(&mut self) {
        match self.ring.format {
            RingFormat::Split => self.mark(2, 2),
            RingFormat::Packed => {
                if let Some(first) = self.first.take() {
                    self.mark_descriptor(first);
                }
            }
        }
    }

    /// Kicks were asked for.
    pub(crate) fn armed(&self) {
        self.disarmed();
        if self.ring.format == RingFormat::Split {
            self.mark(0, 2);
        }
    }

    /// Kicks were suppressed.
    pub(crate) fn disarmed(&self) {
        match self.ring.format {
            RingFormat::Split if self.ring.event_idx => {
                self.mark(4 + USED_BYTES * u64::from(self.ring.size), 2);
            }
            RingFormat::Split => self.mark(0, 2),
            RingFormat::Packed => self.mark(0, 4),
        }
    }

    /// The ring was put back to `state`, with the descriptors between its two positions in flight.
    pub(crate) fn recovered(&self, state: &RingState) {
        if self.ring.format == RingFormat::Packed {
            let mut at = (state.used, state.used_wrap);
            while at != (state.avail, state.avail_wrap) {
                self.mark_descriptor(at.0);
                at = if at.0 + 1 == self.ring.size { (0, !at.1) } else { (at.0 + 1, at.1) };
            }
        }
    }

    fn mark(&self, offset: u64, len: u64) {
        // The front end names the address; one too high for its ring is beyond the log.
        self.log.mark(GuestAddr(self.device.0.saturating_add(offset)), len);
    }

    fn mark_descriptor(&self, index: u16) {
        self.log.mark(GuestAddr(self.ring.desc.0 + DESC_BYTES * u64::from(index)), DESC_BYTES);
    }
}

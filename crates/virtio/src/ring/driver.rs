//! Either driver end, for load generators, the embedded guest and tests.

use crate::memory::{Area, GuestAddr, Memory};

use super::{Buffer, PackedDriver, RingConfig, RingError, RingFormat, SplitDriver};

/// A chain that came back from the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// What [`DriverRing::add`] returned for it.
    pub id: u16,
    /// Bytes the device says it wrote.
    pub written: u32,
}

/// The driver end of a ring in either format.
pub enum DriverRing {
    /// A split ring.
    Split(SplitDriver),
    /// A packed ring.
    Packed(PackedDriver),
}

macro_rules! either {
    ($self:ident, $ring:ident => $call:expr) => {
        match $self {
            Self::Split($ring) => $call,
            Self::Packed($ring) => $call,
        }
    };
}

impl DriverRing {
    /// Bytes to set aside for the three areas of a ring of `size` descriptors: descriptors, driver area, device area,
    /// in this order, each starting at a multiple of 64 bytes.
    #[must_use]
    pub fn layout(format: RingFormat, size: u16) -> [usize; 3] {
        use super::layout::{DESC_BYTES, EVENT_BYTES, avail_bytes, used_bytes};
        let desc = usize::from(size) * DESC_BYTES;
        let (driver, device) = match format {
            RingFormat::Split => (avail_bytes(size), used_bytes(size)),
            RingFormat::Packed => (EVENT_BYTES, EVENT_BYTES),
        };
        [desc, driver, device].map(|bytes| bytes.next_multiple_of(64))
    }

    /// Lays out a new, empty ring in zeroed memory.
    ///
    /// # Errors
    /// The size is impossible, or an area is unaligned or not in `memory`.
    pub fn new(config: &RingConfig, memory: &Memory) -> Result<Self, RingError> {
        Ok(match config.format {
            RingFormat::Split => Self::Split(SplitDriver::new(config, memory)?),
            RingFormat::Packed => Self::Packed(PackedDriver::new(config, memory)?),
        })
    }

    /// Descriptors not in use.
    #[must_use]
    pub fn free(&self) -> usize {
        either!(self, ring => ring.free())
    }

    /// Queues a chain of `buffers`, readable ones first; None if the ring has too few free descriptors. The device
    /// sees it after [`DriverRing::publish`].
    #[inline(always)]
    pub fn add(&mut self, buffers: &[Buffer]) -> Option<u16> {
        either!(self, ring => ring.add(buffers))
    }

    /// Queues a chain through an indirect table, which takes one descriptor of the ring. `table` is the memory at
    /// `addr`, 16 bytes for each buffer; it belongs to the device until the chain comes back.
    #[inline(always)]
    pub fn add_indirect(&mut self, table: &Area, addr: GuestAddr, buffers: &[Buffer]) -> Option<u16> {
        either!(self, ring => ring.add_indirect(table, addr, buffers))
    }

    /// Shows the device everything that was added, by one store.
    #[inline(always)]
    pub fn publish(&mut self) {
        either!(self, ring => ring.publish());
    }

    /// Whether the device wants a kick for what was published since the last time this was asked.
    #[inline(always)]
    pub fn needs_kick(&mut self) -> bool {
        either!(self, ring => ring.needs_kick())
    }

    /// The next chain that came back.
    ///
    /// # Errors
    /// The device gave back something that it does not have.
    #[inline(always)]
    pub fn reap(&mut self) -> Result<Option<Completion>, RingError> {
        either!(self, ring => ring.reap())
    }

    /// Asks for calls; true if chains have come back already.
    pub fn arm_calls(&mut self) -> bool {
        either!(self, ring => ring.arm_calls())
    }

    /// Asks for no calls.
    pub fn disarm_calls(&mut self) {
        either!(self, ring => ring.disarm_calls());
    }
}

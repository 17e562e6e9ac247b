//! Virtqueues in both formats (virtio 1.2, sections 2.7 and 2.8) and from both ends.
//!
//! The device end ([`SplitDevice`], [`PackedDevice`]) trusts nothing it reads; the driver end ([`SplitDriver`],
//! [`PackedDriver`]) serves load generators, the embedded guest and tests. All of it is safe code over
//! [`Area`](crate::memory::Area).

mod chain;
mod descriptor;
mod device;
mod driver;
mod event;
mod packed_device;
mod packed_driver;
#[cfg(feature = "std")]
mod packed_recovery;
mod split_device;
mod split_driver;

pub use chain::{
    CHAINS_PER_BURST_MAX, Chain, Chains, DESCRIPTORS_PER_CHAIN_MAX, SEGMENTS_PER_CHAIN_MAX, Token, Used,
};
pub use descriptor::{Buffer, Descriptor};
pub use device::DeviceRing;
pub use driver::{Completion, DriverRing};
pub use event::need_event;
pub use packed_device::PackedDevice;
pub use packed_driver::PackedDriver;
pub use split_device::SplitDevice;
pub use split_driver::SplitDriver;

use crate::memory::{GuestAddr, MemoryError};

/// The largest ring: the limit of both formats (section 2.7 and 2.8.10).
pub const RING_SIZE_MAX: u16 = 32768;

/// How a ring is laid out in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingFormat {
    /// Descriptor table, available ring, used ring.
    Split,
    /// One ring of descriptors that both sides write.
    Packed,
}

/// What driver and device agreed on for one ring.
#[derive(Clone, Copy, Debug)]
pub struct RingConfig {
    /// The layout.
    pub format: RingFormat,
    /// Number of descriptors: 1 to [`RING_SIZE_MAX`]; a power of two for split rings.
    pub size: u16,
    /// Descriptor table or descriptor ring.
    pub desc: GuestAddr,
    /// Available ring, or the driver's event suppression area.
    pub driver: GuestAddr,
    /// Used ring, or the device's event suppression area.
    pub device: GuestAddr,
    /// `VIRTIO_F_EVENT_IDX` was negotiated.
    pub event_idx: bool,
    /// `VIRTIO_F_INDIRECT_DESC` was negotiated.
    pub indirect: bool,
    /// `VIRTIO_F_IN_ORDER` was negotiated.
    pub in_order: bool,
}

/// Where a ring stands: what a device must know to go on where another left off.
///
/// For split rings the indices are free-running and the wrap counters unused; for packed rings indices are below the
/// ring's size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingState {
    /// The next available entry to take.
    pub avail: u16,
    /// The next used entry to write.
    pub used: u16,
    /// Packed: the driver's wrap counter at `avail`.
    pub avail_wrap: bool,
    /// Packed: the device's wrap counter at `used`.
    pub used_wrap: bool,
}

impl RingState {
    /// The state of a ring that has not been used.
    pub const NEW: Self = Self { avail: 0, used: 0, avail_wrap: true, used_wrap: true };
}

/// What was wrong with a ring. The queue stops; the reason is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are the values named in each message")]
pub enum RingError {
    /// Size 0, too large, or not a power of two.
    #[error("ring size {0}: it must be 1 to {RING_SIZE_MAX}, and a power of two for split rings")]
    BadSize(u16),
    /// A state that this ring cannot be in.
    #[error("ring position {0} does not fit a ring of {1} descriptors")]
    BadState(u16, u16),
    /// The ring itself is not in guest memory.
    #[error("the ring is not in guest memory: {0}")]
    Memory(#[from] MemoryError),
    /// The driver made more available than there are descriptors.
    #[error("available index moved from {from} to {to}, more than the ring's {size} descriptors")]
    AvailJump { from: u16, to: u16, size: u16 },
    /// The available ring names a descriptor outside the table.
    #[error("available entry names descriptor {head} of {size}")]
    BadHead { head: u16, size: u16 },
    /// A chain is longer than the ring, which a loop makes it.
    #[error("descriptor chain at {head} does not end within {limit} descriptors")]
    ChainTooLong { head: u16, limit: u32 },
    /// Buffers that lie in too many memory regions.
    #[error(
        "descriptor chain at {head} has buffers of more than {limit} pieces: each memory region they lie in counts"
    )]
    TooManySegments { head: u16, limit: u32 },
    /// A chain continues outside its table.
    #[error("descriptor chain at {head} continues at {next}, outside its table of {size}")]
    BadNext { head: u16, next: u16, size: u32 },
    /// A readable descriptor after a writable one.
    #[error("descriptor chain at {head} has a device-readable buffer after a device-writable one")]
    ReadableAfterWritable { head: u16 },
    /// An indirect table where none may be.
    #[error(
        "descriptor chain at {head} has an indirect table that was not negotiated, is nested or is not its end"
    )]
    BadIndirect { head: u16 },
    /// An indirect table of an impossible length.
    #[error("indirect table of {len} bytes: it must be 16 to {max} bytes, a multiple of 16")]
    BadIndirectLen { len: u32, max: u32 },
    /// A buffer that is not guest memory.
    #[error("descriptor chain at {head}: {source}")]
    BadBuffer { head: u16, source: MemoryError },
    /// More chains are in flight than the ring can hold.
    #[error("more chains in flight than the ring's {size} descriptors")]
    TooManyChains { size: u16 },
    /// The device gave back something that it does not have.
    #[error("used entry names {id}, which is not in flight")]
    BadUsed { id: u32 },
    /// A record of requests in flight that no service leaves behind.
    #[error("the inflight record is damaged: not each of its {size} entries is in one chain or free")]
    BadRecord { size: u16 },
    /// Guest memory was taken away.
    #[error("the file behind guest memory was truncated")]
    MemoryGone,
    /// The driver's side made a call block.
    #[error(
        "a call of the driver blocked: the descriptor it listens on was full, and had been made blocking"
    )]
    CallBlocked,
    /// The device's code for the queue panicked. What was in flight is not answered.
    #[error("the device's code for this queue panicked")]
    Panicked,
}

/// Which queue layout sizes, in bytes.
pub(crate) mod layout {
    pub(crate) const DESC_BYTES: usize = 16;
    /// Descriptors where a ring has them, at a multiple of their size.
    pub(crate) type Descriptors<'a> = crate::memory::Entries<'a, DESC_BYTES, DESC_BYTES>;
    /// Split available ring: flags, idx, ring[size], used_event.
    pub(crate) fn avail_bytes(size: u16) -> usize {
        6 + 2 * size as usize
    }
    /// Split used ring: flags, idx, ring[size] of 8 bytes, avail_event.
    pub(crate) fn used_bytes(size: u16) -> usize {
        6 + 8 * size as usize
    }
    /// Packed event suppression structure.
    pub(crate) const EVENT_BYTES: usize = 4;
}

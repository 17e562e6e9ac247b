//! What a record of requests in flight needs to know of a packed ring and its descriptors, and how a ring is put back
//! to where a dead service left it.

use core::sync::atomic::Ordering;

use super::chain::{ChainBuilder, DESCRIPTORS_PER_CHAIN_MAX};
use super::descriptor::{AVAIL, USED};
use super::packed_device::{Position, is_available_at};
use super::{Chains, Descriptor, PackedDevice, RingError, RingState, Token};

impl Descriptor {
    /// The flags, read as a packed descriptor.
    #[inline(always)]
    pub(crate) fn flags_packed(self) -> u16 {
        self.fourth
    }

    /// The buffer id, read as a packed descriptor.
    #[inline(always)]
    pub(crate) fn id_packed(self) -> u16 {
        self.third
    }
}

impl Chains {
    /// Ring descriptors that the chain occupies; told of packed rings only.
    #[inline(always)]
    pub(crate) fn descriptors(&self, token: &Token) -> u16 {
        self.slot(token).descriptors
    }
}

impl PackedDevice {
    /// Whether the descriptor at `offset` is as the driver made it available, with its wrap counter at `wrap`.
    pub(crate) fn is_available_at(&self, offset: u16, wrap: bool) -> bool {
        is_available_at(self.descriptors(), Position { offset, wrap })
    }

    /// Takes back used descriptors that were written behind `used` and never published, `outstanding` of them at most,
    /// and tells where the ring stands when those are in flight.
    pub(crate) fn forget_used(&self, used: (u16, bool), outstanding: u16) -> RingState {
        let mut avail = Position { offset: used.0, wrap: used.1 };
        for _ in 0..outstanding {
            let flags = if avail.wrap { AVAIL } else { USED };
            self.flags(avail.offset).store(flags, Ordering::Release);
            avail.advance(1, self.size);
        }
        RingState { avail: avail.offset, avail_wrap: avail.wrap, used: used.0, used_wrap: used.1 }
    }

    /// Takes a chain from saved copies of its descriptors.
    ///
    /// # Errors
    /// The chain is malformed.
    pub(crate) fn take_copies(copies: &[Descriptor], chains: &mut Chains) -> Result<Token, RingError> {
        chains.take(0, |builder: &mut ChainBuilder<'_>| {
            for (before, copy) in (0..DESCRIPTORS_PER_CHAIN_MAX).zip(copies) {
                builder.push(*copy, copy.flags_packed(), true, before)?;
                builder.slot.id = copy.id_packed();
            }
            builder.slot.descriptors = copies.len() as u16;
            Ok(())
        })
    }
}

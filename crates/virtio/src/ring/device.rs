//! Either device end. The format is looked at once per burst, the code behind it is straight-line.

use alloc::vec::Vec;

use crate::memory::Memory;

use super::{Chains, PackedDevice, RingConfig, RingError, RingFormat, RingState, SplitDevice, Token, Used};

/// The device end of a ring in either format.
pub enum DeviceRing {
    /// A split ring.
    Split(SplitDevice),
    /// A packed ring.
    Packed(PackedDevice),
}

impl DeviceRing {
    /// Opens the ring described by `config` at `state`; None is a split ring with nothing in flight, or a packed ring
    /// that has not been used.
    ///
    /// # Errors
    /// The size or state is impossible, or an area is unaligned or not in `memory`.
    pub fn new(config: &RingConfig, memory: &Memory, state: Option<RingState>) -> Result<Self, RingError> {
        Ok(match config.format {
            RingFormat::Split => Self::Split(SplitDevice::new(config, memory, state)?),
            RingFormat::Packed => Self::Packed(PackedDevice::new(config, memory, state)?),
        })
    }

    /// Takes up to `max` chains; their tokens are appended to `out`.
    ///
    /// # Errors
    /// The ring is broken. Chains taken before the fault are in `out` and can be completed.
    #[inline(always)]
    pub fn pop(&mut self, max: usize, chains: &mut Chains, out: &mut Vec<Token>) -> Result<(), RingError> {
        match self {
            Self::Split(ring) => ring.pop(max, chains, out),
            Self::Packed(ring) => ring.pop(max, chains, out),
        }
    }

    /// Gives chains back. The driver sees them after [`DeviceRing::publish`].
    #[inline(always)]
    pub fn push_used(&mut self, chains: &mut Chains, burst: impl Iterator<Item = Used>) {
        match self {
            Self::Split(ring) => ring.push_used(chains, burst),
            Self::Packed(ring) => ring.push_used(chains, burst),
        }
    }

    /// Shows the driver all used entries, by one store; false if there was none.
    #[inline(always)]
    pub fn publish(&mut self) -> bool {
        match self {
            Self::Split(ring) => ring.publish(),
            Self::Packed(ring) => ring.publish(),
        }
    }

    /// Whether the driver wants a call for what was published since the last time this was asked.
    #[inline(always)]
    pub fn needs_call(&mut self) -> bool {
        match self {
            Self::Split(ring) => ring.needs_call(),
            Self::Packed(ring) => ring.needs_call(),
        }
    }

    /// Counts what was published as announced, where nobody listens for calls.
    #[inline(always)]
    pub fn skip_call(&mut self) {
        match self {
            Self::Split(ring) => ring.skip_call(),
            Self::Packed(ring) => ring.skip_call(),
        }
    }

    /// Asks for kicks; true if chains are waiting already.
    pub fn arm(&mut self) -> bool {
        match self {
            Self::Split(ring) => ring.arm(),
            Self::Packed(ring) => ring.arm(),
        }
    }

    /// Asks for no kicks. One may still come.
    pub fn disarm(&mut self) {
        match self {
            Self::Split(ring) => ring.disarm(),
            Self::Packed(ring) => ring.disarm(),
        }
    }

    /// Whether the suppression of kicks is to be renewed by another [`DeviceRing::disarm`]: it reaches only so far ahead in
    /// a split ring. To be asked now and then, at least every 32 Ki chains.
    #[inline(always)]
    #[must_use]
    pub fn suppression_ends(&self) -> bool {
        matches!(self, Self::Split(ring) if ring.suppression_ends())
    }

    /// Where the ring stands.
    #[must_use]
    pub fn state(&self) -> RingState {
        match self {
            Self::Split(ring) => ring.state(),
            Self::Packed(ring) => ring.state(),
        }
    }
}

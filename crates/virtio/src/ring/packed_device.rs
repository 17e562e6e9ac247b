//! The device end of a packed ring (virtio 1.2, section 2.8).

use alloc::vec::Vec;
use core::sync::atomic::{Ordering, fence};

use crate::memory::{Area, Memory};

use super::chain::{
    CHAINS_PER_BURST_MAX, ChainBuilder, Chains, DESCRIPTORS_PER_CHAIN_MAX, Token, Used, Walk,
};
use super::descriptor::{AVAIL, Descriptor, NEXT, USED, WRITE};
use super::event::need_packed_event;
use super::layout::{DESC_BYTES, Descriptors, EVENT_BYTES};
use super::{RING_SIZE_MAX, RingConfig, RingError, RingState};

/// Event suppression flags (section 2.8.10).
pub(super) const EVENT_ENABLE: u16 = 0;
pub(super) const EVENT_DISABLE: u16 = 1;
pub(super) const EVENT_DESC: u16 = 2;

/// An offset in a packed ring with the wrap counter of the side that moves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) offset: u16,
    pub(super) wrap: bool,
}

impl Position {
    #[inline(always)]
    pub(super) fn advance(&mut self, count: u16, size: u16) {
        // In 32 bits: two numbers up to 32768 do not fit in 16.
        let next = u32::from(self.offset) + u32::from(count);
        self.wrap ^= next >= u32::from(size);
        self.offset = if next >= u32::from(size) { next - u32::from(size) } else { next } as u16;
    }

    pub(super) fn to_event(self) -> u16 {
        self.offset | u16::from(self.wrap) << 15
    }
}

/// The device end of a packed ring.
pub struct PackedDevice {
    pub(super) size: u16,
    pub(super) ring: Area,
    driver_event: Area,
    device_event: Area,
    event_idx: bool,
    avail: Position,
    used: Position,
    /// Descriptors taken and not given back.
    outstanding: u16,
    /// The first unpublished used descriptor, whose flags are written last.
    first: Option<(u16, u16)>,
    /// Descriptors given back since the driver was last considered for a call.
    unannounced: u16,
}

impl PackedDevice {
    /// Opens the ring described by `config` at `state`; None is a ring that has not been used.
    ///
    /// # Errors
    /// The size is 0 or above 32768, `state` lies outside the ring, or an area is unaligned or not in `memory`.
    pub fn new(config: &RingConfig, memory: &Memory, state: Option<RingState>) -> Result<Self, RingError> {
        let size = config.size;
        if size == 0 || size > RING_SIZE_MAX {
            return Err(RingError::BadSize(size));
        }
        let state = state.unwrap_or(RingState::NEW);
        for offset in [state.avail, state.used] {
            if offset >= size {
                return Err(RingError::BadState(offset, size));
            }
        }
        // What lies between the two positions was taken and not given back.
        let lap = if state.avail_wrap == state.used_wrap { 0 } else { u32::from(size) };
        let outstanding = (lap + u32::from(state.avail)).checked_sub(state.used.into());
        let Some(outstanding) = outstanding.filter(|&n| n <= size.into()) else {
            return Err(RingError::BadState(state.avail, size));
        };
        Ok(Self {
            size,
            ring: memory.area(config.desc, usize::from(size) * DESC_BYTES, DESC_BYTES)?,
            driver_event: memory.area(config.driver, EVENT_BYTES, 4)?,
            device_event: memory.area(config.device, EVENT_BYTES, 4)?,
            event_idx: config.event_idx,
            avail: Position { offset: state.avail, wrap: state.avail_wrap },
            used: Position { offset: state.used, wrap: state.used_wrap },
            outstanding: outstanding as u16,
            first: None,
            unannounced: 0,
        })
    }

    /// Where the ring stands.
    #[must_use]
    pub fn state(&self) -> RingState {
        RingState {
            avail: self.avail.offset,
            used: self.used.offset,
            avail_wrap: self.avail.wrap,
            used_wrap: self.used.wrap,
        }
    }

    /// Takes up to `max` chains; their tokens are appended to `out`.
    ///
    /// # Errors
    /// The ring is broken. Chains taken before the fault are in `out` and can be completed.
    // A function of its own: inlined, it would share the registers with all the device does.
    #[inline(never)]
    pub fn pop(&mut self, max: usize, chains: &mut Chains, out: &mut Vec<Token>) -> Result<(), RingError> {
        let (ring, size) = (self.ring.entries(0, self.size), self.size);
        let (mut avail, mut free) = (self.avail, size - self.outstanding);
        let mut result = Ok(());
        for _ in 0..max.min(CHAINS_PER_BURST_MAX) {
            if !is_available_at(ring, avail) {
                break;
            }
            // Descriptors still in flight cannot be available again, whatever their flags say.
            if free == 0 {
                result = Err(RingError::TooManyChains { size });
                break;
            }
            let (from, before) = (avail, free);
            let walk = PackedWalk { ring, size, avail: &mut avail, free: &mut free };
            match chains.take(from.offset, walk) {
                Ok(token) => out.push(token),
                Err(error) => {
                    (avail, free, result) = (from, before, Err(error));
                    break;
                }
            }
        }
        (self.avail, self.outstanding) = (avail, size - free);
        result
    }

    /// Gives chains back. The driver sees them after [`PackedDevice::publish`].
    #[inline(always)]
    pub(crate) fn push_used(&mut self, chains: &mut Chains, burst: impl Iterator<Item = Used>) {
        let (ring, size) = (self.descriptors(), self.size);
        let (mut used, mut first, mut given_back) = (self.used, self.first, 0);
        for Used { token, written } in burst {
            let (id, descriptors) = chains.release(token);
            let at = used.offset;
            ring.u32(at, 8).store(written, Ordering::Relaxed);
            ring.u16(at, 12).store(id, Ordering::Relaxed);
            let state = if used.wrap { AVAIL | USED } else { 0 };
            let flags = state | if written > 0 { WRITE } else { 0 };
            // The driver looks at used descriptors in order, so holding back the first one's flags holds back all.
            if first.is_none() {
                first = Some((at, flags));
            } else {
                ring.u16(at, 14).store(flags, Ordering::Release);
            }
            used.advance(descriptors, size);
            given_back += descriptors;
        }
        (self.used, self.first) = (used, first);
        self.outstanding -= given_back;
        self.unannounced = self.unannounced.saturating_add(given_back);
    }

    /// Shows the driver all used descriptors, by one store; false if there was none.
    #[inline(always)]
    pub fn publish(&mut self) -> bool {
        let Some((at, flags)) = self.first.take() else { return false };
        self.flags(at).store(flags, Ordering::Release);
        true
    }

    /// Whether the driver wants a call for what was published since the last time this was asked.
    #[inline(always)]
    pub fn needs_call(&mut self) -> bool {
        let count = core::mem::take(&mut self.unannounced);
        // Our descriptors must be visible before we read what the driver waits for.
        fence(Ordering::SeqCst);
        // One read of both fields, so that they belong together.
        let event = self.driver_event.u32(0).load(Ordering::Relaxed);
        let (off_wrap, flags) = (event as u16, (event >> 16) as u16 & 3);
        match flags {
            EVENT_DISABLE => false,
            EVENT_DESC if self.event_idx => {
                need_packed_event(off_wrap, self.used.offset, self.used.wrap, count, self.size)
            }
            _ => true,
        }
    }

    /// Counts what was published as announced, where nobody listens for calls.
    #[inline(always)]
    pub fn skip_call(&mut self) {
        self.unannounced = 0;
    }

    /// Asks for kicks; true if chains are waiting already.
    pub fn arm(&mut self) -> bool {
        let (off_wrap, flags) =
            if self.event_idx { (self.avail.to_event(), EVENT_DESC) } else { (0, EVENT_ENABLE) };
        let event = u32::from(off_wrap) | u32::from(flags) << 16;
        self.device_event.u32(0).store(event, Ordering::Relaxed);
        // The request must be visible before we look once more; the driver does the reverse.
        fence(Ordering::SeqCst);
        self.is_available()
    }

    /// Asks for no kicks. One may still come.
    pub fn disarm(&mut self) {
        self.device_event.u32(0).store(u32::from(EVENT_DISABLE) << 16, Ordering::Relaxed);
    }

    #[inline(always)]
    pub(crate) fn descriptors(&self) -> Descriptors<'_> {
        self.ring.entries(0, self.size)
    }

    #[inline(always)]
    pub(super) fn flags(&self, offset: u16) -> &core::sync::atomic::AtomicU16 {
        self.descriptors().u16(offset, 14)
    }

    #[inline(always)]
    fn is_available(&self) -> bool {
        is_available_at(self.descriptors(), self.avail)
    }
}

/// Whether the descriptor is as the driver made it available, with its wrap counter as in the position: it has not been
/// given back in that lap, nor made available in the next.
#[inline(always)]
pub(super) fn is_available_at(ring: Descriptors<'_>, Position { offset, wrap }: Position) -> bool {
    let flags = ring.u16(offset, 14).load(Ordering::Acquire);
    (flags & AVAIL != 0) == wrap && (flags & USED != 0) != wrap
}

/// The way along a chain: from one descriptor to the next.
struct PackedWalk<'a> {
    ring: Descriptors<'a>,
    size: u16,
    /// Where it begins, and then where it has ended.
    avail: &'a mut Position,
    /// Descriptors that can be available, not 0; then less the chain's.
    free: &'a mut u16,
}

impl Walk for PackedWalk<'_> {
    #[inline(always)]
    fn walk(self, chain: &mut ChainBuilder<'_>) -> Result<(), RingError> {
        let Self { ring, size, .. } = self;
        let limit = u32::from(*self.free).min(DESCRIPTORS_PER_CHAIN_MAX);
        let mut at = *self.avail;
        for before in 0..limit {
            let descriptor = Descriptor::load(ring, at.offset);
            let flags = descriptor.fourth;
            chain.push(descriptor, flags, true, before)?;
            at.advance(1, size);
            if flags & NEXT == 0 {
                // The last descriptor carries the buffer id (section 2.8.6).
                chain.slot.id = descriptor.third;
                chain.slot.descriptors = before as u16 + 1;
                *self.free -= before as u16 + 1;
                *self.avail = at;
                return Ok(());
            }
        }
        Err(RingError::ChainTooLong { head: self.avail.offset, limit })
    }
}

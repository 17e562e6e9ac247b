//! What the front end has said about one ring.

use std::sync::{Arc, Mutex, PoisonError};

use virtio::features::{EVENT_IDX, IN_ORDER, INDIRECT_DESC, RING_PACKED};
use virtio::{Call, GuestAddr, Kick, Memory, RingConfig, RingError, RingFormat, RingState};

use crate::memory_table::MemoryTable;
use crate::request::RingAddresses;

/// Where the ring stands while its queue does not run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Position {
    /// Nobody has said: at its beginning.
    #[default]
    Unknown,
    /// As SET_VRING_BASE said. What it means depends on the ring format.
    Base(u32),
    /// Where our queue left it.
    Left(RingState),
}

/// Where to announce completions.
#[derive(Default)]
pub(crate) enum CallTo {
    /// The front end has not said.
    #[default]
    Unset,
    /// Nowhere: it polls.
    Nobody,
    /// To a descriptor of its.
    Fd(Arc<dyn Call>),
}

/// Where to announce that the ring is broken. An I/O thread reads it when that happens, so it is shared.
pub(crate) type ErrorSignal = Arc<Mutex<Option<Arc<dyn Call>>>>;

/// Announces that the ring is broken.
pub(crate) fn signal(error: &ErrorSignal) -> bool {
    error.lock().unwrap_or_else(PoisonError::into_inner).as_ref().is_some_and(|call| call.call())
}

/// The protocol's state of one ring: everything but the queue itself.
#[derive(Default)]
pub(crate) struct Vring {
    pub(crate) size: Option<u16>,
    pub(crate) addresses: Option<RingAddresses>,
    pub(crate) position: Position,
    /// Set by SET_VRING_KICK or the first VRING_KICK: the ring is started. Cleared by GET_VRING_BASE.
    pub(crate) kick: Option<Kick>,
    pub(crate) call: CallTo,
    pub(crate) error: ErrorSignal,
    /// As SET_VRING_ENABLE said. Independent of being started.
    pub(crate) enabled: bool,
}

/// Where a ring is and what it needs to be opened.
pub(crate) struct Place {
    pub(crate) config: RingConfig,
    pub(crate) state: Option<RingState>,
    /// Where writes to the used ring are logged.
    pub(crate) used_log: Option<GuestAddr>,
}

/// Why a ring cannot be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlaceError {
    /// An address in no region. Another memory table may have it.
    #[error("its user address {0:#x} is in no memory region")]
    NotMapped(u64),
    #[error("SET_VRING_BASE {base:#x}: a split ring has 16 bits")]
    Base { base: u32 },
    #[error(transparent)]
    Ring(#[from] RingError),
}

impl Vring {
    /// Whether the front end wants the ring served and has said all about it.
    pub(crate) fn is_ready(&self) -> bool {
        self.kick.is_some() && self.enabled && self.size.is_some() && self.addresses.is_some()
    }

    /// Where the ring is; None if the front end has not said.
    pub(crate) fn place(&self, features: u64, table: &MemoryTable) -> Result<Option<Place>, PlaceError> {
        let (Some(size), Some(addresses)) = (self.size, self.addresses) else { return Ok(None) };
        let guest = |user| table.guest_addr(user).ok_or(PlaceError::NotMapped(user));
        let has = |bit| features & bit != 0;
        let config = RingConfig {
            format: if has(RING_PACKED) { RingFormat::Packed } else { RingFormat::Split },
            size,
            desc: guest(addresses.desc)?,
            driver: guest(addresses.driver)?,
            device: guest(addresses.device)?,
            event_idx: has(EVENT_IDX),
            indirect: has(INDIRECT_DESC),
            in_order: has(IN_ORDER),
        };
        let state = match self.position {
            Position::Unknown => None,
            Position::Left(state) => Some(state),
            Position::Base(base) => Some(state_at(base, &config, table.memory())?),
        };
        Ok(Some(Place { config, state, used_log: addresses.log.map(GuestAddr) }))
    }

    /// The answer to GET_VRING_BASE.
    pub(crate) fn base(&self, format: RingFormat) -> u32 {
        match (self.position, format) {
            (Position::Base(base), _) => base,
            (Position::Unknown, RingFormat::Packed) => encode_packed(RingState::NEW),
            (Position::Unknown, RingFormat::Split) => 0,
            (Position::Left(state), RingFormat::Packed) => encode_packed(state),
            (Position::Left(state), RingFormat::Split) => state.avail.into(),
        }
    }
}

/// Bits 0 to 14: next available descriptor, 15: the driver's wrap counter, 16 to 30: next used descriptor, 31: the
/// device's wrap counter.
fn encode_packed(state: RingState) -> u32 {
    u32::from(state.avail)
        | u32::from(state.avail_wrap) << 15
        | u32::from(state.used) << 16
        | u32::from(state.used_wrap) << 31
}

fn decode_packed(base: u32) -> RingState {
    RingState {
        avail: (base & 0x7fff) as u16,
        avail_wrap: base & 1 << 15 != 0,
        used: (base >> 16 & 0x7fff) as u16,
        used_wrap: base & 1 << 31 != 0,
    }
}

/// What SET_VRING_BASE means.
fn state_at(base: u32, config: &RingConfig, memory: &Memory) -> Result<RingState, PlaceError> {
    use std::sync::atomic::Ordering::Acquire;
    match config.format {
        RingFormat::Split => {
            // The message has the available index only; the used one is in the ring.
            let avail = u16::try_from(base).map_err(|_| PlaceError::Base { base })?;
            let used = memory.area(config.device, 4, 4).map_err(RingError::from)?;
            Ok(RingState { avail, used: used.u16(2).load(Acquire), ..RingState::NEW })
        }
        // Front ends that know nothing of wrap counters say 0 for a new ring (User-Mode Linux does).
        RingFormat::Packed if base == 0 && is_unused(config, memory)? => Ok(RingState::NEW),
        RingFormat::Packed => Ok(decode_packed(base)),
    }
}

/// Whether no device has ever used a descriptor of this packed ring.
///
/// Tells apart the two rings whose base can be 0. A new one has both wrap counters at 1: in its descriptors the bit
/// USED (15) is clear, whether they are zeros or the driver has made them available (virtio 1.2, section 2.8.1). The
/// other has both counters at 0 after one lap, or any odd number of them: in the last lap, with the counters at 1, a
/// device marked at least one descriptor as used, which sets its bit USED; and the driver, making it available once
/// more with its counter at 0, leaves the bit set.
fn is_unused(config: &RingConfig, memory: &Memory) -> Result<bool, PlaceError> {
    use std::sync::atomic::Ordering::Acquire;
    const DESC_BYTES: usize = 16;
    const USED: u16 = 1 << 15;
    let size = usize::from(config.size);
    let ring = memory.area(config.desc, size * DESC_BYTES, DESC_BYTES).map_err(RingError::from)?;
    Ok((0..size).all(|i| ring.u16(i * DESC_BYTES + 14).load(Acquire) & USED == 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_base_has_all_four_parts() {
        let state = RingState { avail: 0x1234, avail_wrap: false, used: 0x0567, used_wrap: true };
        assert_eq!(encode_packed(state), 0x8567_1234);
        assert_eq!(decode_packed(0x8567_1234), state);
        assert_eq!(encode_packed(RingState::NEW), 0x8000_8000);
        let other = RingState { avail: 0x7fff, avail_wrap: true, used: 0x7fff, used_wrap: false };
        assert_eq!(decode_packed(encode_packed(other)), other);
    }
}

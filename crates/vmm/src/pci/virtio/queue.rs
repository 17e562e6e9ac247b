//! What the driver has written about one queue.

use virtio::features::{EVENT_IDX, IN_ORDER, INDIRECT_DESC, RING_PACKED};
use virtio::ring::RING_SIZE_MAX;
use virtio::{GuestAddr, RingConfig, RingFormat, RingState};

/// No vector (virtio 1.2, section 4.1.5.1.2).
pub(crate) const NO_VECTOR: u16 = 0xffff;

/// The registers of one queue.
#[derive(Clone, Debug)]
pub(crate) struct QueueRegisters {
    /// Descriptors in the ring.
    pub(crate) size: u16,
    /// The largest the device allows.
    size_max: u16,
    /// Entry of the MSI-X table.
    pub(crate) vector: u16,
    /// The driver has set the queue up. It cannot be changed then.
    pub(crate) enabled: bool,
    pub(crate) desc: u64,
    pub(crate) driver: u64,
    pub(crate) device: u64,
    /// Where the ring stands while the machine is paused.
    pub(crate) position: RingState,
}

impl QueueRegisters {
    /// As they are after a reset.
    pub(crate) fn new(size_max: u16) -> Self {
        let size_max = size_max.min(RING_SIZE_MAX);
        // Until the ring format is known only powers of two may be shown.
        let size = size_max.checked_ilog2().map_or(0, |log| 1 << log);
        Self {
            size,
            size_max,
            vector: NO_VECTOR,
            enabled: false,
            desc: 0,
            driver: 0,
            device: 0,
            position: RingState::NEW,
        }
    }

    pub(crate) fn reset(&mut self) {
        *self = Self::new(self.size_max);
    }

    /// A size that cannot be is not taken.
    pub(crate) fn set_size(&mut self, size: u16, features: u64) {
        let shape = size.is_power_of_two() || features & RING_PACKED != 0 && size > 0;
        if shape && size <= self.size_max {
            self.size = size;
        }
    }

    /// The ring that they describe.
    pub(crate) fn ring(&self, features: u64) -> RingConfig {
        let has = |bit| features & bit != 0;
        RingConfig {
            format: if has(RING_PACKED) { RingFormat::Packed } else { RingFormat::Split },
            size: self.size,
            desc: GuestAddr(self.desc),
            driver: GuestAddr(self.driver),
            device: GuestAddr(self.device),
            event_idx: has(EVENT_IDX),
            indirect: has(INDIRECT_DESC),
            in_order: has(IN_ORDER),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_the_ring_can_have() {
        let mut queue = QueueRegisters::new(300);
        assert_eq!(queue.size, 256);
        for (size, features, result) in [
            (128, 0, 128),
            (100, 0, 128),
            (0, 0, 128),
            (512, 0, 128),
            (300, RING_PACKED, 300),
            (301, RING_PACKED, 300),
            (0, RING_PACKED, 300),
        ] {
            queue.set_size(size, features);
            assert_eq!(queue.size, result, "{size} with {features:#x}");
        }
        queue.reset();
        assert_eq!(queue.size, 256);
        assert_eq!(QueueRegisters::new(u16::MAX).size, 32768);
        assert_eq!(QueueRegisters::new(0).size, 0);
    }
}

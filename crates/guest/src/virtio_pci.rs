//! The PCI transport of virtio devices, driver side (virtio 1.2, sections 3.1 and 4.1). Modern devices only.

use alloc::vec::Vec;

use virtio::features::VERSION_1;
use virtio::memory::MemoryError;
use virtio::ring::DriverRing;
use virtio::{Memory, RingConfig, RingError, RingFormat};

use crate::machine::clock::Clock;
use crate::machine::heap;
use crate::machine::mmio::Window;
use crate::machine::patience::{DEVICE_SECONDS, Patience};
use crate::msix::{self, Msix};
use crate::pci::{self, ConfigSpace, Function, PciError};

const VENDOR: u16 = 0x1AF4;
/// A modern device has this id plus its type.
const DEVICE_MODERN: u16 = 0x1040;
/// One that also has the legacy interface has this id plus its type, less one, for the oldest types.
const DEVICE_TRANSITIONAL: u16 = 0x0FFF;

const CAPABILITY_VENDOR: u8 = 0x09;
const KIND_COMMON: u8 = 1;
const KIND_NOTIFY: u8 = 2;
const KIND_DEVICE: u8 = 4;

/// Offsets in the common configuration.
mod common {
    pub(super) const DEVICE_FEATURE_SELECT: usize = 0;
    pub(super) const DEVICE_FEATURE: usize = 4;
    pub(super) const DRIVER_FEATURE_SELECT: usize = 8;
    pub(super) const DRIVER_FEATURE: usize = 12;
    pub(super) const MSIX_CONFIG: usize = 16;
    pub(super) const STATUS: usize = 20;
    pub(super) const QUEUE_SELECT: usize = 22;
    pub(super) const QUEUE_SIZE: usize = 24;
    pub(super) const QUEUE_MSIX_VECTOR: usize = 26;
    pub(super) const QUEUE_ENABLE: usize = 28;
    pub(super) const QUEUE_NOTIFY_OFF: usize = 30;
    pub(super) const QUEUE_DESC: usize = 32;
    pub(super) const QUEUE_DRIVER: usize = 40;
    pub(super) const QUEUE_DEVICE: usize = 48;
}

const STATUS_ACKNOWLEDGE: u8 = 1;
const STATUS_DRIVER: u8 = 2;
const STATUS_DRIVER_OK: u8 = 4;
const STATUS_FEATURES_OK: u8 = 8;
const NO_VECTOR: u16 = 0xFFFF;

/// Why a device cannot be driven.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are the values named in each message")]
pub enum TransportError {
    /// It is no modern virtio device.
    #[error("the device has no virtio capability of type {0}")]
    Capability(u8),
    /// Its registers cannot be reached.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// It does not come out of reset.
    #[error("the device did not finish its reset within {DEVICE_SECONDS} s")]
    Reset,
    /// It does not do what is needed.
    #[error("the device offers features {offered:#x}, of which {missing:#x} are missing")]
    Features { offered: u64, missing: u64 },
    /// It offered what it refuses.
    #[error("the device refuses features {0:#x} that it offered")]
    Refused(u64),
    /// There is no such queue.
    #[error("the device has no queue {0}")]
    NoQueue(u16),
    /// The device does not take the interrupt.
    #[error("the device has no interrupt for queue {0}")]
    NoInterrupt(u16),
    /// The ring cannot be made.
    #[error("queue {queue}: {source}")]
    Ring { queue: u16, source: RingError },
    /// Not mapped.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// All virtio devices of a type (virtio 1.2, section 5), in the order of the bus.
#[must_use]
pub fn find(kind: u16) -> Vec<Function> {
    let is = |vendor, device| {
        vendor == VENDOR && (device == DEVICE_MODERN + kind || device == DEVICE_TRANSITIONAL + kind)
    };
    pci::scan().into_iter().filter(|&(_, vendor, device)| is(vendor, device)).map(|(f, ..)| f).collect()
}

/// A device's registers.
pub struct Transport {
    function: Function,
    common: Window,
    notify: Window,
    notify_multiplier: u32,
    /// The configuration space of the device type.
    pub device: Option<Window>,
    msix: Option<Msix>,
    clock: Clock,
}

/// What the two sides agree on about rings.
#[derive(Clone, Copy, Debug)]
pub struct RingFeatures {
    /// The layout.
    pub format: RingFormat,
    /// Notifications by index.
    pub event_idx: bool,
    /// Indirect descriptor tables.
    pub indirect: bool,
}

/// A queue that runs.
pub struct Queue {
    /// The driver end.
    pub ring: DriverRing,
    /// How many descriptors it has.
    pub size: u16,
    /// Its number.
    pub index: u16,
    doorbell: Window,
}

impl Queue {
    /// Tells the device that something was made available.
    #[inline(always)]
    pub fn kick(&self) {
        self.doorbell.write16(0, self.index);
    }
}

impl Transport {
    /// Finds the registers and resets the device.
    ///
    /// # Errors
    /// See [`TransportError`].
    pub fn new(function: Function, clock: Clock) -> Result<Self, TransportError> {
        let capabilities = pci::capabilities(&function);
        let at = |id| capabilities.iter().filter(move |&&(found, _)| found == id).map(|&(_, at)| at);
        let structure = |kind| {
            let at = at(CAPABILITY_VENDOR).find(|&at| function.byte(at + 3) == kind);
            at.ok_or(TransportError::Capability(kind))
        };
        let window = |at: u8| {
            pci::window(&function, function.byte(at + 4), function.read(at + 8), function.read(at + 12))
        };
        let notify = structure(KIND_NOTIFY)?;
        let transport = Self {
            common: window(structure(KIND_COMMON)?)?,
            notify: window(notify)?,
            notify_multiplier: function.read(notify + 16),
            device: structure(KIND_DEVICE).ok().map(window).transpose()?,
            msix: at(msix::CAPABILITY).next().map(|at| Msix::new(&function, at)).transpose()?,
            function,
            clock,
        };
        pci::turn_on(&transport.function);
        transport.reset()?;
        Ok(transport)
    }

    /// Stops the device; nothing it was given is used after that.
    ///
    /// # Errors
    /// It does not react.
    pub fn reset(&self) -> Result<(), TransportError> {
        self.common.write8(common::STATUS, 0);
        let is_reset = || self.common.read8(common::STATUS) == 0;
        if Patience::with_device(self.clock).spin_until(is_reset) {
            Ok(())
        } else {
            Err(TransportError::Reset)
        }
    }

    /// The features the device offers.
    #[must_use]
    pub fn offered(&self) -> u64 {
        let half = |select| {
            self.common.write32(common::DEVICE_FEATURE_SELECT, select);
            u64::from(self.common.read32(common::DEVICE_FEATURE))
        };
        half(0) | half(1) << 32
    }

    /// Agrees on features: all that are `needed`, and nothing else.
    ///
    /// # Errors
    /// The device does not offer them, or takes back what it offers.
    pub fn negotiate(&self, needed: u64) -> Result<(), TransportError> {
        let needed = needed | VERSION_1;
        let offered = self.offered();
        if needed & !offered != 0 {
            return Err(TransportError::Features { offered, missing: needed & !offered });
        }
        self.common.write8(common::STATUS, STATUS_ACKNOWLEDGE);
        self.common.write8(common::STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER);
        for (select, half) in [(0, needed as u32), (1, (needed >> 32) as u32)] {
            self.common.write32(common::DRIVER_FEATURE_SELECT, select);
            self.common.write32(common::DRIVER_FEATURE, half);
        }
        let agreed = STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK;
        self.common.write8(common::STATUS, agreed);
        if self.common.read8(common::STATUS) & STATUS_FEATURES_OK == 0 {
            return Err(TransportError::Refused(needed));
        }
        if self.msix.is_some() {
            self.common.write16(common::MSIX_CONFIG, NO_VECTOR);
        }
        Ok(())
    }

    /// Sets up queue `index` with at most `size_max` descriptors, between [`Transport::negotiate`] and
    /// [`Transport::start`]. `interrupt` is the message that the device is to send, an address and a value.
    ///
    /// # Errors
    /// See [`TransportError`].
    pub fn queue(
        &self,
        memory: &Memory,
        index: u16,
        size_max: u16,
        features: RingFeatures,
        interrupt: Option<(u64, u32)>,
    ) -> Result<Queue, TransportError> {
        self.common.write16(common::QUEUE_SELECT, index);
        let offered = self.common.read16(common::QUEUE_SIZE);
        if offered == 0 {
            return Err(TransportError::NoQueue(index));
        }
        let size = offered.min(size_max);
        self.common.write16(common::QUEUE_SIZE, size);

        let RingFeatures { format, event_idx, indirect } = features;
        let [desc, driver, device] =
            DriverRing::layout(format, size).map(|bytes| heap::take(bytes, RING_ALIGN));
        let config = RingConfig { format, size, desc, driver, device, event_idx, indirect, in_order: false };
        let mut ring = DriverRing::new(&config, memory)
            .map_err(|source| TransportError::Ring { queue: index, source })?;
        ring.disarm_calls();
        self.common.write64(common::QUEUE_DESC, desc.0);
        self.common.write64(common::QUEUE_DRIVER, driver.0);
        self.common.write64(common::QUEUE_DEVICE, device.0);
        self.set_interrupt(index, interrupt)?;

        let offset = self.common.read16(common::QUEUE_NOTIFY_OFF);
        let offset = u64::from(offset) * u64::from(self.notify_multiplier);
        let doorbell = self.notify.part(usize::try_from(offset).unwrap_or(usize::MAX), 4);
        if doorbell.bytes() < 2 {
            return Err(TransportError::NoQueue(index));
        }
        self.common.write16(common::QUEUE_ENABLE, 1);
        Ok(Queue { ring, size, doorbell, index })
    }

    fn set_interrupt(&self, queue: u16, message: Option<(u64, u32)>) -> Result<(), TransportError> {
        let Some(msix) = &self.msix else {
            return if message.is_none() { Ok(()) } else { Err(TransportError::NoInterrupt(queue)) };
        };
        // The vector after the last queue's would be the configuration's, which is not used.
        let vector = match message {
            Some((address, value)) if queue < msix.entries() => {
                msix.set(queue, address, value);
                queue
            }
            Some(_) => return Err(TransportError::NoInterrupt(queue)),
            None => NO_VECTOR,
        };
        self.common.write16(common::QUEUE_MSIX_VECTOR, vector);
        if self.common.read16(common::QUEUE_MSIX_VECTOR) != vector {
            return Err(TransportError::NoInterrupt(queue));
        }
        Ok(())
    }

    /// Lets the device begin.
    pub fn start(&self) {
        if let Some(msix) = &self.msix {
            msix.turn_on(&self.function);
        }
        let status = self.common.read8(common::STATUS);
        self.common.write8(common::STATUS, status | STATUS_DRIVER_OK);
    }
}

/// What suits every part of either format.
const RING_ALIGN: usize = 4096;

//! Where everything is: BARs, what is at which offset in them, and the capabilities that say so (virtio 1.2,
//! section 4.1.4).
//!
//! Three BARs, because three things are mapped in three ways. Registers always come to the monitor. Notification pages
//! may be ioeventfds or memory, one for each queue. Shared memory is memory.

use std::os::fd::AsFd;

use virtio::{Device, SharedMemory};

use super::AttachError;
use crate::pci::config_space::{Bar, ConfigSpace, Identity};
use crate::pci::msix::{Msix, VECTORS_MAX};

/// The BAR with registers.
pub(crate) const REGISTERS_BAR: usize = 0;
/// The BAR with a page for each queue.
pub(crate) const NOTIFY_BAR: usize = 1;
/// The BAR with the device's shared memory.
pub(crate) const SHARED_BAR: usize = 4;

/// Common configuration.
pub(crate) const COMMON: u64 = 0x0000;
/// ISR status.
pub(crate) const ISR: u64 = 0x1000;
/// Device configuration.
pub(crate) const DEVICE: u64 = 0x2000;
/// MSI-X pending bits.
pub(crate) const PENDING: u64 = 0x3000;
/// MSI-X table.
pub(crate) const TABLE: u64 = 0x4000;

/// Length of the common configuration: up to and with `queue_reset`, rounded up.
pub(crate) const COMMON_BYTES: u32 = 0x40;
const ISR_BYTES: u32 = 4;
/// The longest device configuration.
const DEVICE_BYTES_MAX: usize = (PENDING - DEVICE) as usize;
const TABLE_ENTRY_BYTES: u64 = 16;
/// Each queue has a notification page of its own (`notify_off_multiplier`).
pub(crate) const NOTIFY_BYTES: u64 = 4096;
/// The most queues a device may have: each has a vector, and configuration changes have one.
pub(crate) const QUEUES_MAX: u16 = VECTORS_MAX - 1;
const SHARED_PAGE_BYTES: u64 = 4096;

/// Vendor and base of the device IDs (section 4.1.2).
const VENDOR: u16 = 0x1af4;
const DEVICE_ID_BASE: u16 = 0x1040;
const DEVICE_TYPE_MAX: u32 = 0x3f;
/// 1.x only (section 4.1.2.1).
const REVISION: u8 = 1;
const SUBSYSTEM: u16 = 0x1100;
/// Class codes by device type, where firmware and installers go by them; the same as in other monitors.
const CLASSES: [(u32, u32); 2] = [
    (1, 0x02_00_00), // network: Ethernet controller
    (2, 0x01_00_00), // block: mass storage, SCSI
];
/// "Other system peripheral", for all other types.
const CLASS_OTHER: u32 = 0x08_80_00;

const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;
const TYPE_COMMON: u8 = 1;
const TYPE_NOTIFY: u8 = 2;
const TYPE_ISR: u8 = 3;
const TYPE_DEVICE: u8 = 4;
const TYPE_CONFIG_ACCESS: u8 = 5;
const TYPE_SHARED_MEMORY: u8 = 8;

/// A function's configuration space, and where in it the parts are that do something.
pub(crate) struct Layout {
    pub(crate) space: ConfigSpace,
    /// The MSI-X capability.
    pub(crate) msix: u16,
    /// The configuration access capability.
    pub(crate) window: u16,
    /// What is in the shared memory BAR, at which offset.
    pub(crate) shared: Vec<(u64, SharedMemory)>,
}

/// What a virtio capability says of a structure.
struct Structure {
    cfg_type: u8,
    bar: usize,
    id: u8,
    offset: u32,
    length: u32,
}

impl Structure {
    /// The capability after its two bytes of header; `more` follows the fields that all have.
    fn body(&self, more: &[u8]) -> Vec<u8> {
        let header = [16 + more.len() as u8, self.cfg_type, self.bar as u8, self.id, 0, 0];
        [&header[..], &self.offset.to_le_bytes(), &self.length.to_le_bytes(), more].concat()
    }
}

fn class(device_type: u32) -> u32 {
    CLASSES.iter().find(|(of, _)| *of == device_type).map_or(CLASS_OTHER, |(_, class)| *class)
}

impl Layout {
    /// Lays out a device.
    pub(crate) fn new(device: &dyn Device, msix: &Msix) -> Result<Self, AttachError> {
        let device_type = device.device_id();
        if device_type > DEVICE_TYPE_MAX {
            return Err(AttachError::DeviceType(device_type));
        }
        let config_bytes = device.config().len();
        if config_bytes > DEVICE_BYTES_MAX {
            return Err(AttachError::ConfigTooLong(config_bytes));
        }
        let queues = u64::from(device.queues());
        let mut space = ConfigSpace::new(&Identity {
            vendor: VENDOR,
            device: DEVICE_ID_BASE + device_type as u16,
            revision: REVISION,
            class: class(device_type),
            subsystem_vendor: VENDOR,
            subsystem: SUBSYSTEM,
        });
        let registers_bytes = (TABLE + (queues + 1) * TABLE_ENTRY_BYTES).next_power_of_two();
        let notify_bytes = (queues.max(1) * NOTIFY_BYTES).next_power_of_two();
        for (index, size) in [(REGISTERS_BAR, registers_bytes), (NOTIFY_BAR, notify_bytes)] {
            space.add_bar(Bar { index, size, is_64_bit: false, prefetchable: false })?;
        }
        let body = msix.capability(REGISTERS_BAR as u8, TABLE as u32, PENDING as u32);
        let msix = space.add_capability(CAPABILITY_MSIX, &body, &Msix::WRITABLE)?;

        let register = |cfg_type, offset: u64, length| {
            Structure { cfg_type, bar: REGISTERS_BAR, id: 0, offset: offset as u32, length }.body(&[])
        };
        let notify = Structure {
            cfg_type: TYPE_NOTIFY,
            bar: NOTIFY_BAR,
            id: 0,
            offset: 0,
            length: (queues.max(1) * NOTIFY_BYTES) as u32,
        };
        space.add_capability(CAPABILITY_VENDOR, &register(TYPE_COMMON, COMMON, COMMON_BYTES), &[])?;
        space.add_capability(CAPABILITY_VENDOR, &notify.body(&(NOTIFY_BYTES as u32).to_le_bytes()), &[])?;
        space.add_capability(CAPABILITY_VENDOR, &register(TYPE_ISR, ISR, ISR_BYTES), &[])?;
        if config_bytes > 0 {
            let length = config_bytes.next_multiple_of(4) as u32;
            space.add_capability(CAPABILITY_VENDOR, &register(TYPE_DEVICE, DEVICE, length), &[])?;
        }
        let access = Structure { cfg_type: TYPE_CONFIG_ACCESS, bar: 0, id: 0, offset: 0, length: 0 };
        // BAR, offset, length and data are the driver's.
        let writable = [0, 0, 0xff, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255];
        let window = space.add_capability(CAPABILITY_VENDOR, &access.body(&[0; 4]), &writable)?;
        let shared = add_shared_memory(&mut space, device.shared_memory())?;
        Ok(Self { space, msix, window, shared })
    }
}

/// Lays shared memory out in a BAR of its own, one region after the other.
fn add_shared_memory(
    space: &mut ConfigSpace,
    regions: Vec<SharedMemory>,
) -> Result<Vec<(u64, SharedMemory)>, AttachError> {
    let mut placed = Vec::new();
    let mut end = 0u64;
    for region in regions {
        let SharedMemory { id, len, .. } = region;
        let refused = AttachError::SharedMemory { id, len };
        let file_bytes = rustix::fs::fstat(region.file.as_fd()).map_or(0, |stat| stat.st_size as u64);
        let next = end.checked_add(len).filter(|&next| next <= 1 << 62);
        let (Some(next), true) = (next, len > 0 && len % SHARED_PAGE_BYTES == 0 && len <= file_bytes) else {
            return Err(refused);
        };
        let structure = Structure {
            cfg_type: TYPE_SHARED_MEMORY,
            bar: SHARED_BAR,
            id,
            offset: end as u32,
            length: len as u32,
        };
        let high = [((end >> 32) as u32).to_le_bytes(), ((len >> 32) as u32).to_le_bytes()].concat();
        space.add_capability(CAPABILITY_VENDOR, &structure.body(&high), &[])?;
        placed.push((end, region));
        end = next;
    }
    if end > 0 {
        let size = end.next_power_of_two();
        space.add_bar(Bar { index: SHARED_BAR, size, is_64_bit: true, prefetchable: true })?;
    }
    Ok(placed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_and_networks_are_what_firmware_looks_for() {
        assert_eq!((class(2), class(1)), (0x01_00_00, 0x02_00_00));
        assert_eq!(class(4), CLASS_OTHER);
    }
}

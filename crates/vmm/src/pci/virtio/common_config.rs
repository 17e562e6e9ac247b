//! The common configuration structure (virtio 1.2, section 4.1.4.3): which register is at which offset.
//!
//! Reads have no side effects, so any read is a piece of a picture of all registers. A write takes effect if it is what
//! drivers are told to do: exactly one register, or half of one of 64 bits. Other writes are not taken.

use super::control::Control;
use super::layout::COMMON_BYTES;
use super::queue::NO_VECTOR;
use crate::pci::config_space::read_at;

const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_VECTOR: u64 = 0x10;
const NUM_QUEUES: u64 = 0x12;
const DEVICE_STATUS: u64 = 0x14;
const CONFIG_GENERATION: u64 = 0x15;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY_OFF: u64 = 0x1e;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;
const QUEUE_RESET: u64 = 0x3a;

/// Registers that say what others mean.
#[derive(Debug, Default)]
struct Selectors {
    device_features: u32,
    driver_features: u32,
    queue: u16,
}

/// The common configuration of one device.
pub(crate) struct CommonConfig {
    pub(crate) control: Control,
    selectors: Selectors,
}

impl CommonConfig {
    pub(crate) fn new(control: Control) -> Self {
        Self { control, selectors: Selectors::default() }
    }

    /// Reads; `generation` is the device configuration's.
    pub(crate) fn read(&self, generation: u8, offset: u64, data: &mut [u8]) {
        let mut picture = Picture([0; COMMON_BYTES as usize]);
        let (control, selectors) = (&self.control, &self.selectors);
        picture.put(DEVICE_FEATURE_SELECT, &selectors.device_features.to_le_bytes());
        picture.put(DEVICE_FEATURE, &half(control.offered(), selectors.device_features).to_le_bytes());
        picture.put(DRIVER_FEATURE_SELECT, &selectors.driver_features.to_le_bytes());
        picture.put(DRIVER_FEATURE, &half(control.features(), selectors.driver_features).to_le_bytes());
        picture.put(CONFIG_VECTOR, &control.config_vector().to_le_bytes());
        picture.put(NUM_QUEUES, &control.queues().to_le_bytes());
        picture.put(DEVICE_STATUS, &[control.status()]);
        picture.put(CONFIG_GENERATION, &[generation]);
        picture.put(QUEUE_SELECT, &selectors.queue.to_le_bytes());
        picture.put(QUEUE_VECTOR, &NO_VECTOR.to_le_bytes());
        if let Some(queue) = control.queue(selectors.queue) {
            picture.put(QUEUE_SIZE, &queue.size.to_le_bytes());
            picture.put(QUEUE_VECTOR, &queue.vector.to_le_bytes());
            picture.put(QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
            picture.put(QUEUE_NOTIFY_OFF, &selectors.queue.to_le_bytes());
            picture.put(QUEUE_DESC, &queue.desc.to_le_bytes());
            picture.put(QUEUE_DRIVER, &queue.driver.to_le_bytes());
            picture.put(QUEUE_DEVICE, &queue.device.to_le_bytes());
        }
        read_at(&picture.0, offset, data);
    }

    /// Writes.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        let (control, selectors) = (&mut self.control, &mut self.selectors);
        let queue = selectors.queue;
        match (offset, data) {
            (DEVICE_STATUS, &[status]) => {
                control.set_status(status);
                if status == 0 {
                    *selectors = Selectors::default();
                }
            }
            (_, &[a, b]) => {
                let value = u16::from_le_bytes([a, b]);
                match offset {
                    CONFIG_VECTOR => control.set_config_vector(value),
                    QUEUE_SELECT => selectors.queue = value,
                    QUEUE_SIZE => control.change(queue, |queue, features| queue.set_size(value, features)),
                    QUEUE_VECTOR => control.set_queue_vector(queue, value),
                    QUEUE_ENABLE if value == 1 => control.enable(queue),
                    QUEUE_RESET if value == 1 => control.reset_queue(queue),
                    _ => {}
                }
            }
            (_, &[a, b, c, d]) => {
                let value = u32::from_le_bytes([a, b, c, d]);
                match offset {
                    DEVICE_FEATURE_SELECT => selectors.device_features = value,
                    DRIVER_FEATURE_SELECT => selectors.driver_features = value,
                    DRIVER_FEATURE => {
                        let features = with_half(control.features(), selectors.driver_features, value);
                        control.set_features(features);
                    }
                    _ => self.set_address(offset, value),
                }
            }
            (QUEUE_DESC | QUEUE_DRIVER | QUEUE_DEVICE, &[a, b, c, d, e, f, g, h]) => {
                self.set_address(offset, u32::from_le_bytes([a, b, c, d]));
                self.set_address(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
    }

    /// Half of an address of the selected queue.
    fn set_address(&mut self, offset: u64, value: u32) {
        self.control.change(self.selectors.queue, |queue, _| {
            let (address, which) = match offset & !7 {
                QUEUE_DESC => (&mut queue.desc, offset - QUEUE_DESC),
                QUEUE_DRIVER => (&mut queue.driver, offset - QUEUE_DRIVER),
                QUEUE_DEVICE => (&mut queue.device, offset - QUEUE_DEVICE),
                _ => return,
            };
            match which {
                0 => *address = with_half(*address, 0, value),
                4 => *address = with_half(*address, 1, value),
                _ => {}
            }
        });
    }
}

/// What all registers hold.
struct Picture([u8; COMMON_BYTES as usize]);

impl Picture {
    fn put(&mut self, offset: u64, bytes: &[u8]) {
        let offset = offset as usize;
        self.0[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
}

/// Bits 0 to 31 or 32 to 63; there are no others.
fn half(value: u64, which: u32) -> u32 {
    match which {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn with_half(value: u64, which: u32, half: u32) -> u64 {
    match which {
        0 => value & !0xffff_ffff | u64::from(half),
        1 => value & 0xffff_ffff | u64::from(half) << 32,
        _ => value,
    }
}

//! The device's own configuration space, and the counter by which a driver knows that it read all of it at one time
//! (virtio 1.2, sections 2.5.1 and 4.1.4.3.1).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio::Device;

use crate::pci::config_space::read_at;

#[derive(Default)]
struct Seen {
    /// What the driver may have read last.
    config: Vec<u8>,
    generation: u8,
}

/// The configuration as the driver reads it.
pub(crate) struct DeviceConfig {
    device: Arc<dyn Device>,
    seen: Mutex<Seen>,
}

impl DeviceConfig {
    pub(crate) fn new(device: Arc<dyn Device>) -> Self {
        let seen = Seen { config: device.config(), generation: 0 };
        Self { device, seen: Mutex::new(seen) }
    }

    /// Counts the times that a read found the configuration changed since the one before.
    pub(crate) fn generation(&self) -> u8 {
        self.seen().generation
    }

    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        let mut seen = self.seen();
        let config = self.device.config();
        if config != seen.config {
            *seen = Seen { config, generation: seen.generation.wrapping_add(1) };
        }
        read_at(&seen.config, offset, data);
    }

    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        let Ok(offset) = u32::try_from(offset) else { return };
        if let Err(error) = self.device.write_config(offset, data) {
            tracing::debug!(%error, "refused");
        }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

//! Host memory that a device shows its driver (virtio 1.2, sections 2.10 and 4.1.4.7).

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};

use reactor::LogLimit;
use virtio::{GuestAddr, SharedMemory};

use crate::pci::{Mappings, Registration};

/// The regions in the BAR for shared memory.
pub(crate) struct Shared {
    mappings: Arc<dyn Mappings>,
    /// By offset in the BAR.
    regions: Vec<(u64, SharedMemory)>,
    mapped: Mutex<Vec<Registration>>,
    /// A guest can move the BAR as often as it likes.
    failed: LogLimit,
}

impl Shared {
    pub(crate) fn new(regions: Vec<(u64, SharedMemory)>, mappings: Arc<dyn Mappings>) -> Self {
        Self { mappings, regions, mapped: Mutex::default(), failed: LogLimit::new() }
    }

    /// The BAR has moved.
    pub(crate) fn place(&self, at: Option<GuestAddr>) {
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        mapped.clear();
        let Some(bar) = at else { return };
        for (offset, region) in &self.regions {
            let addr = GuestAddr(bar.0 + offset);
            match self.mappings.map(addr, region.file.as_fd(), region.len) {
                Ok(registration) => mapped.push(registration),
                Err(error) if self.failed.admits() => {
                    tracing::warn!(id = region.id, %addr, %error, "shared memory not mapped");
                }
                Err(_) => {}
            }
        }
    }
}

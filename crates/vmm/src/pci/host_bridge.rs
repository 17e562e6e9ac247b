//! The bridge between CPU and bus, which is in slot 0 of every PC. It has an identity and nothing else.

use std::sync::{Mutex, PoisonError};

use ::virtio::GuestAddr;

use super::config_space::{ConfigSpace, Identity};
use super::function::{BarPlace, Function};

/// A PCI Express host bridge without quirks that any guest knows (pci.ids: Red Hat, "QEMU PCIe Host bridge").
const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: 0x06_00_00,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

pub(crate) struct HostBridge(Mutex<ConfigSpace>);

impl HostBridge {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(ConfigSpace::new(&IDENTITY)))
    }
}

impl Function for HostBridge {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
    }

    fn bars(&self) -> Vec<BarPlace> {
        Vec::new()
    }

    fn assign(&self, _bar: usize, _addr: GuestAddr) {}

    fn placed(&self, _bar: usize, _addr: Option<GuestAddr>) {}

    fn bar_read(&self, _bar: usize, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&self, _bar: usize, _offset: u64, _data: &[u8]) {}
}

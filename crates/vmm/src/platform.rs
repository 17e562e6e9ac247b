//! What PCI devices need of the machine, and the machine's way to its PCI bus.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use virtio::GuestAddr;
use virtio::memory::Mapping;

use crate::bus::{Bus, Handler};
use crate::doorbell::{Doorbell, DoorbellCounters, DoorbellMode, PageFaults};
use crate::kvm::Vm;
use crate::legacy;
use crate::pci::{self, Bell, Doorbells, Mappings, Registration};
use crate::power::{Outcome, Power};
use crate::{Error, layout};

/// The doorbells of one device.
pub(crate) struct DeviceDoorbells {
    vm: Arc<Vm>,
    mode: DoorbellMode,
    faults: PageFaults,
    /// By queue.
    made: Mutex<Vec<Arc<Doorbell>>>,
}

impl DeviceDoorbells {
    pub(crate) fn new(vm: Arc<Vm>, mode: DoorbellMode, faults: PageFaults) -> Self {
        Self { vm, mode, faults, made: Mutex::default() }
    }

    /// What they counted, by queue.
    pub(crate) fn counters(&self) -> Vec<DoorbellCounters> {
        let made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        made.iter().map(|doorbell| doorbell.counters()).collect()
    }
}

impl Doorbells for DeviceDoorbells {
    fn bell(&self, _queue: u16, kick: OwnedFd) -> io::Result<Arc<dyn Bell>> {
        let slot = self.vm.slot().map_err(io::Error::other)?;
        let doorbell =
            Arc::new(Doorbell::new(self.vm.fd.clone(), slot, self.mode, self.faults.clone(), kick)?);
        // They are made in the order of their queues, once.
        self.made.lock().unwrap_or_else(PoisonError::into_inner).push(doorbell.clone());
        Ok(doorbell)
    }
}

/// Shows devices' memory.
pub(crate) struct Shown(pub(crate) Arc<Vm>);

impl Mappings for Shown {
    fn map(&self, addr: GuestAddr, file: BorrowedFd<'_>, len: u64) -> io::Result<Registration> {
        let mapping = Mapping::new(file, 0, len).map_err(io::Error::other)?;
        let mut slot = self.0.slot().map_err(io::Error::other)?;
        slot.show(addr, Arc::new(mapping))?;
        Ok(Box::new(slot))
    }
}

/// PCI's configuration ports, and the reset register in their midst.
struct Ports {
    pci: Arc<pci::Bus>,
    power: Arc<Power>,
}

/// The widest access to a port, in bytes; longer ones are repeated.
const PORT_BYTES_MAX: usize = 4;

impl Handler for Ports {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let port = (layout::PCI_PORTS.start + offset) as u16;
        for data in data.chunks_mut(PORT_BYTES_MAX) {
            self.pci.port_read(port, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let port = (layout::PCI_PORTS.start + offset) as u16;
        if legacy::is_reset(port, data) {
            return self.power.end(Outcome::Reset);
        }
        for data in data.chunks(PORT_BYTES_MAX) {
            self.pci.port_write(port, data);
        }
    }
}

/// A range of addresses that belongs to PCI.
struct Window {
    pci: Arc<pci::Bus>,
    start: u64,
}

impl Handler for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.pci.mmio_read(self.start + offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.pci.mmio_write(self.start + offset, data);
    }
}

/// The addresses of PCI, as the rest of the machine leaves them free.
pub(crate) fn windows() -> pci::Windows {
    pci::Windows { ecam: layout::ECAM, mmio32: layout::PCI_WINDOW_32, mmio64: layout::PCI_WINDOW_64 }
}

/// Connects PCI to both buses.
pub(crate) fn connect(
    pci: &Arc<pci::Bus>,
    power: &Arc<Power>,
    ports: &mut Bus,
    mmio: &mut Bus,
) -> Result<(), Error> {
    let handler = Ports { pci: pci.clone(), power: power.clone() };
    ports.add("the configuration ports of PCI", layout::PCI_PORTS, Arc::new(handler))?;
    let windows = pci.windows();
    for (name, range) in [
        ("the configuration space of PCI", &windows.ecam),
        ("the 32-bit window of PCI", &windows.mmio32),
        ("the 64-bit window of PCI", &windows.mmio64),
    ] {
        let handler = Window { pci: pci.clone(), start: range.start };
        mmio.add(name, range.clone(), Arc::new(handler))?;
    }
    Ok(())
}

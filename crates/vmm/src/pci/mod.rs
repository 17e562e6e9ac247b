//! PCI as the guest sees it: configuration space, BARs, MSI-X, and virtio devices behind them.
//!
//! For the machine around it: a [`Bus`] is filled before the first vCPU runs ([`Bus::add`], [`Bus::assign`]) and then
//! shared by all of them. An exit at a port goes to [`Bus::port_read`] and [`Bus::port_write`], one at an address to
//! [`Bus::mmio_read`] and [`Bus::mmio_write`]; each says whether the access was PCI's. [`Bus::windows`] is what ACPI
//! tells the guest. What a device needs of the machine are three small traits, one value of each per device:
//!
//! * [`Interrupts`] makes a [`Vector`] for each entry of the MSI-X table. Masks and pending bits are kept here: a vector
//!   is only ever called while the guest wants it, and is never called while [`Vector::set`] runs.
//! * [`Doorbells`] lets a write to a queue's notification page signal a descriptor, as an ioeventfd does. A page that
//!   is not registered works all the same: its writes come here and signal the same descriptor.
//! * [`Mappings`] shows host memory to the guest, for devices that have some.
//!
//! Every access is checked here, whatever its offset and length; nothing a guest does to one device reaches another.
//! There is no lock that covers two devices, but for the one that moves BARs. A device's locks are held briefly, with
//! one exception: stopping queues, which a reset does, waits for what is in flight. Meanwhile the vCPU that asked for
//! it waits, and so does one that touches the common configuration of the same device; nobody else.

mod address;
mod bus;
mod config_space;
mod function;
mod host_bridge;
mod msix;
pub mod virtio;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use ::virtio::{Call, GuestAddr};

pub use self::virtio::VirtioPci;
pub use address::SLOTS_MAX;
pub use bus::{Bus, BusError, Windows};
pub use config_space::{Bar, ConfigSpace, Identity, LayoutError};
pub use function::{BarPlace, Function};
pub use msix::{Msix, MsixVector};

/// What a device writes where to interrupt a CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Msi {
    /// The address of the local APIC that is written to.
    pub address: u64,
    /// What is written there.
    pub data: u32,
}

/// One interrupt of a device.
pub trait Vector: Call {
    /// Where and what to write from the next [`Call::call`] on. The guest chose both: the message may be nonsense, which
    /// is then lost. May take its time; is not called concurrently with itself or with `call`.
    fn set(&self, msi: Msi);
}

/// Makes the interrupts of one device.
pub trait Interrupts: Send + Sync {
    /// The interrupt of one entry of its MSI-X table.
    ///
    /// # Errors
    /// The system has none left.
    fn vector(&self, index: u16) -> io::Result<Arc<dyn Vector>>;
}

/// Something done for as long as the value lives.
pub type Registration = Box<dyn Send>;

/// Lets guests reach the I/O threads of one device without coming through the monitor.
pub trait Doorbells: Send + Sync {
    /// From now on a write of any length to `addr`, the first of a page's that nothing else of the device is in,
    /// signals `kick`. The page belongs to `queue`, which runs or is about to. Dropping what is returned ends it, before
    /// the queue's page is registered elsewhere.
    ///
    /// # Errors
    /// It cannot be done. The kick works all the same, more slowly.
    fn register(&self, queue: u16, addr: GuestAddr, kick: BorrowedFd<'_>) -> io::Result<Registration>;
}

/// Shows host memory to the guest of one device.
pub trait Mappings: Send + Sync {
    /// Places the first `len` bytes of `file` at `addr`, which is a multiple of their size and not RAM. Dropping what is
    /// returned removes it.
    ///
    /// # Errors
    /// It cannot be done. The guest reads all ones there.
    fn map(&self, addr: GuestAddr, file: BorrowedFd<'_>, len: u64) -> io::Result<Registration>;
}

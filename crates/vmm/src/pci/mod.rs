//! PCI as the guest sees it: configuration space, BARs, MSI-X, and virtio devices behind them.
//!
//! For the machine around it: a [`Bus`] is filled before the first vCPU runs ([`Bus::add`], [`Bus::assign`]) and then
//! shared by all of them. An exit at a port goes to [`Bus::port_read`] and [`Bus::port_write`], one at an address to
//! [`Bus::mmio_read`] and [`Bus::mmio_write`]; each says whether the access was PCI's. [`Bus::windows`] is what ACPI
//! tells the guest. What a device needs of the machine are three small traits, one value of each per device:
//!
//! * [`Interrupts`] makes a [`Vector`] for each entry of the MSI-X table. Masks and pending bits are kept here: a vector
//!   is only ever called while the guest wants it, and is never called while [`Vector::set`] runs.
//! * [`Doorbells`] makes a [`Bell`] for each queue: a write to its notification page signals a descriptor, as an ioeventfd
//!   does. One that is nowhere works all the same: writes come here and signal the same descriptor.
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
use std::os::fd::{BorrowedFd, OwnedFd};
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

/// The doorbell of one queue: an eventfd, and a page somewhere in the guest's memory whose writes signal it.
pub trait Bell: ::virtio::Doorbell {
    /// From now on a write of any length to `addr`, the first of a page that nothing else is in, signals the descriptor.
    /// It is nowhere when this is called.
    ///
    /// # Errors
    /// It cannot be done. Kicks work all the same, more slowly.
    fn place(&self, addr: GuestAddr) -> io::Result<()>;

    /// Writes to the page are not its affair any more.
    fn remove(&self);
}

/// Makes the doorbells of one device.
pub trait Doorbells: Send + Sync {
    /// The doorbell of a queue, which is nowhere yet. Its descriptor is `kick`, an eventfd that does not block. It is placed
    /// before the queue starts and removed when the queue has stopped.
    ///
    /// # Errors
    /// The system has none left.
    fn bell(&self, queue: u16, kick: OwnedFd) -> io::Result<Arc<dyn Bell>>;
}

/// Something done for as long as the value lives.
pub type Registration = Box<dyn Send>;

/// Shows host memory to the guest of one device.
pub trait Mappings: Send + Sync {
    /// Places the first `len` bytes of `file` at `addr`, which is a multiple of their size and not RAM. Dropping what is
    /// returned removes it.
    ///
    /// # Errors
    /// It cannot be done. The guest reads all ones there.
    fn map(&self, addr: GuestAddr, file: BorrowedFd<'_>, len: u64) -> io::Result<Registration>;
}

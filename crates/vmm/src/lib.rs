//! A small monitor for KVM: virtual machines whose virtio devices, doorbells, interrupts and exits are all ours.
//!
//! It is a transport, like a vhost-user socket: it names no device, and attaches any [`virtio::Device`] to a guest by
//! PCI. What it adds is that the whole event path is in one process, so that in steady state nothing leaves the guest:
//! requests are found by polling ([`reactor`]), completions are seen by the guest or announced by one message
//! ([`pci::Interrupts`]), and a queue's notification page is plain memory while nobody listens ([`doorbell`]).
//!
//! ```no_run
//! # fn main() -> Result<(), vmm::Error> {
//! # let (pool, device): (std::sync::Arc<reactor::Pool>, std::sync::Arc<dyn virtio::Device>) = unimplemented!();
//! use vmm::{Config, Kernel, Machine, Outcome, PciDevice};
//!
//! let config = Config::new(Kernel::Path("vmlinuz".into()), Box::new(std::io::stdout()));
//! let devices = vec![PciDevice::new(device, "root", reactor::Mode::Hybrid)];
//! let machine = Machine::new(config, devices, pool)?;
//! // Blocks until the guest ends; `machine.stop()` from another thread ends it too.
//! let outcome = machine.run()?;
//! let snapshot = machine.measured().unwrap_or_else(|| machine.snapshot());
//! # Ok(()) }
//! ```
//!
//! The machine is a PC without firmware ([`layout`]): the kernel's interrupt controllers and timer, one serial port,
//! ACPI tables, PCI with virtio devices on it, and the ports that end it ([`Outcome`]). Kernels are ELF files with a
//! PVH note or Linux' bzImage.
//!
//! The rooms: [`Machine`] puts together and runs, [`vcpu`](Machine::run) threads execute the guest and give its exits
//! to a bus, [`pci`] and the small devices answer. Everything a guest writes is checked where it arrives; nothing it
//! writes ends the process.

#![warn(missing_docs)]

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("the monitor needs KVM on x86-64 Linux");

mod boot;
mod bus;
mod config;
pub mod doorbell;
mod error;
mod irq;
mod kvm;
pub mod layout;
mod legacy;
mod machine;
mod memory;
pub mod pci;
mod platform;
mod pm1;
mod power;
mod raw;
mod serial;
mod slots;
pub mod stats;
mod vcpu;

pub use boot::Kernel;
pub use config::{Config, PciDevice, VCPUS_MAX};
pub use doorbell::DoorbellMode;
pub use error::Error;
pub use kvm::{KVM_PATH, check};
pub use machine::Machine;
pub use power::Outcome;
pub use serial::Sink;
pub use stats::Snapshot;

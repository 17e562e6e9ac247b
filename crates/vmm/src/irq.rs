//! Interrupts: how a device's message becomes one.
//!
//! A message is an address and a value that the guest wrote into the device's MSI-X table. `KVM_SIGNAL_MSI` takes both
//! as they are, from any thread, without leaving anything set up: no descriptor per vector, and nothing to change when
//! the guest rewrites an entry. The alternative, an eventfd with a route, costs the same per interrupt, and changing a
//! route costs milliseconds on some hosts.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use kvm_bindings::kvm_msi;
use kvm_ioctls::VmFd;
use virtio::Call;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::Error;
use crate::pci::{Interrupts, Msi, Vector};

/// One vector of a device.
struct Message {
    vm: Arc<VmFd>,
    address: AtomicU64,
    data: AtomicU32,
}

impl Call for Message {
    fn call(&self) -> bool {
        let address = self.address.load(Ordering::Acquire);
        let message = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data: self.data.load(Ordering::Relaxed),
            ..kvm_msi::default()
        };
        // A message to nowhere is the guest's own; KVM says so, and it is lost as on a real machine.
        self.vm.signal_msi(message).is_ok()
    }
}

impl Vector for Message {
    fn set(&self, msi: Msi) {
        self.data.store(msi.data, Ordering::Relaxed);
        self.address.store(msi.address, Ordering::Release);
    }
}

/// The vectors of a machine's devices.
pub(crate) struct Messages(pub(crate) Arc<VmFd>);

impl Interrupts for Messages {
    fn vector(&self, _index: u16) -> io::Result<Arc<dyn Vector>> {
        let (address, data) = (AtomicU64::new(0), AtomicU32::new(0));
        Ok(Arc::new(Message { vm: self.0.clone(), address, data }))
    }
}

/// What sets the level of an interrupt line.
pub(crate) fn level(vm: Arc<VmFd>, irq: u16) -> impl Fn(bool) + Send + Sync {
    move |high| {
        if let Err(error) = vm.set_irq_line(irq.into(), high) {
            tracing::warn!(irq, %error, "cannot set an interrupt line");
        }
    }
}

/// An event that raises an interrupt line for a moment.
pub(crate) fn line(vm: &VmFd, irq: u32) -> Result<EventFd, Error> {
    let event = EventFd::new(EFD_NONBLOCK).map_err(|error| Error::system("create an eventfd", error))?;
    vm.register_irqfd(&event, irq)
        .map_err(|error| Error::kvm(format!("connect an event to interrupt line {irq}"), error))?;
    Ok(event)
}

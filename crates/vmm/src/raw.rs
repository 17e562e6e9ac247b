//! What `kvm-ioctls` leaves to its callers, made safe.
//!
//! Three things need unsafe code: a memory slot (the kernel gets an address of this process and uses it for as long as
//! the slot exists), the descriptor of the binary statistics (an ioctl that the crate does not wrap), and an `EventFd`
//! made from a descriptor that somebody else opened. Each is wrapped here so that no caller can get it wrong: a slot
//! owns the memory that it shows, and descriptors come and go as owned ones.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd};
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{VcpuFd, VmFd};
use virtio::GuestAddr;
use virtio::memory::Backing;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl;

use crate::slots::SlotNumber;

/// `_IO(KVMIO, 0xce)`, linux/kvm.h.
const KVM_GET_STATS_FD: libc::c_ulong = 0xAECE;

/// One place in a machine's memory map: empty, or with memory that the guest reads and writes without an exit.
pub(crate) struct Slot {
    vm: Arc<VmFd>,
    number: SlotNumber,
    shown: Option<(GuestAddr, Arc<dyn Backing>)>,
}

impl Slot {
    /// An empty slot.
    pub(crate) fn new(vm: Arc<VmFd>, number: SlotNumber) -> Self {
        Self { vm, number, shown: None }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.shown.is_none()
    }

    /// Shows all of `backing` at `addr`; both are multiples of a page. What was shown before must have been hidden.
    pub(crate) fn show(&mut self, addr: GuestAddr, backing: Arc<dyn Backing>) -> io::Result<()> {
        if !self.is_empty() {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        let region = kvm_userspace_memory_region {
            slot: self.number.get(),
            flags: 0,
            guest_phys_addr: addr.0,
            memory_size: backing.len() as u64,
            userspace_addr: backing.base().as_ptr().addr() as u64,
        };
        // SAFETY: the memory stays mapped while `backing` lives, and `self` keeps it until the slot is empty again.
        unsafe { self.vm.set_user_memory_region(region) }?;
        self.shown = Some((addr, backing));
        Ok(())
    }

    /// Empties it. When this returns, no virtual CPU writes to the memory any more.
    pub(crate) fn hide(&mut self) -> io::Result<()> {
        let Some((addr, _)) = &self.shown else { return Ok(()) };
        let region = kvm_userspace_memory_region {
            slot: self.number.get(),
            guest_phys_addr: addr.0,
            ..kvm_userspace_memory_region::default()
        };
        // SAFETY: a slot of size 0 refers to no memory.
        unsafe { self.vm.set_user_memory_region(region) }?;
        self.shown = None;
        Ok(())
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Err(error) = self.hide() {
            // The guest can still reach the memory, so it has to stay.
            std::mem::forget(self.shown.take());
            self.number.keep();
            tracing::error!(slot = self.number.get(), %error, "cannot remove guest memory; it is kept");
        }
    }
}

/// The file that a virtual CPU's binary statistics are read from.
pub(crate) fn stats_fd(vcpu: &VcpuFd) -> io::Result<File> {
    // SAFETY: the ioctl takes no argument and touches no memory of ours.
    let fd = unsafe { ioctl(vcpu, KVM_GET_STATS_FD) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just opened it for us, and nobody else knows of it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Another handle of the eventfd behind `fd`, in the type that `kvm-ioctls` asks for.
pub(crate) fn event_fd(fd: BorrowedFd<'_>) -> io::Result<EventFd> {
    let fd = fd.try_clone_to_owned()?;
    // SAFETY: the descriptor is owned, and ownership passes on. If it is no eventfd, calls on it fail.
    Ok(unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) })
}

//! The way to KVM: opens the device, checks what it can do, makes an empty machine.

use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_BINARY_STATS_FD, KVM_CAP_DISABLE_QUIRKS2, KVM_MAX_CPUID_ENTRIES,
    KVM_PIT_SPEAKER_DUMMY, KVM_X86_QUIRK_SLOT_ZAP_ALL, kvm_enable_cap, kvm_pit_config,
};
use kvm_ioctls::{Cap, Kvm, VmFd};

use crate::layout;
use crate::raw::Slot;
use crate::slots::SlotNumbers;
use crate::{Error, VCPUS_MAX};

/// Where KVM is.
pub const KVM_PATH: &str = "/dev/kvm";

/// What nothing can replace.
const REQUIRED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "show memory to a guest (KVM_CAP_USER_MEMORY)"),
    (Cap::SetTssAddr, "place its own pages (KVM_CAP_SET_TSS_ADDR)"),
    (Cap::Irqchip, "emulate interrupt controllers (KVM_CAP_IRQCHIP)"),
    (Cap::Pit2, "emulate a timer (KVM_CAP_PIT2)"),
    (Cap::Ioeventfd, "turn writes into events (KVM_CAP_IOEVENTFD)"),
    (Cap::IoeventfdNoLength, "turn writes of any length into events (KVM_CAP_IOEVENTFD_NO_LENGTH)"),
    (Cap::Irqfd, "turn events into interrupts (KVM_CAP_IRQFD)"),
    (Cap::SignalMsi, "deliver messages as interrupts (KVM_CAP_SIGNAL_MSI)"),
    (Cap::ImmediateExit, "be stopped (KVM_CAP_IMMEDIATE_EXIT)"),
    (Cap::ExtCpuid, "describe a processor (KVM_CAP_EXT_CPUID)"),
    (Cap::MpState, "start processors one by one (KVM_CAP_MP_STATE)"),
];

/// Whether virtual machines can be run here.
///
/// # Errors
/// What is missing, and what works without it.
pub fn check() -> Result<(), Error> {
    open(Path::new(KVM_PATH)).map(drop)
}

fn open(path: &Path) -> Result<Kvm, Error> {
    let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())
        .map_err(|error| Error::Open { path: path.into(), source: error.into() })?;
    let kvm = Kvm::new_with_path(name).map_err(|error| {
        let source = std::io::Error::from(error);
        let path = path.into();
        match source.kind() {
            ErrorKind::NotFound => Error::NoKvm { path },
            ErrorKind::PermissionDenied => Error::Forbidden { path },
            _ => Error::Open { path, source },
        }
    })?;
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION as i32 {
        return Err(Error::Version { path: path.into(), version });
    }
    match REQUIRED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some(&(_, what)) => Err(Error::Missing { what }),
        None => Ok(kvm),
    }
}

/// A machine without memory and processors.
pub(crate) struct Vm {
    pub(crate) fd: Arc<VmFd>,
    /// What the processors can do.
    pub(crate) cpuid: CpuId,
    /// Whether there are binary statistics.
    pub(crate) has_stats: bool,
    /// Whether the local APIC can be programmed in the unit of the time stamp counter.
    pub(crate) has_tsc_deadline: bool,
    /// How many virtual CPUs it may have.
    pub(crate) cpus_max: usize,
    slots: SlotNumbers,
}

impl Vm {
    pub(crate) fn new() -> Result<Self, Error> {
        let kvm = open(Path::new(KVM_PATH))?;
        let fd = kvm.create_vm().map_err(|error| Error::kvm("create a machine", error))?;
        fd.set_identity_map_address(layout::IDENTITY_MAP)
            .map_err(|error| Error::kvm(format!("place its page at {:#x}", layout::IDENTITY_MAP), error))?;
        fd.set_tss_address(layout::TSS as usize)
            .map_err(|error| Error::kvm(format!("place its pages at {:#x}", layout::TSS), error))?;
        fd.create_irq_chip().map_err(|error| Error::kvm("create interrupt controllers", error))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..kvm_pit_config::default() };
        fd.create_pit2(pit).map_err(|error| Error::kvm("create a timer", error))?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|error| Error::kvm("say what its processors can do", error))?;
        forget_one_slot_at_a_time(&fd);
        Ok(Self {
            cpuid,
            has_stats: fd.check_extension_raw(KVM_CAP_BINARY_STATS_FD.into()) > 0,
            has_tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            cpus_max: kvm.get_max_vcpus().min(VCPUS_MAX),
            slots: SlotNumbers::new(u32::try_from(kvm.get_nr_memslots()).unwrap_or(0)),
            fd: Arc::new(fd),
        })
    }

    /// A memory slot, empty.
    pub(crate) fn slot(&self) -> Result<Slot, Error> {
        let none_left =
            || Error::kvm("have another memory slot", std::io::Error::from(ErrorKind::OutOfMemory));
        let number = self.slots.take().ok_or_else(none_left)?;
        Ok(Slot::new(self.fd.clone(), number))
    }
}

/// Removing a slot makes KVM forget the whole guest's page tables, unless told that nobody relies on that (Linux 6.12
/// and later). Doorbells come and go.
fn forget_one_slot_at_a_time(fd: &VmFd) {
    let quirk = KVM_X86_QUIRK_SLOT_ZAP_ALL;
    let quirks = fd.check_extension_raw(KVM_CAP_DISABLE_QUIRKS2.into());
    if u32::try_from(quirks).is_ok_and(|quirks| quirks & quirk != 0) {
        let mut cap = kvm_enable_cap { cap: KVM_CAP_DISABLE_QUIRKS2, ..kvm_enable_cap::default() };
        cap.args[0] = quirk.into();
        if let Err(error) = fd.enable_cap(&cap) {
            tracing::debug!(%error, "removing a memory slot forgets all others");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_is_said_to_be_missing_and_what_works_without_it() {
        let error = open(Path::new("/nonexistent/kvm")).err().unwrap();
        assert!(matches!(error, Error::NoKvm { .. }), "{error}");
        assert!(error.to_string().contains("vhost-user sockets work without it"));
    }

    #[test]
    fn a_file_that_is_no_kvm_is_refused() {
        let error = open(Path::new("/dev/null")).err().unwrap();
        assert!(matches!(error, Error::Version { .. } | Error::Open { .. }), "{error}");
    }
}

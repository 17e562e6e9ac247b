//! What can keep a virtual machine from being built or from running on.

use std::io;
use std::path::PathBuf;

use crate::layout;

/// Why a machine could not be built, or stopped without being told to.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no KVM here.
    #[error(
        "cannot run virtual machines: there is no {path}; the kernel has no KVM, its module (kvm_intel, kvm_amd) is \
         not loaded, or the processor's virtualization is switched off. vhost-user sockets work without it"
    )]
    NoKvm {
        /// The device file.
        path: PathBuf,
    },
    /// KVM is there, but not for us.
    #[error(
        "cannot run virtual machines: {path} may not be opened for reading and writing; usually the group `kvm` may. \
         vhost-user sockets work without it"
    )]
    Forbidden {
        /// The device file.
        path: PathBuf,
    },
    /// Opening the device failed in another way.
    #[error("cannot open {path}: {source}")]
    Open {
        /// The device file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is not the interface that this program was written for.
    #[error("{path} speaks version {version} of the KVM interface; it must be 12")]
    Version {
        /// The device file.
        path: PathBuf,
        /// What it says.
        version: i32,
    },
    /// Something is missing that nothing can replace.
    #[error("this KVM cannot {what}, which is needed: the kernel must be Linux 5.11 or later on x86-64")]
    Missing {
        /// What it cannot do.
        what: &'static str,
    },
    /// KVM refused.
    #[error("KVM cannot {what}: {source}")]
    Kvm {
        /// What was to be done.
        what: String,
        /// What it said.
        source: io::Error,
    },
    /// The system refused.
    #[error("cannot {what}: {source}")]
    System {
        /// What was to be done.
        what: String,
        /// What it said.
        source: io::Error,
    },
    /// A number of virtual CPUs that is not to be had.
    #[error("{cpus} virtual CPUs: between 1 and {max} are possible here")]
    Cpus {
        /// How many were asked for.
        cpus: usize,
        /// How many are possible.
        max: usize,
    },
    /// The list of host CPUs has another length than that of virtual ones.
    #[error("{pins} host CPUs to pin {cpus} virtual CPUs to: give one for each, or none")]
    Pins {
        /// How many host CPUs were named.
        pins: usize,
        /// How many virtual CPUs there are.
        cpus: usize,
    },
    /// A host CPU that cannot be.
    #[error("host CPU {cpu} to pin a virtual CPU to: their numbers are below {max}")]
    HostCpu {
        /// Its number.
        cpu: u32,
        /// The first number that is too high.
        max: u32,
    },
    /// A size of memory that is not to be had.
    #[error(
        "guest memory of {bytes} bytes: it must be a multiple of {unit} bytes, at least {}, at most {}",
        layout::RAM_BYTES_MIN,
        layout::RAM_BYTES_MAX
    )]
    MemorySize {
        /// What was asked for.
        bytes: u64,
        /// The unit: a page, huge if those were asked for.
        unit: u64,
    },
    /// The memory cannot be had.
    #[error("cannot get {bytes} bytes of guest memory{}: {reason}", if *.huge { " in huge pages (see /proc/sys/vm/nr_hugepages)" } else { "" })]
    Memory {
        /// How much.
        bytes: u64,
        /// Whether in huge pages.
        huge: bool,
        /// Why not.
        reason: String,
    },
    /// The kernel cannot be read or is not one.
    #[error("cannot boot {kernel}: {reason}")]
    Kernel {
        /// Its path, or what it is.
        kernel: String,
        /// Why not.
        reason: String,
    },
    /// The initial RAM file system cannot be loaded.
    #[error("cannot load the initrd {path}: {reason}")]
    Initrd {
        /// Its path.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The kernel's command line is not one.
    #[error("kernel command line of {bytes} bytes: at most {max} are allowed, none of them 0")]
    CommandLine {
        /// Its length.
        bytes: usize,
        /// The most.
        max: usize,
    },
    /// A device cannot be attached.
    #[error("cannot attach {label}: {reason}")]
    Device {
        /// The device's label.
        label: String,
        /// Why not.
        reason: String,
    },
    /// Two devices claim the same addresses.
    #[error("{name} at {start:#x}..{end:#x} overlaps {other}")]
    Overlap {
        /// The later one.
        name: &'static str,
        /// Where it begins.
        start: u64,
        /// Where it ends.
        end: u64,
        /// The earlier one.
        other: &'static str,
    },
    /// A virtual CPU cannot go on.
    #[error("virtual CPU {cpu} cannot go on: {reason}")]
    Vcpu {
        /// Which one.
        cpu: usize,
        /// Why not.
        reason: String,
    },
    /// It was run before.
    #[error("the machine has run; it runs once")]
    Used,
}

impl Error {
    pub(crate) fn kvm(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Kvm { what: what.into(), source: source.into() }
    }

    pub(crate) fn system(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::System { what: what.into(), source: source.into() }
    }
}

//! What a machine is made of.

use std::path::PathBuf;
use std::sync::Arc;

use reactor::Mode;
use virtio::Device;

use crate::boot::Kernel;
use crate::doorbell::DoorbellMode;
use crate::serial::Sink;

/// The most virtual CPUs of a machine.
pub const VCPUS_MAX: usize = 64;
/// Enough for a kernel and a small user space.
const MEMORY_BYTES_DEFAULT: u64 = 512 << 20;

/// A machine to be built.
pub struct Config {
    /// RAM in bytes: a multiple of 4 KiB, or of 2 MiB with huge pages; at least 16 MiB.
    pub memory_bytes: u64,
    /// Whether RAM is in huge pages of 2 MiB, of which the host must have enough.
    pub huge_pages: bool,
    /// Virtual CPUs, 1 to [`VCPUS_MAX`].
    pub cpus: usize,
    /// The host CPU that each virtual CPU is pinned to; empty if they run anywhere.
    pub pin: Vec<u32>,
    /// The kernel.
    pub kernel: Kernel,
    /// Its initial RAM file system.
    pub initrd: Option<PathBuf>,
    /// Its command line, at most 2047 bytes.
    pub command_line: String,
    /// Where the guest's serial console goes.
    pub serial: Sink,
    /// When notification pages are plain memory.
    pub doorbells: DoorbellMode,
}

impl Config {
    /// One virtual CPU, 512 MiB, nothing else.
    #[must_use]
    pub fn new(kernel: Kernel, serial: Sink) -> Self {
        Self {
            memory_bytes: MEMORY_BYTES_DEFAULT,
            huge_pages: false,
            cpus: 1,
            pin: Vec::new(),
            kernel,
            initrd: None,
            command_line: String::new(),
            serial,
            doorbells: DoorbellMode::default(),
        }
    }
}

/// A device to be attached.
pub struct PciDevice {
    /// The device.
    pub device: Arc<dyn Device>,
    /// Its name in logs and statistics, unique among the pool's devices.
    pub label: String,
    /// How its queues notice requests.
    pub mode: Mode,
    /// Virtio features not to offer.
    pub without: u64,
}

impl PciDevice {
    /// A device with its name and mode.
    #[must_use]
    pub fn new(device: Arc<dyn Device>, label: impl Into<String>, mode: Mode) -> Self {
        Self { device, label: label.into(), mode, without: 0 }
    }
}

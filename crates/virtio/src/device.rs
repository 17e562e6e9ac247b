//! What a device is to a transport: the same for vhost-user sockets and for the PCI devices of the monitor.
//!
//! A device names no transport, a transport names no device. The life of a device: features are negotiated, queues
//! start ([`Device::start_queue`]), each on the I/O thread that the transport chose, and stop when the transport
//! removes their poller from its thread, in any order and as often as the driver likes; [`Device::reset`] between two
//! lives. All methods but the pollers' run on control threads and may take their time.

use std::sync::Arc;

use reactor::Poller;

use crate::queue::Queue;

/// Builds a queue's poller on the I/O thread that will run it.
pub type PollerBuilder = Box<dyn FnOnce() -> Box<dyn Poller> + Send>;

/// Called by a device, on any thread, when its configuration space changed by itself (a resize).
pub type ConfigListener = Arc<dyn Fn() + Send + Sync>;

/// A write to the configuration space was refused, and has changed nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// It is not to a writable field.
    #[error("configuration write of {len} bytes at offset {offset} is not to a writable field")]
    NotWritable {
        /// Offset in the device's configuration space, in bytes.
        offset: u32,
        /// Bytes to be written.
        len: usize,
    },
    /// The device could not do what the field stands for. The message says what failed.
    #[error("configuration write: {0}")]
    Failed(String),
}

/// A device cannot take a queue into service now. The message says what it lacks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NotReady(pub String);

/// What the device has stored may not be where another host finds it. The message says why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("what was written may not be on the storage: {0}")]
pub struct NotSettled(pub String);

/// A saved state cannot be restored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot restore the device: {0}")]
pub struct StateError(pub String);

/// Host memory that a device shows its driver (virtio 1.2, section 2.10).
pub struct SharedMemory {
    /// The identifier the device type defines for it.
    pub id: u8,
    /// What is mapped.
    pub file: std::fs::File,
    /// Its length in bytes.
    pub len: u64,
}

/// A virtio device.
pub trait Device: Send + Sync {
    /// The virtio device ID (virtio 1.2, section 5).
    fn device_id(&self) -> u32;

    /// Features of this device type. The ring's ([`crate::features`]) are the transport's to offer.
    fn features(&self) -> u64;

    /// How many queues it has.
    fn queues(&self) -> u16;

    /// The largest ring a queue may have.
    fn queue_size_max(&self) -> u16 {
        1024
    }

    /// Queues with the same group run on the same I/O thread: a receive queue and its transmit queue, say.
    fn queue_group(&self, index: u16) -> u16 {
        index
    }

    /// Whether the queue carries commands rather than data. Nobody polls for those: its thread may sleep.
    fn is_control_queue(&self, _index: u16) -> bool {
        false
    }

    /// The configuration space as it is now.
    fn config(&self) -> Vec<u8>;

    /// The driver writes to the configuration space.
    ///
    /// # Errors
    /// See [`ConfigError`]. Nothing was changed.
    fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), ConfigError> {
        Err(ConfigError::NotWritable { offset, len: data.len() })
    }

    /// Whom to tell when the configuration space changes by itself. None ends it.
    fn set_config_listener(&self, _listener: Option<ConfigListener>) {}

    /// Takes a queue into service. What is returned builds its poller, which owns the queue from then on, serves it
    /// until it is drained, and drops it.
    ///
    /// A receive queue is no different: its poller holds the chains it took until there is something to put in them,
    /// and gives them back unused (0 bytes written) when it is drained.
    ///
    /// # Errors
    /// Something that the queue needs cannot be had, after waiting for it for some seconds if that may help.
    fn start_queue(&self, queue: Queue) -> Result<PollerBuilder, NotReady>;

    /// Forgets everything the driver set: a driver that knows of nothing reads the configuration space next. All queues
    /// are stopped when it is called.
    fn reset(&self) {}

    /// The driver was set up with another instance, which ended without handing over its state: what the driver has set
    /// beyond the rings is not known.
    fn take_over(&self) {}

    /// Another host may go on with what this device has stored: leaves nothing of it in this host's memory. Called after a
    /// queue was stopped for good, before anybody is told; it may take its time.
    ///
    /// # Errors
    /// Something may be left. Who waits for the end of the queue must not be told that all is well.
    fn settle(&self) -> Result<(), NotSettled> {
        Ok(())
    }

    /// What another instance needs to go on where this one is, beyond the rings. All queues are stopped.
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Goes on where the instance that was saved had stopped.
    ///
    /// # Errors
    /// The state is malformed or of a device that differs in something the driver has seen.
    fn restore(&self, state: &[u8]) -> Result<(), StateError> {
        if state.is_empty() { Ok(()) } else { Err(StateError(format!("{} unexpected bytes", state.len()))) }
    }

    /// Host memory that it shows its driver.
    fn shared_memory(&self) -> Vec<SharedMemory> {
        Vec::new()
    }
}

//! Virtio devices on PCI (virtio 1.2, section 4.1), 1.x only: the other transport for a [`Device`].
//!
//! A [`VirtioPci`] is a device's function on the bus. Its parts have a lock each, so that what is quick does not wait
//! for what is not:
//!
//! | part | room | its lock is held |
//! |---|---|---|
//! | configuration space | [`config_space`](super::config_space), `window` | for the access |
//! | common configuration | `common_config`, `control`, `queue` | while queues start and stop: as long as storage takes |
//! | device configuration | `device_config` | for the access |
//! | doorbells | `bells` | while one is registered; not for a kick |
//! | MSI-X | [`msix`](super::msix) | while the machine learns a message |
//! | announcements | `announce` | for one message |
//!
//! They are taken in this order, downwards; the first and the second never together.

mod announce;
mod bells;
mod common_config;
mod control;
mod device_config;
mod layout;
mod queue;
mod shared;
mod window;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use virtio::{ConfigListener, Device, GuestAddr, Memory, QueueCounters, QueueSet};

use self::announce::Announcer;
use self::bells::Bells;
use self::common_config::CommonConfig;
use self::control::{Control, Parts};
use self::device_config::DeviceConfig;
use self::layout::{
    COMMON, DEVICE, ISR, Layout, NOTIFY_BAR, PENDING, QUEUES_MAX, REGISTERS_BAR, SHARED_BAR, TABLE,
};
use self::shared::Shared;
use self::window::{Access, Window};
use super::config_space::ConfigSpace;
use super::function::{BarPlace, Function};
use super::msix::Msix;
use super::{Doorbells, Interrupts, LayoutError, Mappings};

/// A device that cannot be attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// No PCI device ID is set aside for its type.
    #[error("device type {0}: PCI has IDs for types up to 63")]
    DeviceType(u32),
    /// Too many queues.
    #[error("{0} queues: at most {QUEUES_MAX} have an MSI-X vector each")]
    TooManyQueues(u16),
    /// Its configuration space is too long.
    #[error("a configuration space of {0} bytes: at most 4096 are supported")]
    ConfigTooLong(usize),
    /// Its shared memory cannot be shown.
    #[error(
        "shared memory {id} of {len} bytes: it must be whole pages, and no more than there are in its file"
    )]
    SharedMemory {
        /// Which region.
        id: u8,
        /// Its length in bytes.
        len: u64,
    },
    /// Capabilities or BARs do not fit.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The system refused.
    #[error("cannot make {what}: {source}")]
    System {
        /// What was being made.
        what: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
}

/// What a device needs of the machine it is in.
pub struct Resources {
    /// The guest's memory.
    pub memory: Arc<Memory>,
    /// Makes its interrupts.
    pub interrupts: Arc<dyn Interrupts>,
    /// Makes its doorbells.
    pub doorbells: Arc<dyn Doorbells>,
    /// Shows its memory to the guest.
    pub mappings: Arc<dyn Mappings>,
    /// Virtio features not to offer.
    pub without: u64,
}

/// How long whoever asks for counters waits for queues that start or stop, and how long between two looks.
const COUNTERS_WAIT: Duration = Duration::from_millis(100);
const COUNTERS_LOOK: Duration = Duration::from_micros(50);

/// A virtio device as a function on the bus.
pub struct VirtioPci {
    device: Arc<dyn Device>,
    space: Mutex<ConfigSpace>,
    window: Window,
    msix_at: u16,
    common: Mutex<CommonConfig>,
    config: DeviceConfig,
    bells: Arc<Bells>,
    msix: Arc<Msix>,
    announcer: Arc<Announcer>,
    shared: Shared,
    /// The counters as they were when they were last read.
    counted: Mutex<Vec<QueueCounters>>,
}

impl VirtioPci {
    /// Attaches a device, none of whose queues runs.
    ///
    /// # Errors
    /// See [`AttachError`].
    pub fn new(queues: QueueSet, resources: Resources) -> Result<Self, AttachError> {
        let device = queues.device().clone();
        let count = device.queues();
        if count > QUEUES_MAX {
            return Err(AttachError::TooManyQueues(count));
        }
        let interrupts = |source| AttachError::System { what: "an interrupt", source };
        let msix = Arc::new(Msix::new(count + 1, &*resources.interrupts).map_err(interrupts)?);
        let doorbells = |source| AttachError::System { what: "a doorbell", source };
        let bells = Arc::new(Bells::new(count, &*resources.doorbells).map_err(doorbells)?);
        let announcer = Arc::new(Announcer::new(msix.clone()));
        let Layout { space, msix: msix_at, window, shared } = Layout::new(&*device, &msix)?;
        let parts = Parts {
            memory: resources.memory,
            msix: msix.clone(),
            bells: bells.clone(),
            announcer: announcer.clone(),
        };
        let control = Control::new(queues, resources.without, parts);
        let listener: ConfigListener = {
            let announcer = announcer.clone();
            Arc::new(move || announcer.config_changed())
        };
        device.set_config_listener(Some(listener));
        Ok(Self {
            space: Mutex::new(space),
            window: Window(window),
            msix_at,
            common: Mutex::new(CommonConfig::new(control)),
            config: DeviceConfig::new(device.clone()),
            bells,
            msix,
            announcer,
            shared: Shared::new(shared, resources.mappings),
            counted: Mutex::new(vec![QueueCounters::default(); count.into()]),
            device,
        })
    }

    /// Stops all queues where they are. The vCPUs stand still.
    pub fn pause(&self) {
        self.common().control.pause();
    }

    /// Lets the queues go on.
    pub fn resume(&self) {
        self.common().control.resume();
    }

    /// What the queues have counted since the device was made, by queue. While queues start or stop, this waits; if that
    /// takes long, and storage can make it take for ever, it is what they had counted the last time somebody asked.
    #[must_use]
    pub fn counters(&self) -> Vec<QueueCounters> {
        let deadline = Instant::now() + COUNTERS_WAIT;
        let common = loop {
            match self.common.try_lock() {
                Ok(common) => break Some(common),
                Err(TryLockError::Poisoned(error)) => break Some(error.into_inner()),
                Err(TryLockError::WouldBlock) if Instant::now() >= deadline => break None,
                Err(TryLockError::WouldBlock) => std::thread::sleep(COUNTERS_LOOK),
            }
        };
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(common) = common {
            *counted = common.control.counters();
        }
        counted.clone()
    }

    fn space(&self) -> MutexGuard<'_, ConfigSpace> {
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn common(&self) -> MutexGuard<'_, CommonConfig> {
        self.common.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads what the window is aimed at into the window.
    fn load_window(&self) {
        let aim = self.window.aim(&self.space());
        if let Some(Access { bar, offset, len }) = aim {
            let mut data = [0; 4];
            self.bar_read(bar, offset, &mut data[..len]);
            self.space().put(self.window.data().start, &data[..len]);
        }
    }

    /// Writes what is in the window to what it is aimed at.
    fn store_window(&self) {
        let (aim, data) = {
            let space = self.space();
            (self.window.aim(&space), space.get::<4>(self.window.data().start))
        };
        if let Some(Access { bar, offset, len }) = aim {
            self.bar_write(bar, offset, &data[..len]);
        }
    }
}

impl Function for VirtioPci {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        if self.window.is_touched(offset, data.len()) {
            self.load_window();
        }
        self.space().read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        {
            let mut space = self.space();
            space.write(offset, data);
            let [control] = space.get(usize::from(self.msix_at) + 3);
            self.msix.set_control(control);
        }
        if self.window.is_touched(offset, data.len()) {
            self.store_window();
        }
    }

    fn bars(&self) -> Vec<BarPlace> {
        let space = self.space();
        let place = |bar| BarPlace { bar, at: space.decoded(&bar).map(|range| GuestAddr(range.start)) };
        space.bars().map(place).collect()
    }

    fn assign(&self, bar: usize, addr: GuestAddr) {
        let mut space = self.space();
        if let Some(bar) = space.bar(bar) {
            space.assign(&bar, addr.0);
        }
    }

    fn placed(&self, bar: usize, addr: Option<GuestAddr>) {
        match bar {
            NOTIFY_BAR => self.bells.place(addr),
            SHARED_BAR => self.shared.place(addr),
            _ => {}
        }
    }

    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]) {
        match (bar, offset) {
            (REGISTERS_BAR, COMMON..ISR) => {
                let generation = self.config.generation();
                self.common().read(generation, offset - COMMON, data);
            }
            (REGISTERS_BAR, ISR..DEVICE) => {
                data.fill(0);
                if let (ISR, Some(first)) = (offset, data.first_mut()) {
                    *first = self.announcer.take_isr();
                }
            }
            (REGISTERS_BAR, DEVICE..PENDING) => self.config.read(offset - DEVICE, data),
            (REGISTERS_BAR, PENDING..TABLE) => self.msix.read_pending(offset - PENDING, data),
            (REGISTERS_BAR, TABLE..) => self.msix.read_table(offset - TABLE, data),
            (NOTIFY_BAR, _) => data.fill(0),
            // Shared memory that could not be mapped, or ends before its BAR does.
            _ => data.fill(0xff),
        }
    }

    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) {
        match (bar, offset) {
            (REGISTERS_BAR, COMMON..ISR) => self.common().write(offset - COMMON, data),
            (REGISTERS_BAR, DEVICE..PENDING) => self.config.write(offset - DEVICE, data),
            (REGISTERS_BAR, TABLE..) => self.msix.write_table(offset - TABLE, data),
            (NOTIFY_BAR, _) => self.bells.write(offset),
            _ => {}
        }
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        self.device.set_config_listener(None);
    }
}

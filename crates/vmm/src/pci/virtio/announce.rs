//! How the driver is told: MSI-X, or bits in the ISR status where MSI-X is off (virtio 1.2, sections 4.1.4.5 and
//! 4.1.5.3 to 4.1.5.5).
//!
//! I/O threads and devices call here, so nothing here waits for a device's control.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio::Call;

use crate::pci::msix::{Msix, MsixVector};

/// ISR status bit: buffers were used.
const ISR_QUEUE: u8 = 1;
/// ISR status bit: the configuration changed.
const ISR_CONFIG: u8 = 2;

#[derive(Default)]
struct Config {
    vector: Option<Arc<MsixVector>>,
    /// The driver is ready for notifications.
    is_live: bool,
    /// Something changed before it was.
    pending: bool,
}

/// Tells one device's driver what happens.
pub(crate) struct Announcer {
    msix: Arc<Msix>,
    isr: AtomicU8,
    config: Mutex<Config>,
    needs_reset: AtomicBool,
}

impl Announcer {
    pub(crate) fn new(msix: Arc<Msix>) -> Self {
        Self { msix, isr: AtomicU8::new(0), config: Mutex::default(), needs_reset: AtomicBool::new(false) }
    }

    /// The driver reads the ISR status, which clears it.
    pub(crate) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    /// Announces that the configuration changed, as soon as the driver is ready to hear of it.
    pub(crate) fn config_changed(&self) {
        let mut config = self.config();
        config.pending = true;
        self.flush(&mut config);
    }

    /// A queue cannot go on before the driver resets the device.
    pub(crate) fn broken(&self) {
        self.needs_reset.store(true, Ordering::Release);
        self.config_changed();
    }

    /// Whether the device waits to be reset.
    pub(crate) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// The driver has said which vector announces changes of the configuration.
    pub(crate) fn set_config_vector(&self, vector: Option<Arc<MsixVector>>) {
        self.config().vector = vector;
    }

    /// The driver is ready.
    pub(crate) fn go_live(&self) {
        let mut config = self.config();
        config.is_live = true;
        self.flush(&mut config);
    }

    /// The driver has reset the device.
    pub(crate) fn reset(&self) {
        *self.config() = Config::default();
        self.needs_reset.store(false, Ordering::Release);
        self.isr.store(0, Ordering::Release);
    }

    fn flush(&self, config: &mut Config) {
        if config.is_live && std::mem::take(&mut config.pending) {
            self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
            if let Some(vector) = &config.vector {
                vector.raise();
            }
        }
    }

    fn config(&self) -> MutexGuard<'_, Config> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Announces the used buffers of one queue.
pub(crate) struct QueueCall {
    pub(crate) announcer: Arc<Announcer>,
    /// As the driver said.
    pub(crate) vector: Option<Arc<MsixVector>>,
}

impl Call for QueueCall {
    fn call(&self) -> bool {
        let raised = match &self.vector {
            Some(vector) => vector.raise(),
            None => false,
        };
        if !raised && !self.announcer.msix.is_enabled() {
            self.announcer.isr.fetch_or(ISR_QUEUE, Ordering::AcqRel);
        }
        raised
    }
}

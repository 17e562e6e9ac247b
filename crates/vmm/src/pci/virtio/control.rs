//! The life of a device as its driver leads it: features, status, queues that start and stop (virtio 1.2, sections 2.1
//! and 3.1).
//!
//! A queue runs exactly while it is enabled, the driver is ready (DRIVER_OK), and the machine is not paused. What a
//! driver must not write is not taken: the register keeps its value, and the driver can read that.

use std::sync::Arc;

use virtio::features::{RING_FEATURES, RING_RESET, VERSION_1};
use virtio::{Call, Device, Memory, QueueConfig, QueueCounters, QueueSet, RingState, StartError};

use super::announce::{Announcer, QueueCall};
use super::bells::Bells;
use super::queue::{NO_VECTOR, QueueRegisters};
use crate::pci::msix::Msix;

const STATUS_ACKNOWLEDGE: u8 = 1;
const STATUS_DRIVER: u8 = 2;
const STATUS_DRIVER_OK: u8 = 4;
const STATUS_FEATURES_OK: u8 = 8;
const STATUS_NEEDS_RESET: u8 = 64;
const STATUS_FAILED: u8 = 128;

/// The parts of a device that others have as well.
#[derive(Clone)]
pub(crate) struct Parts {
    pub(crate) memory: Arc<Memory>,
    pub(crate) msix: Arc<Msix>,
    pub(crate) bells: Arc<Bells>,
    pub(crate) announcer: Arc<Announcer>,
}

/// The state of one device.
pub(crate) struct Control {
    parts: Parts,
    queues: QueueSet,
    /// Features not to offer.
    without: u64,
    status: u8,
    /// As the driver wrote them; checked when it says that they are complete.
    features: u64,
    config_vector: u16,
    registers: Vec<QueueRegisters>,
    paused: bool,
    /// It has been said that a queue does not start.
    warned: bool,
}

impl Control {
    pub(crate) fn new(queues: QueueSet, without: u64, parts: Parts) -> Self {
        let device = queues.device();
        let registers = (0..device.queues()).map(|_| QueueRegisters::new(device.queue_size_max())).collect();
        Self {
            parts,
            queues,
            without,
            status: 0,
            features: 0,
            config_vector: NO_VECTOR,
            registers,
            paused: false,
            warned: false,
        }
    }

    fn device(&self) -> &Arc<dyn Device> {
        self.queues.device()
    }

    // Features.

    pub(crate) fn offered(&self) -> u64 {
        (self.device().features() | RING_FEATURES | RING_RESET) & !self.without
    }

    pub(crate) fn features(&self) -> u64 {
        self.features
    }

    pub(crate) fn set_features(&mut self, features: u64) {
        if self.status & STATUS_FEATURES_OK == 0 {
            self.features = features;
        }
    }

    /// Those that were agreed on; none before.
    fn negotiated(&self) -> u64 {
        if self.status & STATUS_FEATURES_OK != 0 { self.features } else { 0 }
    }

    fn features_are_acceptable(&self) -> bool {
        self.features & !self.offered() == 0 && self.features & VERSION_1 != 0
    }

    // Status.

    pub(crate) fn status(&self) -> u8 {
        let failed = (0..self.device().queues()).any(|index| self.queues.has_failed(index));
        match failed || self.parts.announcer.needs_reset() {
            true => self.status | STATUS_NEEDS_RESET,
            false => self.status,
        }
    }

    pub(crate) fn set_status(&mut self, status: u8) {
        if status == 0 {
            return self.reset();
        }
        let new = status & !self.status;
        self.status |= status & (STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FAILED);
        if new & STATUS_FEATURES_OK != 0 && self.features_are_acceptable() {
            self.status |= STATUS_FEATURES_OK;
        }
        if new & STATUS_DRIVER_OK != 0 && self.status & STATUS_FEATURES_OK != 0 {
            self.status |= STATUS_DRIVER_OK;
            self.parts.announcer.go_live();
            self.start_all();
        }
    }

    /// Returns when all that was in flight is done, and a driver may use its memory for something else.
    pub(crate) fn reset(&mut self) {
        for index in 0..self.registers.len() as u16 {
            self.stop(index);
        }
        self.device().reset();
        self.parts.announcer.reset();
        self.registers.iter_mut().for_each(QueueRegisters::reset);
        (self.status, self.features, self.config_vector) = (0, 0, NO_VECTOR);
    }

    // Queues.

    pub(crate) fn queues(&self) -> u16 {
        self.registers.len() as u16
    }

    pub(crate) fn queue(&self, index: u16) -> Option<&QueueRegisters> {
        self.registers.get(usize::from(index))
    }

    /// Changes what a queue will be, which is only possible before it is enabled.
    pub(crate) fn change(&mut self, index: u16, change: impl FnOnce(&mut QueueRegisters, u64)) {
        let features = self.negotiated();
        if let Some(queue) = self.registers.get_mut(usize::from(index))
            && !queue.enabled
        {
            change(queue, features);
        }
    }

    /// A driver enables queues; it has no way to disable one, other than a reset.
    pub(crate) fn enable(&mut self, index: u16) {
        self.change(index, |queue, _| queue.enabled = queue.size > 0);
        self.start(index);
    }

    /// Stops a single queue and forgets what the driver wrote about it (section 2.6.1).
    pub(crate) fn reset_queue(&mut self, index: u16) {
        if self.negotiated() & RING_RESET == 0 {
            return;
        }
        self.stop(index);
        if let Some(queue) = self.registers.get_mut(usize::from(index)) {
            queue.reset();
        }
    }

    // Vectors.

    pub(crate) fn config_vector(&self) -> u16 {
        self.config_vector
    }

    pub(crate) fn set_config_vector(&mut self, vector: u16) {
        self.config_vector = self.existing(vector);
        self.parts.announcer.set_config_vector(self.parts.msix.vector(vector));
    }

    /// A vector may change while its queue runs.
    pub(crate) fn set_queue_vector(&mut self, index: u16, vector: u16) {
        let vector = self.existing(vector);
        if let Some(queue) = self.registers.get_mut(usize::from(index)) {
            queue.vector = vector;
            self.queues.set_call(index, Some(self.call(vector)));
        }
    }

    fn existing(&self, vector: u16) -> u16 {
        if self.parts.msix.vector(vector).is_some() { vector } else { NO_VECTOR }
    }

    fn call(&self, vector: u16) -> Arc<dyn Call> {
        let announcer = self.parts.announcer.clone();
        Arc::new(QueueCall { announcer, vector: self.parts.msix.vector(vector) })
    }

    // Running.

    /// Stops all queues where they are, until [`Control::resume`].
    pub(crate) fn pause(&mut self) {
        self.paused = true;
        for index in 0..self.registers.len() as u16 {
            if let Some(position) = self.stop(index)
                && let Some(queue) = self.registers.get_mut(usize::from(index))
            {
                queue.position = position;
            }
        }
    }

    pub(crate) fn resume(&mut self) {
        self.paused = false;
        self.start_all();
    }

    pub(crate) fn counters(&self) -> Vec<QueueCounters> {
        (0..self.queues()).filter_map(|index| self.queues.lifetime_counters(index)).collect()
    }

    fn start_all(&mut self) {
        for index in 0..self.registers.len() as u16 {
            self.start(index);
        }
    }

    fn start(&mut self, index: u16) {
        if let Err(error) = self.try_start(index) {
            self.parts.bells.close(index);
            if !std::mem::replace(&mut self.warned, true) {
                tracing::warn!(queue = index, %error, "queue not started");
            }
            self.parts.announcer.broken();
        }
    }

    fn try_start(&mut self, index: u16) -> Result<(), StartError> {
        let Some(queue) = self.registers.get(usize::from(index)) else { return Ok(()) };
        let Some(kick) = self.parts.bells.kick(index) else { return Ok(()) };
        let is_live = self.status & STATUS_DRIVER_OK != 0 && !self.paused;
        if !is_live || !queue.enabled || self.queues.is_running(index) {
            return Ok(());
        }
        let announcer = self.parts.announcer.clone();
        let config = QueueConfig {
            index,
            features: self.features,
            ring: queue.ring(self.features),
            state: Some(queue.position),
            memory: self.parts.memory.clone(),
            kick,
            call: Some(self.call(queue.vector)),
            log: None,
            inflight: None,
            on_error: Some(Box::new(move |_| announcer.broken())),
        };
        // Before the queue: a poller may rely on its doorbell from the first turn to the last.
        self.parts.bells.open(index);
        self.queues.start(config)
    }

    fn stop(&mut self, index: u16) -> Option<RingState> {
        let position = self.queues.stop(index);
        self.parts.bells.close(index);
        position
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.queues.stop_all();
        if let Err(error) = self.device().settle() {
            tracing::error!(%error, "a machine that is started next would not find it");
        }
        self.device().reset();
    }
}

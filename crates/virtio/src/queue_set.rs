//! The queues of one device that run on I/O threads: what every transport does with a device.

use std::sync::Arc;

use reactor::{LogLimit, Mode, PollerHandle, PollerState, Pool};

use crate::call::Call;
use crate::device::{Device, NotReady};
use crate::kick::Kick;
use crate::memory::Quota;
use crate::queue::{ErrorHook, Queue, QueueConfig, QueueHandle};
use crate::ring::{RingError, RingState};
use crate::stats::QueueCounters;
use crate::unkicked::unkicked;

/// Why a queue could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The device has no such queue.
    #[error("queue {index}: the device has {queues}")]
    NoSuchQueue {
        /// The queue asked for.
        index: u16,
        /// How many there are.
        queues: u16,
    },
    /// The ring is larger than the device allows.
    #[error("queue {index} of {size} descriptors: the device allows {max}")]
    TooLarge {
        /// The queue.
        index: u16,
        /// The size asked for.
        size: u16,
        /// The largest allowed.
        max: u16,
    },
    /// It runs already.
    #[error("queue {0} is running")]
    Running(u16),
    /// The ring cannot be opened.
    #[error("queue {index}: {source}")]
    Ring {
        /// The queue.
        index: u16,
        /// What is wrong with the ring.
        source: RingError,
    },
    /// The device lacks something.
    #[error("queue {index}: {source}")]
    NotReady {
        /// The queue.
        index: u16,
        /// What it lacks.
        source: NotReady,
    },
    /// No I/O thread will have it.
    #[error("queue {index}: {source}")]
    Thread {
        /// The queue.
        index: u16,
        /// What the threads said.
        source: reactor::Error,
    },
}

/// A queue in service. The poller goes first: it owns the queue that the handle tells about.
struct Running {
    poller: PollerHandle,
    queue: QueueHandle,
}

/// The queues of one device. Dropping it stops them all.
pub struct QueueSet {
    device: Arc<dyn Device>,
    pool: Arc<Pool>,
    mode: Mode,
    label: String,
    running: Vec<Option<Running>>,
    /// By queue: what it counted in its earlier lives.
    past: Vec<QueueCounters>,
    mappings: Quota,
    /// A driver can break its rings as often as it likes.
    broken: Arc<LogLimit>,
}

impl QueueSet {
    /// A set with no queue running. `label` names the device in logs, statistics and the placement of its queues, and
    /// is unique in `pool`; `mode` is how its queues notice requests.
    #[must_use]
    pub fn new(device: Arc<dyn Device>, pool: Arc<Pool>, mode: Mode, label: impl Into<String>) -> Self {
        let running: Vec<_> = (0..device.queues()).map(|_| None).collect();
        let past = vec![QueueCounters::default(); running.len()];
        Self {
            device,
            pool,
            mode,
            label: label.into(),
            running,
            past,
            mappings: Quota::new(),
            broken: Arc::default(),
        }
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// The device's share of the memory mappings in this process, for a transport that maps what a peer asks for.
    #[must_use]
    pub fn mappings(&self) -> &Quota {
        &self.mappings
    }

    /// Puts a queue into service on the I/O thread of its group.
    ///
    /// # Errors
    /// See [`StartError`]; nothing runs then that did not run before.
    pub fn start(&mut self, mut config: QueueConfig) -> Result<(), StartError> {
        let (index, size) = (config.index, config.ring.size);
        config.on_error = Some(self.on_error(index, config.on_error.take()));
        let no_such_queue = StartError::NoSuchQueue { index, queues: self.device.queues() };
        let place = self.running.get_mut(usize::from(index)).ok_or(no_such_queue)?;
        if place.is_some() {
            return Err(StartError::Running(index));
        }
        let max = self.device.queue_size_max();
        if size > max {
            return Err(StartError::TooLarge { index, size, max });
        }
        let thread = |source| StartError::Thread { index, source };
        let group = format!("{}/{}", self.label, self.device.queue_group(index));
        let kicked = !matches!(config.kick, Kick::Never);
        // Nobody polls for commands.
        let mode = match self.mode {
            Mode::Poll if self.device.is_control_queue(index) => Mode::Hybrid,
            mode => mode,
        };
        let (queue, handle) = Queue::new(config).map_err(|source| StartError::Ring { index, source })?;
        let seat = self.pool.place(&group, mode).map_err(thread)?;
        let mut builder =
            self.device.start_queue(queue).map_err(|source| StartError::NotReady { index, source })?;
        if !kicked && seat.mode() != Mode::Poll {
            builder = unkicked(builder);
        }
        let poller = seat.add(format!("{}#{index}", self.label), builder).map_err(thread)?;
        *place = Some(Running { poller, queue: handle });
        Ok(())
    }

    /// Takes a queue out of service: it takes no new requests, completes those in flight, and is gone when this
    /// returns. Tells where its ring stands; None if the queue did not run.
    pub fn stop(&mut self, index: u16) -> Option<RingState> {
        let Running { poller, queue } = self.running.get_mut(usize::from(index))?.take()?;
        // Dropping the handle waits for the poller to be gone.
        drop(poller);
        self.past[usize::from(index)] += queue.counters();
        queue.stopped_at()
    }

    /// Stops all queues.
    pub fn stop_all(&mut self) {
        for index in 0..self.device.queues() {
            self.stop(index);
        }
    }

    /// Whether a queue is in service.
    #[must_use]
    pub fn is_running(&self, index: u16) -> bool {
        self.get(index).is_some()
    }

    /// Replaces the way a running queue announces completions.
    pub fn set_call(&self, index: u16, call: Option<Arc<dyn Call>>) {
        if let Some(running) = self.get(index) {
            running.queue.set_call(call);
        }
    }

    /// Kicks a running queue.
    pub fn wake(&self, index: u16) {
        if let Some(running) = self.get(index) {
            running.poller.wake();
        }
    }

    /// The mode a running queue is in, which is not the one asked for where polling is not to be had.
    #[must_use]
    pub fn mode(&self, index: u16) -> Option<Mode> {
        Some(self.get(index)?.poller.mode())
    }

    /// What broke a running queue, if something did.
    #[must_use]
    pub fn error(&self, index: u16) -> Option<RingError> {
        self.get(index)?.queue.error()
    }

    /// Whether the device's code for a queue has failed and serves it no more.
    #[must_use]
    pub fn has_failed(&self, index: u16) -> bool {
        self.get(index).is_some_and(|running| running.poller.state() == PollerState::Failed)
    }

    /// A running queue's counters.
    #[must_use]
    pub fn counters(&self, index: u16) -> Option<QueueCounters> {
        Some(self.get(index)?.queue.counters())
    }

    /// What a queue has counted in all its lives, the present one included; None if there is no such queue.
    #[must_use]
    pub fn lifetime_counters(&self, index: u16) -> Option<QueueCounters> {
        let mut counters = *self.past.get(usize::from(index))?;
        counters += self.counters(index).unwrap_or_default();
        Some(counters)
    }

    /// What becomes of a ring that breaks: it is logged, and the transport is told.
    fn on_error(&self, queue: u16, hook: Option<ErrorHook>) -> ErrorHook {
        let (device, limit) = (self.label.clone(), self.broken.clone());
        Box::new(move |error| {
            if limit.admits() {
                tracing::warn!(device, queue, %error, "queue stopped");
            }
            if let Some(hook) = hook {
                hook(error);
            }
        })
    }

    fn get(&self, index: u16) -> Option<&Running> {
        self.running.get(usize::from(index))?.as_ref()
    }
}

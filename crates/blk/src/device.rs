//! The virtio-blk device: what the driver sees of a disk, and what its queues share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use virtio::{ConfigError, ConfigListener, Device, NotReady, NotSettled, PollerBuilder, Queue, StateError};

use crate::backend::{Backend, BackendError, Geometry};
use crate::config::{self, WRITEBACK_OFFSET};
use crate::rate::{Limiter, RateLimit};
use crate::request::{Disk, SECTOR_BYTES, SERIAL_BYTES};
use crate::stats::{Counters, Stats};
use crate::worker::Worker;

/// The virtio device ID of a block device (virtio 1.2, section 5).
const DEVICE_ID: u32 = 2;
/// The most queues: more than one per CPU of the largest guests serves nobody.
const QUEUES_MAX: u16 = 256;
/// Version of the saved state's layout.
const STATE_VERSION: u8 = 1;
/// Version, writeback, 2 reserved bytes, logical block size, capacity in sectors.
const STATE_BYTES: usize = 16;

/// How a disk is presented.
#[derive(Clone, Debug)]
pub struct Options {
    /// Request queues, 1 to 256.
    pub queues: u16,
    /// The largest ring a queue may have, 4 to 32768, a power of two.
    pub queue_size_max: u16,
    /// What the disk calls itself: up to 20 ASCII characters.
    pub serial: String,
    /// The block size the driver is told to use: 512 to 4096 bytes, a power of two; None is the storage's. Requests are
    /// in units of 512 bytes all the same.
    pub logical_block_bytes: Option<u32>,
    /// Refuse writes even where the storage would take them.
    pub read_only: bool,
    /// The most that all queues together may do.
    pub rate: RateLimit,
}

impl Default for Options {
    /// One queue of up to 1024 descriptors, no serial, blocks as the storage has them, no limit.
    fn default() -> Self {
        Self {
            queues: 1,
            queue_size_max: 1024,
            serial: String::new(),
            logical_block_bytes: None,
            read_only: false,
            rate: RateLimit::NONE,
        }
    }
}

/// The capacity in sectors of storage that is used in whole blocks.
fn whole_blocks(bytes: u64, block_bytes: u32) -> u64 {
    let beyond = bytes % u64::from(block_bytes);
    if beyond > 0 {
        tracing::warn!(
            bytes,
            block_bytes,
            beyond,
            "no whole blocks: the guest does not see what is beyond the last one"
        );
    }
    (bytes - beyond) / SECTOR_BYTES
}

/// A disk cannot be presented like that.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// Too few or too many queues.
    #[error("{0} queues: a disk has 1 to {QUEUES_MAX}")]
    Queues(u16),
    /// An impossible ring size.
    #[error("rings of up to {0} descriptors: the size must be a power of two from 4 to 32768")]
    QueueSize(u16),
    /// A serial that does not fit the answer.
    #[error("serial {0:?}: it may have up to {SERIAL_BYTES} printable ASCII characters")]
    Serial(String),
    /// An impossible block size.
    #[error("logical blocks of {0} bytes: the size must be 512, 1024, 2048 or 4096")]
    BlockBytes(u32),
    /// The storage has not one block.
    #[error("a disk of {0} bytes: it must have at least one block, of {1} bytes")]
    Small(u64, u32),
}

/// A disk was not resized, or its size is not durable.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// It would be smaller.
    #[error("going from {from} to {to} bytes would destroy the last {} bytes and what is in them", from - to)]
    Loses {
        /// Bytes that there are.
        from: u64,
        /// Bytes that were asked for.
        to: u64,
    },
    /// The storage says no.
    #[error(transparent)]
    Storage(#[from] BackendError),
}

/// The whole sectors in `bytes`, in bytes.
fn whole_sectors(bytes: u64) -> u64 {
    bytes - bytes % SECTOR_BYTES
}

/// What the queues' workers share. Everything that changes is one atomic value.
pub(crate) struct Shared {
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) serial: [u8; SERIAL_BYTES],
    pub(crate) limiter: Limiter,
    sectors: AtomicU64,
    /// The geometry but for the size, as the driver is to see it.
    geometry: Geometry,
    writeback: AtomicBool,
    /// The driver has chosen `writeback` since the last reset.
    writeback_chosen: AtomicBool,
}

impl Shared {
    /// What requests are checked against, now.
    #[inline(always)]
    pub(crate) fn disk(&self) -> Disk {
        Disk { sectors: self.sectors.load(Ordering::Relaxed), geometry: self.geometry }
    }

    /// Whether completed writes may be volatile, if the driver may choose. A write that was done before this is asked, and
    /// finds them allowed to, is covered by the flush of a switch to write-through that comes then.
    #[inline(always)]
    pub(crate) fn writeback(&self) -> bool {
        self.writeback.load(Ordering::SeqCst)
    }

    /// Keeps the driver's choice.
    fn choose(&self, writeback: bool) {
        self.writeback_chosen.store(true, Ordering::Relaxed);
        self.writeback.store(writeback, Ordering::SeqCst);
    }

    /// Section 5.2.5.2: a driver that could choose the cache mode but knows no flush gets write-through.
    pub(crate) fn default_to_write_through(&self) {
        if !self.writeback_chosen.load(Ordering::Relaxed) {
            self.writeback.store(false, Ordering::Relaxed);
        }
    }
}

/// A virtio-blk device on any [`Backend`].
pub struct Blk {
    shared: Arc<Shared>,
    options: Options,
    features: u64,
    stats: Box<[Arc<Stats>]>,
    listener: Mutex<Option<ConfigListener>>,
    /// Held by the one that changes the size.
    resizing: Mutex<()>,
}

impl Blk {
    /// Presents `backend` as `options` say.
    ///
    /// # Errors
    /// An option is out of its range.
    pub fn new(backend: Arc<dyn Backend>, options: Options) -> Result<Self, OptionsError> {
        let Options { queues, queue_size_max, ref serial, .. } = options;
        let mut geometry = backend.geometry();
        let logical_block_bytes = options.logical_block_bytes.unwrap_or(geometry.logical_block_bytes);
        if queues == 0 || queues > QUEUES_MAX {
            return Err(OptionsError::Queues(queues));
        }
        if !(4..=32768).contains(&queue_size_max) || !queue_size_max.is_power_of_two() {
            return Err(OptionsError::QueueSize(queue_size_max));
        }
        if serial.len() > SERIAL_BYTES || !serial.bytes().all(|b| b == b' ' || b.is_ascii_graphic()) {
            return Err(OptionsError::Serial(serial.clone()));
        }
        if !(512..=4096).contains(&logical_block_bytes) || !logical_block_bytes.is_power_of_two() {
            return Err(OptionsError::BlockBytes(logical_block_bytes));
        }
        let sectors = whole_blocks(geometry.bytes, logical_block_bytes);
        if sectors == 0 {
            return Err(OptionsError::Small(geometry.bytes, logical_block_bytes));
        }
        let features = config::offered(&geometry, &options);
        geometry.read_only = config::read_only(&geometry, &options);
        geometry.logical_block_bytes = logical_block_bytes;
        let mut padded = [0; SERIAL_BYTES];
        padded[..serial.len()].copy_from_slice(serial.as_bytes());
        let shared = Shared {
            backend,
            serial: padded,
            limiter: Limiter::new(options.rate),
            sectors: AtomicU64::new(sectors),
            geometry,
            writeback: AtomicBool::new(true),
            writeback_chosen: AtomicBool::new(false),
        };
        Ok(Self {
            shared: Arc::new(shared),
            features,
            stats: (0..queues).map(|_| Arc::default()).collect(),
            options,
            listener: Mutex::new(None),
            resizing: Mutex::new(()),
        })
    }

    /// How many descriptors of this process each running queue takes for the storage and the disk.
    #[must_use]
    pub fn queue_descriptors(&self) -> u32 {
        // And one to hear of new limits.
        self.shared.backend.channel_descriptors() + 1
    }

    /// Resizes the storage to `bytes`, or takes over the size it was given from outside (None), and tells the driver.
    /// Returns the new capacity in bytes, which is durable. A smaller size destroys what is cut off; [`Blk::grow`] does
    /// not.
    ///
    /// # Errors
    /// The size is less than one block, the storage cannot have it, or it is not durable.
    pub fn resize(&self, bytes: Option<u64>) -> Result<u64, BackendError> {
        let _alone = self.resizing.lock().unwrap_or_else(PoisonError::into_inner);
        self.resize_alone(bytes)
    }

    /// The same, unless anything would be lost.
    ///
    /// # Errors
    /// As for [`Blk::resize`], and [`ResizeError::Loses`], with nothing changed.
    pub fn grow(&self, bytes: u64) -> Result<u64, ResizeError> {
        let _alone = self.resizing.lock().unwrap_or_else(PoisonError::into_inner);
        let (from, to) = (self.shared.backend.bytes_now()?.max(self.bytes()), whole_sectors(bytes));
        self.check_size(to)?;
        if to < from {
            return Err(ResizeError::Loses { from, to });
        }
        Ok(self.resize_alone(Some(to))?)
    }

    fn check_size(&self, bytes: u64) -> Result<(), BackendError> {
        let block_bytes = self.logical_block_bytes();
        if bytes < block_bytes.into() {
            return Err(BackendError(format!(
                "a size of {bytes} bytes is less than one block, which has {block_bytes}"
            )));
        }
        Ok(())
    }

    fn resize_alone(&self, bytes: Option<u64>) -> Result<u64, BackendError> {
        bytes.map_or(Ok(()), |bytes| self.check_size(whole_sectors(bytes)))?;
        let resized = self.shared.backend.resize(bytes);
        // Also of a resize that failed half-way.
        let sectors = whole_blocks(self.shared.backend.geometry().bytes, self.logical_block_bytes());
        let before = self.shared.sectors.swap(sectors, Ordering::Relaxed);
        if before != sectors {
            tracing::info!(before, sectors, "disk resized");
            let listener = self.listener.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if let Some(listener) = listener {
                listener();
            }
        }
        resized.map(|_| sectors * SECTOR_BYTES)
    }

    /// The capacity in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.shared.sectors.load(Ordering::Relaxed) * SECTOR_BYTES
    }

    /// The block size the driver is told to use, in bytes.
    #[must_use]
    pub fn logical_block_bytes(&self) -> u32 {
        self.shared.geometry.logical_block_bytes
    }

    /// Replaces the limit on what all queues together may do. A queue that pauses for the old one goes on at once.
    pub fn set_rate_limit(&self, limit: RateLimit) {
        self.shared.limiter.set(limit);
    }

    /// Makes durable what was written while that was the driver's to ask for, as it will not ask any more. If that fails,
    /// all is as it was before: a driver that still has to ask is told.
    fn end_writeback(&self) -> Result<(), BackendError> {
        let chosen = self.shared.writeback_chosen.load(Ordering::Relaxed);
        // Before the flush: what is answered as volatile after it would never be flushed.
        self.shared.choose(false);
        self.shared.backend.flush().inspect_err(|_| {
            self.shared.choose(true);
            self.shared.writeback_chosen.store(chosen, Ordering::Relaxed);
        })
    }

    /// What each queue has done.
    #[must_use]
    pub fn queue_counters(&self) -> Vec<Counters> {
        self.stats.iter().map(|stats| stats.read()).collect()
    }

    /// What all queues have done.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let mut sum = Counters::default();
        self.stats.iter().for_each(|stats| sum += stats.read());
        sum
    }
}

impl Device for Blk {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queues(&self) -> u16 {
        self.options.queues
    }

    fn queue_size_max(&self) -> u16 {
        self.options.queue_size_max
    }

    fn config(&self) -> Vec<u8> {
        let Disk { sectors, geometry } = self.shared.disk();
        config::space(&geometry, &self.options, sectors, self.shared.writeback()).to_vec()
    }

    fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), ConfigError> {
        match (offset, data) {
            (WRITEBACK_OFFSET, &[writeback]) if self.features & config::features::CONFIG_WCE != 0 => {
                if writeback == 0 && self.shared.writeback() {
                    let failed = |error| ConfigError::Failed(format!("the cache stays write-back: {error}"));
                    return self.end_writeback().map_err(failed);
                }
                self.shared.choose(writeback != 0);
                Ok(())
            }
            _ => Err(ConfigError::NotWritable { offset, len: data.len() }),
        }
    }

    fn set_config_listener(&self, listener: Option<ConfigListener>) {
        *self.listener.lock().unwrap_or_else(PoisonError::into_inner) = listener;
    }

    fn start_queue(&self, queue: Queue) -> Result<PollerBuilder, NotReady> {
        let channel = self.shared.backend.channel(queue.memory(), queue.size());
        let channel = channel.map_err(|error| NotReady(error.to_string()))?;
        let bell = self.shared.limiter.bell();
        let bell = bell.map_err(|error| NotReady(format!("making an eventfd for new limits: {error}")))?;
        let shared = self.shared.clone();
        let offered = self.features;
        // A transport starts no queue that the device does not have; if one did, its figures would go nowhere.
        let stats = self.stats.get(usize::from(queue.index())).cloned().unwrap_or_default();
        Ok(Box::new(move || Box::new(Worker::new(queue, channel, shared, bell, offered, stats))))
    }

    fn reset(&self) {
        self.shared.writeback.store(true, Ordering::Relaxed);
        self.shared.writeback_chosen.store(false, Ordering::Relaxed);
    }

    /// A driver that switched to write-through sends no flushes, and this instance was not told: it takes that for
    /// granted.
    fn take_over(&self) {
        if self.features & config::features::CONFIG_WCE != 0 && self.shared.writeback() {
            tracing::info!("writing through: the driver may have told an earlier service to");
            self.shared.choose(false);
        }
    }

    fn settle(&self) -> Result<(), NotSettled> {
        self.shared.backend.settle().map_err(|error| NotSettled(error.to_string()))
    }

    fn save(&self) -> Vec<u8> {
        let mut state = vec![STATE_VERSION, u8::from(self.shared.writeback()), 0, 0];
        state.extend(self.logical_block_bytes().to_le_bytes());
        state.extend(self.shared.disk().sectors.to_le_bytes());
        state
    }

    fn restore(&self, state: &[u8]) -> Result<(), StateError> {
        if state.is_empty() {
            return Ok(());
        }
        if state.len() != STATE_BYTES || state[0] != STATE_VERSION || state[1] > 1 {
            return Err(StateError(format!(
                "{} bytes, version {}: expected {STATE_BYTES} bytes of version {STATE_VERSION}",
                state.len(),
                state[0]
            )));
        }
        let (block, sectors) = state[4..].split_at(4);
        let mine = self.save();
        if state[4..] != mine[4..] {
            let le = |bytes: &[u8]| bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte));
            return Err(StateError(format!(
                "the disk had {} sectors and blocks of {} bytes, and has {} and {}; it must be the same one",
                le(sectors),
                le(block),
                self.shared.disk().sectors,
                self.logical_block_bytes()
            )));
        }
        self.shared.choose(state[1] != 0);
        Ok(())
    }
}

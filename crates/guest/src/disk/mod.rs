//! virtio-blk, driver side (virtio 1.2, section 5.2).

mod queue;

use alloc::vec::Vec;

use virtio::features::{EVENT_IDX, INDIRECT_DESC, RING_PACKED};
use virtio::memory::MemoryError;
use virtio::{RingError, RingFormat};

use queue::Layout;
pub use queue::{DiskQueue, Operation};

use crate::machine::clock::Clock;
use crate::machine::{Machine, apic};
use crate::options::{KickMode, Options, SECTOR_BYTES};
use crate::pci::Function;
use crate::virtio_pci::{self, RingFeatures, Transport, TransportError};

const DEVICE_ID: u16 = 2;
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;
const F_MQ: u64 = 1 << 12;
const CONFIG_CAPACITY: usize = 0;
const CONFIG_SEG_MAX: usize = 12;
const CONFIG_NUM_QUEUES: usize = 34;

/// Larger queues are not asked for.
const RING_SIZE_MAX: u16 = 1024;
/// Data of a request are in at most so many pieces.
const PIECES_MAX: usize = 4;

/// Why a disk cannot be used.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are the values named in each message")]
pub enum DiskError {
    /// The device does not work.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// No capacity, or no configuration space.
    #[error("the disk holds {have} bytes, the job needs {need}")]
    TooSmall { have: u64, need: u64 },
    /// More jobs than queues.
    #[error("{jobs} jobs need a queue each, the disk has {queues}")]
    TooFewQueues { jobs: u16, queues: u16 },
    /// The ring is too small for the depth.
    #[error(
        "{depth} requests in flight need {need} descriptors, the queue has {size}; indirect=1 needs one each"
    )]
    TooDeep { depth: u16, need: u32, size: u16 },
    /// The job writes.
    #[error("the disk is read-only")]
    ReadOnly,
    /// Interrupts are asked for and cannot be had.
    #[error("no interrupt for queue {0}")]
    NoInterrupt(u16),
    /// Not mapped.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Nothing comes back any more.
    #[error("queue {queue}: {in_flight} requests are in flight and none came back for {seconds} s")]
    Stuck { queue: u16, in_flight: usize, seconds: u64 },
    /// Requests come back, interrupts do not.
    #[error(
        "queue {queue}: {lost} interrupts were lost, each for a request that had come back {ms} ms before"
    )]
    LostInterrupts { queue: u16, lost: u64, ms: u64 },
    /// The device broke the ring.
    #[error("queue {queue}: {source}")]
    Ring { queue: u16, source: RingError },
}

/// A disk, reset, its configuration read.
pub struct Disk {
    transport: Transport,
    offered: u64,
    sectors: u64,
    queues: u16,
    pieces_max: usize,
}

/// The disks of this machine, in the order of the bus.
#[must_use]
pub fn find() -> Vec<Function> {
    virtio_pci::find(DEVICE_ID)
}

impl Disk {
    /// Resets the device and reads what it is.
    ///
    /// # Errors
    /// It is no virtio device of today, or has no configuration.
    pub fn new(function: Function, clock: Clock) -> Result<Self, DiskError> {
        let transport = Transport::new(function, clock)?;
        let offered = transport.offered();
        let config = transport.device.ok_or(DiskError::TooSmall { have: 0, need: SECTOR_BYTES.into() })?;
        let low = config.read32(CONFIG_CAPACITY);
        let sectors = u64::from(low) | u64::from(config.read32(CONFIG_CAPACITY + 4)) << 32;
        let queues = if offered & F_MQ != 0 { config.read16(CONFIG_NUM_QUEUES) } else { 1 };
        let pieces_max = if offered & F_SEG_MAX != 0 { config.read32(CONFIG_SEG_MAX).max(1) } else { 1 };
        let pieces_max = (pieces_max as usize).min(PIECES_MAX);
        Ok(Self { transport, offered, sectors, queues, pieces_max })
    }

    /// How many blocks of `bytes` there are.
    #[must_use]
    pub fn blocks(&self, bytes: u32) -> u64 {
        self.sectors / u64::from(bytes / SECTOR_BYTES)
    }

    /// How many queues it has.
    #[must_use]
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// Whether rings in this format can be had.
    #[must_use]
    pub fn can(&self, format: RingFormat) -> bool {
        format == RingFormat::Split || self.offered & RING_PACKED != 0
    }

    /// Sets up a queue for each job, queue `i` interrupting processor `i`, and starts the device.
    ///
    /// # Errors
    /// The disk or the machine does not have what `options` ask for.
    pub fn open(&self, machine: &Machine, options: &Options) -> Result<Vec<DiskQueue>, DiskError> {
        let need = u64::from(options.block_bytes) * u64::from(options.jobs);
        let have = self.sectors.saturating_mul(SECTOR_BYTES.into());
        if have < need {
            return Err(DiskError::TooSmall { have, need });
        }
        if options.jobs > self.queues {
            return Err(DiskError::TooFewQueues { jobs: options.jobs, queues: self.queues });
        }
        if self.offered & F_RO != 0 && (options.access.write || options.verify) {
            return Err(DiskError::ReadOnly);
        }

        let offers = |feature| self.offered & feature != 0;
        let features = RingFeatures {
            format: options.format,
            event_idx: options.event_idx.unwrap_or(offers(EVENT_IDX)),
            indirect: options.indirect.unwrap_or(offers(INDIRECT_DESC)),
        };
        let mut needed = self.offered & (F_RO | F_FLUSH | F_MQ | F_SEG_MAX);
        needed |= if features.format == RingFormat::Packed { RING_PACKED } else { 0 };
        needed |= if features.event_idx { EVENT_IDX } else { 0 };
        needed |= if features.indirect { INDIRECT_DESC } else { 0 };
        self.transport.reset()?;
        self.transport.negotiate(needed)?;

        let queues = (0..options.jobs).map(|index| self.queue(machine, options, features, index));
        let queues = queues.collect::<Result<Vec<_>, _>>()?;
        self.transport.start();
        Ok(queues)
    }

    fn queue(
        &self,
        machine: &Machine,
        options: &Options,
        features: RingFeatures,
        index: u16,
    ) -> Result<DiskQueue, DiskError> {
        let processor = machine.processors.id(index.into()).ok_or(DiskError::NoInterrupt(index))?;
        let interrupt = options.interrupts.then(|| machine.interrupt(index.into())).transpose()?;
        let message = interrupt.as_ref().map(|interrupt| apic::message(processor, interrupt.vector()));
        let queue = self.transport.queue(&machine.memory, index, RING_SIZE_MAX, features, message)?;

        // A chain is a header, the data's pieces, and a status.
        let (depth, size) = (options.depth, queue.size);
        let direct_pieces = usize::from(size / depth).saturating_sub(2);
        let indirect = features.indirect && (options.indirect == Some(true) || direct_pieces == 0);
        let pieces_max = if indirect { self.pieces_max } else { self.pieces_max.min(direct_pieces) };
        if pieces_max == 0 || depth > size {
            return Err(DiskError::TooDeep { depth, need: 3 * u32::from(depth), size });
        }
        let layout = Layout {
            depth,
            block_bytes: options.block_bytes,
            indirect,
            pieces_max,
            flushes: self.offered & F_FLUSH != 0,
            always_kick: options.kick == KickMode::Always,
        };
        Ok(DiskQueue::new(machine, queue, interrupt, layout)?)
    }

    /// Stops the device, whose queues are no longer used.
    ///
    /// # Errors
    /// It does not stop.
    pub fn close(&self) -> Result<(), DiskError> {
        Ok(self.transport.reset()?)
    }
}

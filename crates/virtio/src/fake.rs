//! A guest for tests: memory, a ring in it, and the driver's end of that ring.
//!
//! It is the real driver end over real shared memory; only the virtual machine around it is missing. A device under
//! test gets a [`Queue`] from [`FakeDriver::queue`] and cannot tell the difference.

use std::sync::Arc;

use reactor::{Budget, Poller, Ticks};

use crate::features;
use crate::kick::Kick;
use crate::memory::{Area, GuestAddr, Mapping, Memory, Region, Segment, Translator, gather, scatter};
use crate::queue::{Queue, QueueConfig, QueueHandle};
use crate::ring::{Buffer, Completion, DriverRing, RingConfig, RingFormat};

/// What the fake guest looks like.
#[derive(Clone, Copy, Debug)]
pub struct FakeOptions {
    /// The ring's layout.
    pub format: RingFormat,
    /// Descriptors in the ring.
    pub size: u16,
    /// Negotiate `VIRTIO_F_EVENT_IDX`.
    pub event_idx: bool,
    /// Negotiate `VIRTIO_F_IN_ORDER`.
    pub in_order: bool,
    /// Bytes of guest memory, split evenly over `regions` adjacent regions.
    pub memory_bytes: u64,
    /// How many regions.
    pub regions: u64,
    /// Features of the device type to negotiate as well.
    pub device_features: u64,
}

impl Default for FakeOptions {
    fn default() -> Self {
        Self {
            format: RingFormat::Split,
            size: 64,
            event_idx: false,
            in_order: false,
            memory_bytes: 16 << 20,
            regions: 1,
            device_features: 0,
        }
    }
}

/// Guest-physical address of the first byte of a fake guest's memory.
pub const MEMORY_START: u64 = 0x1_0000;

/// A guest with one queue, and its driver.
pub struct FakeDriver {
    memory: Arc<Memory>,
    config: RingConfig,
    options: FakeOptions,
    /// The driver end of the ring.
    pub ring: DriverRing,
    next_free: u64,
}

impl FakeDriver {
    /// Makes the guest.
    ///
    /// # Panics
    /// The options are impossible, or the system refuses memory. This is test code: a failure is the test's.
    #[must_use]
    pub fn new(options: FakeOptions) -> Self {
        let bytes = options.memory_bytes / options.regions;
        let regions = (0..options.regions).map(|i| {
            let (mapping, _file) = Mapping::anonymous("fake-guest", bytes).expect("memory for a fake guest");
            Region::new(GuestAddr(MEMORY_START + i * bytes), Arc::new(mapping)).expect("a valid region")
        });
        let memory = Memory::new(regions.collect()).expect("disjoint regions");
        Self::in_memory(options, memory)
    }

    /// Makes the guest in memory that is there, as `options` say.
    ///
    /// # Panics
    /// The options are impossible. This is test code: a failure is the test's.
    #[must_use]
    pub fn in_memory(options: FakeOptions, memory: Memory) -> Self {
        let memory = Arc::new(memory);
        let [desc, driver, _] = DriverRing::layout(options.format, options.size);
        let config = RingConfig {
            format: options.format,
            size: options.size,
            desc: GuestAddr(MEMORY_START),
            driver: GuestAddr(MEMORY_START + desc as u64),
            device: GuestAddr(MEMORY_START + (desc + driver) as u64),
            event_idx: options.event_idx,
            indirect: true,
            in_order: options.in_order,
        };
        let ring = DriverRing::new(&config, &memory).expect("a ring in the fake guest's memory");
        let ring_bytes: usize = DriverRing::layout(options.format, options.size).iter().sum();
        Self {
            memory,
            config,
            options,
            ring,
            next_free: MEMORY_START + ring_bytes.next_multiple_of(4096) as u64,
        }
    }

    /// The guest's memory.
    #[must_use]
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Where the ring is.
    #[must_use]
    pub fn ring_config(&self) -> RingConfig {
        self.config
    }

    /// What starting queue 0 takes, without kick, call, log and inflight record.
    #[must_use]
    pub fn queue_config(&self) -> QueueConfig {
        let bit = |on, bit| if on { bit } else { 0 };
        QueueConfig {
            index: 0,
            features: features::VERSION_1
                | features::INDIRECT_DESC
                | bit(self.options.event_idx, features::EVENT_IDX)
                | bit(self.options.in_order, features::IN_ORDER)
                | bit(self.options.format == RingFormat::Packed, features::RING_PACKED)
                | self.options.device_features,
            ring: self.config,
            state: None,
            memory: self.memory.clone(),
            kick: Kick::Wake,
            call: None,
            log: None,
            inflight: None,
            on_error: None,
        }
    }

    /// Queue 0, for a device to serve.
    ///
    /// # Panics
    /// The ring cannot be opened.
    #[must_use]
    pub fn queue(&self) -> (Queue, QueueHandle) {
        Queue::new(self.queue_config()).expect("the fake guest's ring is sound")
    }

    /// Sets `len` bytes of guest memory aside, at a multiple of 16 bytes.
    ///
    /// # Panics
    /// The guest has no memory left.
    pub fn alloc(&mut self, len: usize) -> GuestAddr {
        let at = self.next_free;
        self.next_free += len.next_multiple_of(16) as u64;
        assert!(
            self.next_free <= MEMORY_START + self.options.memory_bytes,
            "the fake guest is out of memory"
        );
        GuestAddr(at)
    }

    /// Writes guest memory.
    pub fn write(&self, addr: GuestAddr, data: &[u8]) {
        assert_eq!(scatter(&self.segments(addr, data.len()), 0, data), data.len());
    }

    /// Reads guest memory.
    #[must_use]
    pub fn read(&self, addr: GuestAddr, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        assert_eq!(gather(&self.segments(addr, len), 0, &mut data), len);
        data
    }

    /// A readable buffer that holds `data`.
    pub fn readable(&mut self, data: &[u8]) -> Buffer {
        let addr = self.alloc(data.len());
        self.write(addr, data);
        Buffer { addr, len: data.len() as u32, writable: false }
    }

    /// A writable buffer of `len` bytes.
    pub fn writable(&mut self, len: usize) -> Buffer {
        Buffer { addr: self.alloc(len), len: len as u32, writable: true }
    }

    /// Offers one chain; `indirect` puts its descriptors in a table of their own.
    ///
    /// # Panics
    /// The ring is full.
    pub fn offer(&mut self, buffers: &[Buffer], indirect: bool) -> u16 {
        let id = if indirect {
            let addr = self.alloc(buffers.len() * 16);
            let table = self.area(addr, buffers.len() * 16);
            self.ring.add_indirect(&table, addr, buffers)
        } else {
            self.ring.add(buffers)
        };
        self.ring.publish();
        id.expect("room in the fake driver's ring")
    }

    /// Polls the device until `count` chains came back, and returns them in order.
    ///
    /// # Panics
    /// They do not come back within many more turns than they could need, or what comes back is not in flight.
    pub fn run(&mut self, poller: &mut dyn Poller, count: usize) -> Vec<Completion> {
        let mut done = Vec::new();
        let mut now = Ticks(1);
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(120);
        while done.len() < count {
            poller.poll(now, Budget { requests: 32, bytes: 1 << 20 });
            now = now.plus_ns(1000);
            while let Some(completion) = self.ring.reap().expect("a used entry for a chain in flight") {
                done.push(completion);
            }
            assert!(std::time::Instant::now() < deadline, "only {} of {count} chains came back", done.len());
        }
        done
    }

    /// A window into guest memory for words the test wants to see or spoil.
    ///
    /// # Panics
    /// The range is not in guest memory.
    #[must_use]
    pub fn area(&self, addr: GuestAddr, len: usize) -> Area {
        self.memory.area(addr, len, 1).expect("a range in the fake guest's memory")
    }

    fn segments(&self, addr: GuestAddr, len: usize) -> Vec<Segment> {
        let mut segments = Vec::new();
        Translator::new(self.memory.clone())
            .translate(addr, len as u32, |segment| segments.push(segment))
            .expect("a range in the fake guest's memory");
        segments
    }
}

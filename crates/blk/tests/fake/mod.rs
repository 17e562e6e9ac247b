//! A driver for a whole disk: rings, memory and the poller of one queue, turned by the test's own thread.
#![allow(dead_code, unreachable_pub, reason = "each test uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a test that cannot set up is over")]

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use blk::{Backend, Blk, Options};
use qcow2::create::{NewImage, create};
use qcow2::header::Compression;
use qcow2::layout::Layout;
use reactor::{Budget, Poller, Ticks, Work};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use virtio::fake::{FakeDriver, FakeOptions, MEMORY_START};
use virtio::memory::{Area, GuestAddr};
use virtio::ring::Buffer;
use virtio::{Device, Queue, QueueConfig, QueueHandle, RingFormat};

/// A small generator of test data; the sequence is the same in every run.
pub struct Random(pub u64);

impl Random {
    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

pub const BUDGET: Budget = Budget { requests: 256, bytes: 1 << 30 };
pub const MEMORY_BYTES: u64 = 64 << 20;
/// The limit for what must happen at once on a machine with nothing else to do.
const PATIENCE: Duration = Duration::from_secs(120);
/// Behind the ring.
const FREE_FROM: u64 = MEMORY_START + (1 << 20);

pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;
pub const SECURE_ERASE: u32 = 14;

pub const OK: u8 = 0;
pub const IO_ERROR: u8 = 1;
pub const UNSUPPORTED: u8 = 2;

/// What the ring is like.
#[derive(Clone, Copy, Debug)]
pub struct Ring {
    pub format: RingFormat,
    pub size: u16,
    pub indirect: bool,
    pub event_idx: bool,
    pub in_order: bool,
}

impl Ring {
    pub const SPLIT: Self =
        Self { format: RingFormat::Split, size: 256, indirect: false, event_idx: false, in_order: false };
    pub const PACKED: Self = Self { format: RingFormat::Packed, ..Self::SPLIT };

    /// Both formats with every combination of ring features.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..16).map(|bits| Self {
            format: if bits & 1 == 0 { RingFormat::Split } else { RingFormat::Packed },
            size: 128,
            indirect: bits & 2 != 0,
            event_idx: bits & 4 != 0,
            in_order: bits & 8 != 0,
        })
    }
}

/// A request on its way, for [`Rig::wait`].
#[derive(Debug)]
pub struct Sent {
    pub id: u16,
    writable: Vec<(u64, usize)>,
}

/// What came back.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    pub written: u32,
    /// All writable bytes; the last one is the status.
    pub bytes: Vec<u8>,
}

impl Answer {
    pub fn status(&self) -> u8 {
        *self.bytes.last().unwrap()
    }

    pub fn data(&self) -> &[u8] {
        &self.bytes[..self.bytes.len() - 1]
    }
}

pub struct Rig {
    pub disk: Arc<Blk>,
    pub poller: Box<dyn Poller>,
    pub handle: QueueHandle,
    pub guest: FakeDriver,
    pub now: Ticks,
    pub last: Work,
    ram: Area,
    ring: Ring,
    next: u64,
    back: Vec<(u16, u32)>,
}

impl Rig {
    pub fn new(backend: Arc<dyn Backend>, ring: Ring) -> Self {
        Self::with(Arc::new(Blk::new(backend, Options::default()).unwrap()), ring, u64::MAX, 0)
    }

    pub fn with(disk: Arc<Blk>, ring: Ring, features: u64, index: u16) -> Self {
        Self::in_guest(disk, ring, features, index, FakeDriver::new)
    }

    /// In a guest of one's own making.
    pub fn in_guest(
        disk: Arc<Blk>,
        ring: Ring,
        features: u64,
        index: u16,
        guest: impl FnOnce(FakeOptions) -> FakeDriver,
    ) -> Self {
        let guest = guest(FakeOptions {
            format: ring.format,
            size: ring.size,
            event_idx: ring.event_idx,
            in_order: ring.in_order,
            memory_bytes: MEMORY_BYTES,
            device_features: features & disk.features(),
            ..FakeOptions::default()
        });
        let (queue, handle) = Queue::new(QueueConfig { index, ..guest.queue_config() }).unwrap();
        let mut poller = disk.start_queue(queue).unwrap()();
        poller.disarm();
        Self {
            poller,
            handle,
            now: Ticks(1_000_000_000),
            last: Work::NONE,
            ram: guest.area(GuestAddr(MEMORY_START), MEMORY_BYTES as usize),
            guest,
            ring,
            next: FREE_FROM,
            back: Vec::new(),
            disk,
        }
    }

    pub fn poke(&self, at: u64, bytes: &[u8]) {
        for (i, &byte) in bytes.iter().enumerate() {
            self.ram.u8((at - MEMORY_START) as usize + i).store(byte, Ordering::Relaxed);
        }
    }

    pub fn peek(&self, at: u64, len: usize) -> Vec<u8> {
        (0..len).map(|i| self.ram.u8((at - MEMORY_START) as usize + i).load(Ordering::Relaxed)).collect()
    }

    /// Guest memory for `len` bytes at an address that is `misaligned` bytes behind a multiple of 4096.
    pub fn alloc(&mut self, len: usize, misaligned: u64) -> u64 {
        let at = self.next.next_multiple_of(4096) + misaligned;
        let end = at + len as u64;
        if end > MEMORY_START + MEMORY_BYTES {
            // Enough for what any one test has in flight.
            self.next = FREE_FROM;
            return self.alloc(len, misaligned);
        }
        self.next = end;
        at
    }

    /// Publishes a chain of the given readable bytes and writable lengths; None if the ring is full.
    pub fn try_send(&mut self, readable: &[&[u8]], writable: &[usize], misaligned: u64) -> Option<Sent> {
        let mut buffers = Vec::new();
        for bytes in readable {
            let at = self.alloc(bytes.len(), misaligned);
            self.poke(at, bytes);
            buffers.push(Buffer { addr: GuestAddr(at), len: bytes.len() as u32, writable: false });
        }
        let mut areas = Vec::new();
        for &len in writable {
            let at = self.alloc(len, misaligned);
            self.poke(at, &vec![0xEE; len.min(1 << 20)]);
            buffers.push(Buffer { addr: GuestAddr(at), len: len as u32, writable: true });
            areas.push((at, len));
        }
        let id = if self.ring.indirect {
            let bytes = 16 * buffers.len();
            let table = self.alloc(bytes, 0);
            let area = self.guest.area(GuestAddr(table), bytes);
            self.guest.ring.add_indirect(&area, GuestAddr(table), &buffers)
        } else {
            self.guest.ring.add(&buffers)
        }?;
        self.guest.ring.publish();
        Some(Sent { id, writable: areas })
    }

    pub fn send(&mut self, readable: &[&[u8]], writable: &[usize]) -> Sent {
        self.try_send(readable, writable, 0).unwrap()
    }

    /// One turn of the queue.
    pub fn turn(&mut self) -> Work {
        self.now = self.now.plus_ns(1000);
        self.last = self.poller.poll(self.now, BUDGET);
        while let Some(completion) = self.guest.ring.reap().unwrap() {
            self.back.push((completion.id, completion.written));
        }
        self.last
    }

    pub fn is_back(&self, sent: &Sent) -> bool {
        self.back.iter().any(|&(id, _)| id == sent.id)
    }

    /// Throws away answers that nobody waits for.
    pub fn forget(&mut self) {
        self.back.clear();
    }

    pub fn wait(&mut self, sent: Sent) -> Answer {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(i) = self.back.iter().position(|&(id, _)| id == sent.id) {
                let (_, written) = self.back.remove(i);
                let bytes = sent.writable.iter().flat_map(|&(at, len)| self.peek(at, len)).collect();
                return Answer { written, bytes };
            }
            if self.turn().done == 0 {
                assert!(Instant::now() < deadline, "request {} does not come back", sent.id);
                std::thread::yield_now();
            }
        }
    }

    pub fn ask(&mut self, readable: &[&[u8]], writable: &[usize]) -> Answer {
        let sent = self.send(readable, writable);
        self.wait(sent)
    }

    /// A request in the usual three parts.
    pub fn request(&mut self, kind: u32, sector: u64, out: &[u8], room: usize) -> Answer {
        let head = header(kind, sector);
        match (out.is_empty(), room) {
            (true, 0) => self.ask(&[&head], &[1]),
            (true, _) => self.ask(&[&head], &[room, 1]),
            (false, 0) => self.ask(&[&head, out], &[1]),
            (false, _) => self.ask(&[&head, out], &[room, 1]),
        }
    }

    pub fn read(&mut self, sector: u64, len: usize) -> Vec<u8> {
        let answer = self.request(IN, sector, &[], len);
        assert_eq!((answer.status(), answer.written), (OK, len as u32 + 1));
        answer.data().to_vec()
    }

    pub fn write(&mut self, sector: u64, data: &[u8]) {
        assert_eq!(self.request(OUT, sector, data, 0).status(), OK);
    }

    pub fn status(&mut self, kind: u32, sector: u64, out: &[u8], room: usize) -> u8 {
        self.request(kind, sector, out, room).status()
    }

    /// Drains the queue within the deadline.
    pub fn drain(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.poller.drain(self.now) {
            assert!(Instant::now() < deadline, "the queue does not drain");
            std::thread::yield_now();
        }
    }
}

/// A descriptor of [`Poller::wake_fds`], which stays open for as long as the poller.
#[allow(unsafe_code, reason = "the trait hands out raw descriptors")]
pub fn borrow<'a>(fd: std::os::fd::RawFd) -> std::os::fd::BorrowedFd<'a> {
    // SAFETY: the tests use it only while the poller that gave it lives.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) }
}

/// Makes an empty qcow2 image of the file at `path`.
pub fn format_qcow2(path: &std::path::Path, bytes: u64) {
    let layout = Layout { cluster_bits: 16, refcount_order: 4, extended: false, external_data: false };
    format_as(path, layout, 3, bytes);
}

/// The same, with these units, in this version of the format.
pub fn format_as(path: &std::path::Path, layout: Layout, version: u32, bytes: u64) {
    let (disk_bytes, compression) = (bytes, Compression::Deflate);
    let new = NewImage { version, layout, disk_bytes, backing: None, data_file: None, compression };
    let file = std::fs::File::create(path).unwrap();
    for (offset, data) in create(&new) {
        file.write_all_at(&data, offset).unwrap();
    }
}

pub fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

/// Takes io_uring from the calling thread, as containers do from all of theirs.
pub fn forbid_io_uring() {
    let (rules, arch) =
        ([(libc::SYS_io_uring_setup, vec![])].into(), std::env::consts::ARCH.try_into().unwrap());
    let refuse = SeccompAction::Errno(libc::EPERM as u32);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch).unwrap();
    seccompiler::apply_filter(&BpfProgram::try_from(filter).unwrap()).unwrap();
}

/// A `struct virtio_blk_discard_write_zeroes`.
pub fn range(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut range = [0; 16];
    range[..8].copy_from_slice(&sector.to_le_bytes());
    range[8..12].copy_from_slice(&sectors.to_le_bytes());
    range[12..].copy_from_slice(&flags.to_le_bytes());
    range
}

/// `len` bytes that differ by position and seed.
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        })
        .collect()
}

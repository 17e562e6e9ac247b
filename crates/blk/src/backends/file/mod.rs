//! Storage in a raw file or a block device.
//!
//! Requests go through io_uring (`channel`, `uring`), one system call per burst, each queue with a ring of its own. Files on
//! tmpfs are the exception: the kernel would hand every request to a worker thread, because tmpfs has no non-blocking
//! read, although none ever blocks; they are read and written in place (`inline`), which takes less than the detour.
//!
//! Below the channels of a raw file are transfers (`transfer`), which images in files are made of as well.

mod blocks;
mod bounce;
mod channel;
mod device;
mod fixed;
pub(super) mod hold;
mod image;
mod in_place;
mod inline;
pub(super) mod open;
mod ring;
mod sync;
pub(crate) mod transfer;
mod uring;
mod zero;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::fsync;
use rustix::io::retry_on_intr;
use virtio::Memory;

use self::blocks::Blocks;
use self::channel::Raw;
use self::hold::Hold;
pub(crate) use self::in_place::InPlace;
use self::inline::Inline;
pub(crate) use self::uring::Uring;
use crate::backend::{Backend, BackendError, ChannelBuilder, Geometry};
use crate::backends::lock;
use crate::backends::stepwise::Stepwise;

/// Whether the host's page cache is bypassed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Direct {
    /// Where the file system can.
    #[default]
    Auto,
    /// Always; opening fails where the file system cannot.
    On,
    /// Never.
    Off,
}

/// How requests reach the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// In place for files on tmpfs, io_uring for all others.
    #[default]
    Auto,
    /// io_uring.
    Uring,
    /// In place: the I/O thread waits for each request.
    Inline,
}

impl Engine {
    pub(crate) fn wants_uring(self, kind: Kind) -> bool {
        match self {
            Self::Auto => kind != Kind::Tmpfs,
            Self::Uring => true,
            Self::Inline => false,
        }
    }
}

/// When an image is locked, and so kept from others that would write it, or read it while we do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lock {
    /// It is ours from the beginning: opening fails where another has it, and no other service can open it like this.
    #[default]
    On,
    /// While a queue runs, and not before: for the service that a guest is migrated to, which opens the image while
    /// another uses it.
    Late,
    /// Never.
    Off,
}

/// How to open a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileOptions {
    /// Open for reading only.
    pub read_only: bool,
    /// Bypass the page cache.
    pub direct: Direct,
    /// The way to the kernel.
    pub engine: Engine,
    /// Keep others from using the file at the same time.
    pub lock: Lock,
    /// With io_uring: let a kernel thread look for requests, which sleeps after this many milliseconds without. Costs
    /// that thread's CPU.
    pub sqpoll_ms: Option<u32>,
    /// With io_uring and `direct`: pin all guest memory, so that its pages need not be looked up per request.
    pub fixed_buffers: bool,
    /// It holds a disk image in a format of its own: it may be of any size and grows, and beyond its end are zeros.
    pub image: bool,
    /// The least that storage is taken to want of transfers past the page cache, in bytes, a power of two: more than it
    /// says, to see what becomes of requests for less.
    pub unit_bytes_min: u64,
}

impl Default for FileOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            direct: Direct::Auto,
            engine: Engine::Auto,
            lock: Lock::On,
            sqpoll_ms: None,
            fixed_buffers: false,
            image: false,
            unit_bytes_min: 512,
        }
    }
}

/// What a transfer must be aligned to for the page cache to be bypassed. Powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct DirectAlign {
    /// Buffer addresses and lengths, in bytes.
    memory: usize,
    /// Offsets and lengths in the file, in bytes.
    file: u64,
}

impl DirectAlign {
    /// `len`, without what is behind its last whole block if it has any.
    #[inline(always)]
    fn whole_blocks_of(self, len: u64) -> u64 {
        let whole = len & !(self.file - 1);
        if whole > 0 { whole } else { len }
    }
}

/// An open file, as the queues share it.
///
/// It is locked twice. While a queue runs, a [`hold::Hold`] has `buffered` locked, against any other use. And with
/// [`Lock::On`], `owner` is locked for as long as it is open, which says whose the image is while no queue runs, and
/// `buffered` against QEMU.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(super) path: PathBuf,
    /// Goes through the page cache.
    pub(super) buffered: OwnedFd,
    /// Goes past it, as then do all reads and writes.
    direct: Option<(OwnedFd, DirectAlign)>,
    /// Says that the image is this process's own.
    owner: Option<OwnedFd>,
    users: Mutex<hold::Users>,
    options: FileOptions,
    kind: Kind,
    /// Smallest efficient unit in bytes.
    block_bytes: u32,
    /// The least that storage takes, in bytes.
    logical_block_bytes: u32,
    /// Ranges of whole ones can be zeroed by the system, in bytes.
    zero_unit: u64,
    /// Who writes which blocks, where the page cache is bypassed and guests may write parts of what storage takes.
    blocks: Option<Blocks>,
    /// Capacity, in whole sectors.
    bytes: AtomicU64,
    /// Held while the size is changed.
    sizing: Mutex<()>,
    /// The size was made smaller.
    was_cut: AtomicBool,
    /// Something was written that only a flush makes durable.
    is_cached: AtomicBool,
    /// A flush has failed.
    flush_failed: AtomicBool,
    /// It was said that somebody has cut the file off.
    short_said: AtomicBool,
}

impl Opened {
    fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    fn align(&self) -> Option<DirectAlign> {
        self.direct.as_ref().map(|&(_, align)| align)
    }

    /// `bytes`, rounded down to what can be read and written.
    fn whole(&self, bytes: u64) -> u64 {
        bytes - bytes % self.align().map_or(512, |align| align.file)
    }
}

/// What was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A file whose pages are memory.
    Tmpfs,
    /// A file.
    Regular,
    /// A block device.
    Block,
}

impl Drop for Opened {
    fn drop(&mut self) {
        if self.owner.is_some() {
            hold::disown(&self.buffered, &self.path);
        }
    }
}

/// A raw file or block device.
#[derive(Debug)]
pub struct File {
    opened: Arc<Opened>,
}

impl File {
    /// Opens the file or block device at `path`.
    ///
    /// # Errors
    /// It cannot be opened or locked, is neither a file nor a block device, or cannot do what `options` ask for.
    pub fn open(path: &Path, options: FileOptions) -> Result<Self, BackendError> {
        Ok(Self { opened: Arc::new(open::open(path, options)?) })
    }

    /// Whether the page cache is bypassed.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.opened.direct.is_some()
    }
}

impl Backend for File {
    fn geometry(&self) -> Geometry {
        let opened = &self.opened;
        Geometry {
            block_bytes: opened.block_bytes,
            logical_block_bytes: opened.logical_block_bytes,
            read_only: opened.options.read_only,
            flush: true,
            discard: !opened.options.read_only,
            write_zeroes: !opened.options.read_only,
            ..Geometry::new(opened.bytes())
        }
    }

    fn channel(&self, memory: &Arc<Memory>, depth: u16) -> Result<ChannelBuilder, BackendError> {
        let hold = Arc::new(Hold::take(&self.opened, lock::WAIT)?);
        let own = self.opened.open_again().map_err(|error| {
            BackendError(format!("opening {} for a queue: {error}", self.opened.path.display()))
        })?;
        let (engine, file) = (self.opened.options.engine, self.opened.clone());
        let parts = engine.wants_uring(file.kind).then(|| {
            Uring::prepare(std::slice::from_ref(&hold), memory, depth.into(), std::slice::from_ref(&own))
        });
        Ok(Box::new(move || {
            if let Some(parts) = parts {
                match parts.and_then(|parts| Raw::new(parts, file, depth)) {
                    Ok(uring) => return Ok(Box::new(uring)),
                    Err(error) if engine == Engine::Uring => return Err(error),
                    Err(error) => {
                        tracing::warn!(%error, "no io_uring: the I/O thread waits for each request");
                    }
                }
            }
            Ok(Box::new(Stepwise::new(Inline::new(hold, own), depth)))
        }))
    }

    fn bytes_now(&self) -> Result<u64, BackendError> {
        let path = self.opened.path.display();
        open::size(&self.opened.buffered)
            .map_err(|e| BackendError(format!("reading the size of {path}: {e}")))
    }

    fn channel_descriptors(&self) -> u32 {
        // The file, a ring, and what that wakes its thread by.
        if self.opened.options.engine.wants_uring(self.opened.kind) { 3 } else { 1 }
    }

    fn resize(&self, bytes: Option<u64>) -> Result<Geometry, BackendError> {
        let opened = &self.opened;
        let failed = |what: &str, error: &dyn std::fmt::Display| {
            BackendError(format!("resizing {}: {what}: {error}", opened.path.display()))
        };
        if let Some(bytes) = bytes {
            if opened.kind == Kind::Block {
                return Err(failed(
                    "a block device has the size it has",
                    &"resize it where it is, then take that over",
                ));
            }
            let bytes = bytes & !511;
            if opened.whole(bytes) != bytes {
                return Err(failed(
                    "storage that is used without the page cache",
                    &"a size must have whole blocks of it",
                ));
            }
            let _hold = Hold::take(opened, Duration::ZERO)?;
            let _alone = opened.sizing.lock().unwrap_or_else(PoisonError::into_inner);
            let before = opened.bytes.swap(bytes, Ordering::Relaxed);
            // What is under way cuts it off again when it is over, see `keep_cut`.
            opened.was_cut.store(bytes < before, Ordering::Relaxed);
            if let Err(error) = rustix::fs::ftruncate(&opened.buffered, bytes) {
                opened.bytes.store(before, Ordering::Relaxed);
                opened.was_cut.store(false, Ordering::Relaxed);
                return Err(failed("changing its size", &error));
            }
        } else {
            let _alone = opened.sizing.lock().unwrap_or_else(PoisonError::into_inner);
            opened.bytes.store(opened.whole(self.bytes_now()?), Ordering::Relaxed);
            opened.was_cut.store(false, Ordering::Relaxed);
        }
        // The size is of no use after a power cut if it is in memory only.
        let synced = opened.flushed(retry_on_intr(|| fsync(&opened.buffered)));
        synced.map_err(|e| failed("making its size durable", &e))?;
        Ok(self.geometry())
    }

    fn settle(&self) -> Result<(), BackendError> {
        let cached = self.opened.direct.is_none() && !self.opened.options.read_only;
        if cached { self.flush() } else { Ok(()) }
    }

    fn flush(&self) -> Result<(), BackendError> {
        self.opened.flush()
    }
}

//! Storage in a qcow2 image, by the `imago` library.
//!
//! The library waits for its file, so each queue has threads of its own to do that (`threads`), and data go through
//! buffers of ours: only the I/O thread touches guest memory. That costs a hand-over and a copy per request; images
//! that must be fast are raw ones.

mod chain;
mod channel;
pub mod check;
mod open;
mod threads;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use imago::file::File as ImageFile;
use imago::format::PreallocateMode;
use imago::qcow2::Qcow2 as Format;
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate, StorageOpenOptions,
};
use virtio::Memory;

use self::chain::Chain;
use self::channel::Threaded;
use crate::backend::{Backend, BackendError, ChannelBuilder, Geometry};
use crate::backends::file::Lock;
use crate::backends::file::hold::Hold;
use crate::backends::lock;

/// The most threads of a queue.
const THREADS_MAX: usize = 64;

/// How to open an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Qcow2Options {
    /// Open for reading only.
    pub read_only: bool,
    /// Bypass the host's page cache.
    pub direct: bool,
    /// Follow the image's reference to a backing or data file. Whoever made the image then chooses a file of this host
    /// for the guest to read, so it is for images from a trusted source only.
    pub backing: bool,
    /// Keep others from writing the image at the same time.
    pub lock: Lock,
    /// Requests of a queue that are worked on at the same time, 1 to 64.
    pub threads: usize,
}

impl Default for Qcow2Options {
    fn default() -> Self {
        Self { read_only: false, direct: false, backing: false, lock: Lock::On, threads: 4 }
    }
}

/// An open image, as the queues' threads share it.
struct Image {
    path: PathBuf,
    /// Discards and resizes need it alone, all else shares it.
    access: RwLock<FormatAccess<ImageFile>>,
    /// Hold the locks, and are dropped after `access` has written what it had cached. A killed process keeps them for as
    /// long as it can still write: what the threads do they do in their own system calls, and files are closed when the
    /// last thread has returned from its.
    _holds: Vec<Hold>,
    _chain: Chain,
}

/// A qcow2 image.
pub struct Qcow2 {
    image: Arc<Image>,
    options: Qcow2Options,
    bytes: AtomicU64,
}

impl Qcow2 {
    /// Opens the image at `path`.
    ///
    /// # Errors
    /// It cannot be opened or locked, is no qcow2 image, or refers to another file that may not be opened.
    pub fn open(path: &Path, options: Qcow2Options) -> Result<Self, BackendError> {
        let failed = |what: &str, error: &dyn std::fmt::Display| {
            BackendError(format!("opening qcow2 image {}: {what}: {error}", path.display()))
        };
        if options.threads == 0 || options.threads > THREADS_MAX {
            return Err(failed(
                "threads",
                &format_args!("{} given, 1 to {THREADS_MAX} allowed", options.threads),
            ));
        }
        let chain = open::open(path, options)?;
        let holds = chain.hold(lock::WAIT)?;
        if options.lock == Lock::Late {
            return Err(failed("lock=late", &"this backend cannot share an image with another service"));
        }
        let storage = StorageOpenOptions::new().direct(options.direct);
        let builder = Format::<ImageFile>::builder(
            <ImageFile as imago::Storage>::open(storage.clone().filename(path).write(!options.read_only))
                .map_err(|e| failed("opening the file", &e))?,
        )
        .write(!options.read_only)
        .storage_open_options(storage);
        let format = if options.backing {
            builder.open(PermissiveImplicitOpenGate::default())
        } else {
            builder.open(DenyImplicitOpenGate::default())
        };
        let format = format.map_err(|error| match error.kind() {
            std::io::ErrorKind::PermissionDenied => {
                failed("it refers to another file (backing=on allows that)", &error)
            }
            _ => failed("reading its header", &error),
        })?;
        let access = FormatAccess::new(format);
        let bytes = access.size();
        let image =
            Image { path: path.to_owned(), access: RwLock::new(access), _holds: holds, _chain: chain };
        Ok(Self { image: Arc::new(image), options, bytes: AtomicU64::new(bytes & !511) })
    }
}

impl Backend for Qcow2 {
    fn geometry(&self) -> Geometry {
        let writable = !self.options.read_only;
        Geometry {
            block_bytes: 4096,
            read_only: self.options.read_only,
            flush: true,
            discard: writable,
            write_zeroes: writable,
            ..Geometry::new(self.bytes.load(Ordering::Relaxed))
        }
    }

    fn channel(&self, _memory: &Arc<Memory>, depth: u16) -> Result<ChannelBuilder, BackendError> {
        let (image, threads) = (self.image.clone(), self.options.threads);
        Ok(Box::new(move || Ok(Box::new(Threaded::new(&image, threads, depth)?))))
    }

    fn resize(&self, bytes: Option<u64>) -> Result<Geometry, BackendError> {
        let mut access = self.image.access.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(bytes) = bytes {
            let resized = access.resize(bytes & !511, PreallocateMode::Zero);
            let durable = resized.and_then(|()| access.flush()).and_then(|()| access.sync());
            durable.map_err(|error| {
                BackendError(format!("resizing {} to {bytes} bytes: {error}", self.image.path.display()))
            })?;
        }
        self.bytes.store(access.size() & !511, Ordering::Relaxed);
        drop(access);
        Ok(self.geometry())
    }
    fn flush(&self) -> Result<(), BackendError> {
        let access = self.image.access.read().unwrap_or_else(PoisonError::into_inner);
        let path = self.image.path.display();
        let flushed = access.flush().and_then(|()| access.sync());
        flushed.map_err(|error| BackendError(format!("flushing {path}: {error}")))
    }
}

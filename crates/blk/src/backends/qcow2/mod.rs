//! Storage in a qcow2 image: the engine of `qcow2` decides, and each queue's own thread does the input and output.
//!
//! * `image` is what all threads share, and finds bytes; `open` puts it together.
//! * `channel` is a queue's way to it, `pieces` what becomes of its requests, `jobs` what is under way.
//! * `combine` lets many threads have one engine, `commands` does what it wants done.
//! * `control` is for control threads: resizing, and leaving an image in order.

mod chain;
mod channel;
mod combine;
mod commands;
mod control;
mod image;
mod jobs;
mod open;
mod pieces;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use virtio::Memory;

use self::channel::ImageChannel;
use self::control::Control;
use self::image::Image;
use self::jobs::Jobs;
use crate::backend::{Backend, BackendError, Channel, ChannelBuilder, Geometry};
use crate::backends::file::hold::Hold;
use crate::backends::file::{Engine, InPlace, Opened, Uring};
use crate::backends::lock;

/// Bytes of tables that are kept in memory, for each layer.
const CACHE_BYTES: u64 = 64 << 20;

/// How to open an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Qcow2Options {
    /// Open for reading only.
    pub read_only: bool,
    /// Bypass the host's page cache.
    pub direct: bool,
    /// The way to the kernel.
    pub engine: Engine,
    /// Follow the image's reference to a backing or data file. Whoever made the image then chooses a file of this host
    /// for the guest to read, so it is for images from a trusted source only.
    pub backing: bool,
    /// Keep others from writing the image at the same time.
    pub lock: bool,
}

impl Default for Qcow2Options {
    fn default() -> Self {
        Self { read_only: false, direct: false, engine: Engine::Auto, backing: false, lock: true }
    }
}

/// A qcow2 image.
pub struct Qcow2 {
    path: PathBuf,
    options: Qcow2Options,
    image: Arc<Image>,
    /// Held while the size is changed, or the image is left in order.
    alone: Mutex<()>,
}

impl Qcow2 {
    /// Opens the image at `path`.
    ///
    /// # Errors
    /// It cannot be opened or locked, is no qcow2 image, or refers to another file that may not be opened.
    pub fn open(path: &Path, options: Qcow2Options) -> Result<Self, BackendError> {
        let chain = open::open(path, options)?;
        let image = Arc::new(Image::new(&chain, CACHE_BYTES, true));
        Ok(Self { path: path.to_owned(), options, image, alone: Mutex::default() })
    }

    fn failed(&self, what: &str, error: &dyn std::fmt::Display) -> BackendError {
        BackendError(format!("{what} {}: {error}", self.path.display()))
    }

    /// Every file, held, and an open file of each for one thread.
    fn hold(image: &Image, wait: Duration) -> Result<(Vec<Arc<Hold>>, Vec<OwnedFd>), BackendError> {
        let (mut holds, mut owns) = (Vec::new(), Vec::new());
        for file in &image.files {
            holds.push(Arc::new(Hold::take(file, wait)?));
            owns.push(file.open_for_thread()?);
        }
        Ok((holds, owns))
    }

    fn wants_uring(&self, image: &Image) -> bool {
        image.files.iter().any(|file| self.options.engine.wants_uring(file.kind()))
    }

    /// Gives back what is reserved in the image, if no queue runs. Without this, it is leaked at the end.
    fn leave_in_order(&self) -> Result<(), BackendError> {
        let _alone = self.alone.lock().unwrap_or_else(PoisonError::into_inner);
        if self.options.read_only || Arc::strong_count(&self.image) > 1 {
            return Ok(());
        }
        self.control()?.leave_in_order();
        Ok(())
    }

    fn control(&self) -> Result<Control, BackendError> {
        let (holds, owns) = Self::hold(&self.image, Duration::ZERO)?;
        Control::new(self.image.clone(), InPlace::new(holds, owns)?)
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        if let Err(error) = self.leave_in_order() {
            tracing::debug!(%error, "clusters are leaked");
        }
    }
}

impl Backend for Qcow2 {
    fn geometry(&self) -> Geometry {
        let writable = !self.options.read_only;
        let top: &Opened = &self.image.files[0];
        Geometry {
            block_bytes: 4096,
            logical_block_bytes: top.logical_block_bytes(),
            read_only: self.options.read_only,
            flush: true,
            discard: writable,
            write_zeroes: writable,
            ..Geometry::new(self.image.bytes())
        }
    }

    fn channel(&self, memory: &Arc<Memory>, depth: u16) -> Result<ChannelBuilder, BackendError> {
        let _alone = self.alone.lock().unwrap_or_else(PoisonError::into_inner);
        let (engine, image) = (self.options.engine, self.image.clone());
        let (holds, owns) = Self::hold(&image, lock::WAIT)?;
        let count = Jobs::count(depth);
        let parts = self.wants_uring(&image).then(|| Uring::prepare(&holds, memory, count, &owns));
        Ok(Box::new(move || -> Result<Box<dyn Channel>, BackendError> {
            if let Some(parts) = parts {
                match parts.and_then(|parts| Uring::new(parts, &image.files, count)) {
                    Ok(uring) => return Ok(Box::new(ImageChannel::new(image, uring, depth))),
                    Err(error) if engine == Engine::Uring => return Err(error),
                    Err(error) => {
                        tracing::warn!(%error, "no io_uring: the I/O thread waits for each request");
                    }
                }
            }
            Ok(Box::new(ImageChannel::new(image, InPlace::new(holds, owns)?, depth)))
        }))
    }

    fn channel_descriptors(&self) -> u32 {
        // An open file of each, and what wakes the thread; a ring.
        self.image.files.len() as u32 + 1 + u32::from(self.wants_uring(&self.image))
    }

    fn resize(&self, bytes: Option<u64>) -> Result<Geometry, BackendError> {
        let Some(bytes) = bytes.map(|bytes| bytes & !511) else { return Ok(self.geometry()) };
        let _alone = self.alone.lock().unwrap_or_else(PoisonError::into_inner);
        if bytes != self.image.bytes() {
            let what = format!("resizing to {bytes} bytes");
            let mut control = self.control()?;
            control.resize(bytes).map_err(|error| self.failed(&what, &error))?;
            self.image.bytes.store(bytes, Ordering::Relaxed);
        }
        Ok(self.geometry())
    }

    fn settle(&self) -> Result<(), BackendError> {
        if self.options.read_only {
            return Ok(());
        }
        self.leave_in_order()?;
        self.flush()
    }

    fn flush(&self) -> Result<(), BackendError> {
        for file in [0, self.image.data_file] {
            self.image.files[usize::from(file)].flush()?;
        }
        Ok(())
    }
}

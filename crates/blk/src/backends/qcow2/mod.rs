//! Storage in a qcow2 image: the engine of `qcow2` decides, and each queue's own thread does the input and output.
//!
//! * `open` opens an image and all that it stands on, the `chain`; `image` is what threads share of it, and finds bytes.
//! * `channel` is a queue's way to it, `pieces` what becomes of its requests, `jobs` what is under way.
//! * `combine` lets many threads have one engine, `commands` does what it wants done.
//! * `packed` reads compressed clusters, which `unpack` makes whole on threads of its own.
//! * `control` is for control threads: resizing, and leaving an image in order.

mod chain;
mod channel;
pub mod check;
mod combine;
mod commands;
mod control;
mod image;
mod jobs;
mod open;
mod packed;
mod pieces;
mod unpack;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use qcow2::image::ReadAt;
use virtio::Memory;

use self::chain::{Chain, Format, Layer, Tables};
use self::channel::ImageChannel;
use self::control::Control;
use self::image::Image;
use self::jobs::Jobs;
use crate::backend::{Backend, BackendError, Channel, ChannelBuilder, Geometry};
use crate::backends::file::hold::Hold;
use crate::backends::file::{Engine, InPlace, Lock, Uring};
use crate::backends::lock;

/// Bytes of tables that are kept in memory, for each layer.
const CACHE_BYTES: u64 = 64 << 20;
/// The smallest efficient unit, in bytes.
const BLOCK_BYTES: u32 = 4096;

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
    pub lock: Lock,
}

impl Default for Qcow2Options {
    fn default() -> Self {
        Self { read_only: false, direct: false, engine: Engine::Auto, backing: false, lock: Lock::On }
    }
}

/// A qcow2 image.
pub struct Qcow2 {
    path: PathBuf,
    options: Qcow2Options,
    /// Size of the disk in bytes.
    bytes: Arc<AtomicU64>,
    /// Who has it changes which threads there are, the size, or reads the image anew.
    state: Mutex<State>,
    discard: bool,
    logical_block_bytes: u32,
    descriptors: u32,
}

struct State {
    chain: Chain,
    image: Arc<Image>,
    /// From the first queue on until the image was left in order after the last, where other services have it open too:
    /// nobody else has written it since.
    holds: Vec<Arc<Hold>>,
}

impl State {
    /// Whether no thread has a way to the image.
    fn is_unused(&self) -> bool {
        Arc::strong_count(&self.image) == 1
    }
}

impl Qcow2 {
    /// Opens the image at `path`.
    ///
    /// # Errors
    /// It cannot be opened or locked, is no qcow2 image, or refers to another file that may not be opened.
    pub fn open(path: &Path, options: Qcow2Options) -> Result<Self, BackendError> {
        let mut chain = open::open(path, options)?;
        let bytes = Arc::new(AtomicU64::new(0));
        let discard = match &chain.layers[0].format {
            // Version 2 has nothing that hides a backing file.
            Format::Qcow2(image) => image.header.version >= 3 || chain.layers.len() == 1,
            Format::Raw { .. } => false,
        };
        let (logical_block_bytes, files) = {
            let top = &chain.layers[0];
            let data = top.data_file.as_ref().unwrap_or(&top.file);
            (data.logical_block_bytes(), chain.files().count() as u32)
        };
        let rings = u32::from(wants_uring(&chain, options));
        let image = build(&mut chain, options, &bytes);
        Ok(Self {
            path: path.to_owned(),
            options,
            bytes,
            state: Mutex::new(State { chain, image, holds: Vec::new() }),
            discard,
            logical_block_bytes,
            // Open files, what wakes the thread, and a ring.
            descriptors: files + 1 + rings,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds all files for a thread. Where another service may have written the image before that, it is read again.
    fn hold(&self, state: &mut State, wait: Duration) -> Result<Vec<Arc<Hold>>, BackendError> {
        let holds = state.chain.hold(wait)?.into_iter().map(Arc::new).collect();
        if self.options.lock == Lock::Late && state.holds.is_empty() {
            open::prepare(&mut state.chain, self.options)?;
            state.image = build(&mut state.chain, self.options, &self.bytes);
        }
        Ok(holds)
    }

    /// Gives back what is reserved in the image, if no queue runs. What is not given back is leaked.
    fn leave_in_order(&self) -> Result<(), BackendError> {
        let mut state = self.state();
        if !state.is_unused() {
            return Ok(());
        }
        let ours = self.options.lock != Lock::Late || !state.holds.is_empty();
        let changed = !self.options.read_only && !state.image.seats.never_taken();
        let left = match ours && changed {
            true => self.control(&mut state).map(|mut control| control.leave_in_order()),
            false => Ok(()),
        };
        state.holds.clear();
        left
    }

    fn control(&self, state: &mut State) -> Result<Control, BackendError> {
        let holds = self.hold(state, Duration::ZERO)?;
        let owns = state.chain.files().map(|file| file.open_for_thread()).collect::<Result<_, _>>()?;
        Control::new(state.image.clone(), InPlace::new(holds, owns)?)
    }
}

fn wants_uring(chain: &Chain, options: Qcow2Options) -> bool {
    chain.files().any(|file| options.engine.wants_uring(file.kind()))
}

/// An image for threads to share.
fn build(chain: &mut Chain, options: Qcow2Options, bytes: &Arc<AtomicU64>) -> Arc<Image> {
    if let Some(Layer { file, format: Format::Qcow2(image), .. }) = chain.layers.first_mut()
        && options.direct
        && !options.read_only
    {
        // What is written past the page cache has whole blocks.
        let whole = image.file_bytes.next_multiple_of(image.header.layout.cluster_bytes().max(4096));
        if file.extend(whole) {
            image.file_bytes = Tables(file).file_bytes().unwrap_or(whole);
        }
    }
    Arc::new(Image::new(chain, CACHE_BYTES, bytes.clone()))
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
        Geometry {
            block_bytes: BLOCK_BYTES,
            logical_block_bytes: self.logical_block_bytes,
            read_only: self.options.read_only,
            flush: true,
            discard: writable && self.discard,
            write_zeroes: writable,
            ..Geometry::new(self.bytes.load(Ordering::Relaxed))
        }
    }

    fn channel(&self, memory: &Arc<Memory>, depth: u16) -> Result<ChannelBuilder, BackendError> {
        let mut state = self.state();
        let holds = self.hold(&mut state, lock::WAIT)?;
        if self.options.lock == Lock::Late && state.holds.is_empty() {
            state.holds.clone_from(&holds);
        }
        let owns = state.chain.files().map(|file| file.open_for_thread()).collect::<Result<Vec<_>, _>>()?;
        let (engine, image, count) = (self.options.engine, state.image.clone(), Jobs::count(depth));
        let parts =
            wants_uring(&state.chain, self.options).then(|| Uring::prepare(&holds, memory, count, &owns));
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
        self.descriptors
    }

    fn resize(&self, bytes: Option<u64>) -> Result<Geometry, BackendError> {
        let mut state = self.state();
        // This reads it again where another service may have given it another size.
        let mut control = self.control(&mut state)?;
        if let Some(bytes) = bytes.map(|bytes| bytes & !511)
            && bytes != state.image.bytes()
        {
            let resized = control.resize(bytes);
            resized.map_err(|what| {
                BackendError(format!("resizing {} to {bytes} bytes: {what} failed", self.path.display()))
            })?;
            self.bytes.store(bytes, Ordering::Relaxed);
        }
        Ok(self.geometry())
    }

    fn settle(&self) -> Result<(), BackendError> {
        self.leave_in_order()?;
        if self.options.read_only { Ok(()) } else { self.flush() }
    }

    fn flush(&self) -> Result<(), BackendError> {
        let top = &self.state().chain.layers[0];
        top.file.flush()?;
        top.data_file.as_ref().map_or(Ok(()), |file| file.flush())
    }
}

//! Threads that wait for an image on behalf of one queue.
//!
//! The queue's I/O thread and these threads exchange whole jobs through bounded channels that neither side ever waits
//! at, except for a thread without a job. A finished job shows on an eventfd only while the I/O thread sleeps.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;

use reactor::LogLimit;
use rustix::event::{EventfdFlags, eventfd};

use super::Image;
use crate::backend::{BackendError, OpKind, Status};

/// A part of an operation, and the buffer for its data.
pub(super) struct Job {
    /// Which operation of the queue it belongs to.
    pub(super) slot: usize,
    pub(super) kind: OpKind,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) buffer: Vec<u8>,
}

/// A job that is over.
pub(super) struct Finished {
    pub(super) slot: usize,
    pub(super) buffer: Vec<u8>,
    pub(super) status: Status,
}

/// What the threads of a queue share with it.
struct Bell {
    event: OwnedFd,
    asleep: AtomicBool,
}

/// The threads of one queue.
pub(super) struct Threads {
    jobs: Vec<SyncSender<Job>>,
    next: usize,
    finished: Receiver<Finished>,
    /// Taken from `finished` by a look that was not meant to take.
    peeked: Option<Finished>,
    bell: Arc<Bell>,
    handles: Vec<JoinHandle<()>>,
}

impl Threads {
    /// Starts `count` threads for a queue with up to `depth` jobs.
    pub(super) fn start(image: &Arc<Image>, count: usize, depth: u16) -> Result<Self, BackendError> {
        let failed = |error: io::Error| {
            BackendError(format!("starting threads for {}: {error}", image.path.display()))
        };
        let event =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|e| failed(e.into()))?;
        let bell = Arc::new(Bell { event, asleep: AtomicBool::new(false) });
        let (done, finished) = sync_channel(depth.into());
        let mut threads =
            Self { jobs: Vec::new(), next: 0, finished, peeked: None, bell, handles: Vec::new() };
        for i in 0..count {
            let (sender, jobs) = sync_channel(depth.into());
            let (image, done, bell) = (image.clone(), done.clone(), threads.bell.clone());
            let handle = std::thread::Builder::new()
                .name(format!("qcow2-{i}"))
                .spawn(move || {
                    reactor::run_as_helper();
                    serve(&image, &jobs, &done, &bell);
                })
                .map_err(failed)?;
            threads.jobs.push(sender);
            threads.handles.push(handle);
        }
        Ok(threads)
    }

    /// Hands a job to the next thread. There is room for `depth` of them.
    pub(super) fn start_job(&mut self, job: Job) -> Result<(), Finished> {
        self.next = (self.next + 1) % self.jobs.len();
        self.jobs[self.next].try_send(job).map_err(|refused| {
            let (std::sync::mpsc::TrySendError::Full(job) | std::sync::mpsc::TrySendError::Disconnected(job)) = refused;
            Finished { slot: job.slot, buffer: job.buffer, status: Status::IoError }
        })
    }

    /// The next job that is over.
    pub(super) fn finished(&mut self) -> Option<Finished> {
        self.peeked.take().or_else(|| self.finished.try_recv().ok())
    }

    /// Readable when a job is over, if armed.
    pub(super) fn event(&self) -> RawFd {
        self.bell.event.as_raw_fd()
    }

    /// Makes finished jobs show on the descriptor; true if there are some already.
    pub(super) fn arm(&mut self) -> bool {
        self.bell.asleep.store(true, Ordering::Relaxed);
        // A thread sends and then looks at the flag; the flag is set and then looked for what was sent.
        fence(Ordering::SeqCst);
        self.peeked = self.finished();
        self.peeked.is_some()
    }

    /// Makes them no longer show.
    pub(super) fn disarm(&mut self) {
        self.bell.asleep.store(false, Ordering::Relaxed);
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.jobs.clear();
        for handle in self.handles.drain(..) {
            // A thread that panicked has said so.
            let _ = handle.join();
        }
    }
}

/// Storage can refuse every request that a guest makes.
static FAILED: LogLimit = LogLimit::new();

fn serve(image: &Image, jobs: &Receiver<Job>, done: &SyncSender<Finished>, bell: &Bell) {
    while let Ok(mut job) = jobs.recv() {
        // A malformed image may trip the library; that is an error of the request, not of the service.
        let result = catch_unwind(AssertUnwindSafe(|| carry_out(image, &mut job)));
        let status = match result {
            Ok(Ok(())) => Status::Ok,
            Ok(Err(error)) if error.kind() == io::ErrorKind::Unsupported => Status::Unsupported,
            Ok(Err(error)) => {
                if FAILED.admits() {
                    tracing::warn!(path = %image.path.display(), kind = ?job.kind, job.offset, job.len, %error, "request failed");
                }
                Status::IoError
            }
            Err(_) => {
                if FAILED.admits() {
                    tracing::error!(path = %image.path.display(), kind = ?job.kind, job.offset, job.len, "request panicked");
                }
                Status::IoError
            }
        };
        // It has room for all jobs of the queue; the queue may be gone.
        let _ = done.send(Finished { slot: job.slot, buffer: job.buffer, status });
        fence(Ordering::SeqCst);
        if bell.asleep.load(Ordering::Relaxed) {
            let _ = rustix::io::write(&bell.event, &1u64.to_ne_bytes());
        }
    }
}

fn carry_out(image: &Image, job: &mut Job) -> io::Result<()> {
    let shared = || image.access.read().unwrap_or_else(PoisonError::into_inner);
    let alone = || image.access.write().unwrap_or_else(PoisonError::into_inner);
    match job.kind {
        OpKind::Read => shared().read(&mut job.buffer[..], job.offset),
        OpKind::Write => shared().write(&job.buffer[..], job.offset),
        OpKind::Flush => {
            let access = shared();
            access.flush()?;
            access.sync()
        }
        OpKind::WriteZeroes { unmap: false } => shared().write_zeroes(job.offset, job.len),
        OpKind::WriteZeroes { unmap: true } => alone().discard_to_zero(job.offset, job.len),
        OpKind::Discard => alone().discard_to_any(job.offset, job.len),
        OpKind::SecureErase => Err(io::ErrorKind::Unsupported.into()),
    }
}

//! Storage in this process's memory. It is gone when the process ends; a page that was never written, or was
//! discarded, takes no memory and reads as zeros.

mod copy;
mod store;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::system::sysinfo;
use virtio::ring::Chains;

use self::store::Store;
use crate::backend::{Backend, BackendError, ChannelBuilder, Geometry, Op, OpKind, Status};
use crate::backends::stepwise::{Steps, Stepwise};
use crate::data::Pieces;

/// The most bytes copied for one operation in one go.
const COPY_BYTES_MAX: u64 = 256 << 10;

/// A disk in memory.
#[derive(Debug)]
pub struct Memory {
    store: Arc<Store>,
    bytes: AtomicU64,
}

impl Memory {
    /// A disk of `bytes` zero bytes, rounded down to whole sectors. With `huge`, in huge pages where the system has
    /// them: faster at random access in a large disk, because the processor then knows where its pages
    /// are; but a single sector written takes 2 MiB.
    ///
    /// # Errors
    /// The address space cannot be had.
    pub fn new(bytes: u64, huge: bool) -> Result<Self, BackendError> {
        warn_of_overcommitment(bytes);
        Ok(Self { store: Arc::new(Store::new(bytes & !511, huge)?), bytes: AtomicU64::new(bytes & !511) })
    }
}

/// A disk takes memory only as it is written, so it may be larger than what there is; but not be full then.
fn warn_of_overcommitment(bytes: u64) {
    let system = sysinfo();
    let memory_bytes = (system.totalram + system.totalswap).saturating_mul(system.mem_unit.into());
    if bytes > memory_bytes {
        tracing::warn!(
            bytes,
            memory_bytes,
            "the disk is larger than this host's memory and swap: what is written to it may get processes killed"
        );
    }
}

impl Backend for Memory {
    fn geometry(&self) -> Geometry {
        Geometry {
            block_bytes: 4096,
            discard: true,
            write_zeroes: true,
            ..Geometry::new(self.bytes.load(Ordering::Relaxed))
        }
    }

    fn channel(&self, _memory: &Arc<virtio::Memory>, depth: u16) -> Result<ChannelBuilder, BackendError> {
        let store = self.store.clone();
        Ok(Box::new(move || Ok(Box::new(Stepwise::new(InPlace { store, ahead: 0 }, depth)))))
    }

    fn resize(&self, bytes: Option<u64>) -> Result<Geometry, BackendError> {
        if let Some(bytes) = bytes {
            let bytes = bytes & !511;
            let before = self.bytes.load(Ordering::Relaxed);
            warn_of_overcommitment(bytes);
            self.store.resize(before, bytes)?;
            self.bytes.store(bytes, Ordering::Relaxed);
        }
        Ok(self.geometry())
    }
}

struct InPlace {
    store: Arc<Store>,
    /// Where the next operation begins.
    ahead: u64,
}

impl Steps for InPlace {
    #[inline(always)]
    fn step(&mut self, op: &Op, progress: u64, chains: &Chains) -> Result<u64, Status> {
        let (at, left) = (op.offset + progress, op.len - progress);
        match op.kind {
            OpKind::Read | OpKind::Write => {
                let now = left.min(COPY_BYTES_MAX);
                let pieces = Pieces::new(op.kind, chains.get(&op.token), progress, now);
                let copied = match op.kind {
                    OpKind::Read => self.store.read(at, pieces, self.ahead),
                    _ => self.store.write(at, pieces, self.ahead),
                };
                if copied == now { Ok(progress + now) } else { Err(Status::IoError) }
            }
            OpKind::Discard | OpKind::WriteZeroes { .. } => {
                let now = self.store.zeroed_at_once(at, left);
                self.store.zero(at, now).map(|()| progress + now).map_err(|_| Status::IoError)
            }
            OpKind::Flush => Ok(0),
            OpKind::SecureErase => Err(Status::Unsupported),
        }
    }

    #[inline(always)]
    fn next(&mut self, op: Option<&Op>) {
        if let Some(op) = op {
            self.ahead = op.offset;
        }
    }
}

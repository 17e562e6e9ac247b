//! Storage that takes everything and keeps nothing: the floor of what a request costs, and the template for backends.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio::Memory;
use virtio::ring::Chains;

use crate::backend::{Backend, BackendError, Channel, ChannelBuilder, Done, Geometry, Op, Status};

/// A disk of a given size. Reads leave the guest's buffers as they are.
#[derive(Debug)]
pub struct Null {
    bytes: AtomicU64,
}

impl Null {
    /// A disk of `bytes` bytes, rounded down to whole sectors.
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        Self { bytes: AtomicU64::new(bytes) }
    }
}

impl Backend for Null {
    fn geometry(&self) -> Geometry {
        Geometry {
            flush: true,
            discard: true,
            write_zeroes: true,
            secure_erase: true,
            ..Geometry::new(self.bytes.load(Ordering::Relaxed))
        }
    }

    fn channel(&self, _memory: &Arc<Memory>, _depth: u16) -> Result<ChannelBuilder, BackendError> {
        Ok(Box::new(|| Ok(Box::new(NullChannel))))
    }

    fn resize(&self, bytes: Option<u64>) -> Result<Geometry, BackendError> {
        if let Some(bytes) = bytes {
            self.bytes.store(bytes, Ordering::Relaxed);
        }
        Ok(self.geometry())
    }

    fn flush(&self) -> Result<(), BackendError> {
        Ok(())
    }
}

struct NullChannel;

impl Channel for NullChannel {
    fn submit(&mut self, ops: &mut Vec<Op>, _chains: &Chains, done: &mut Vec<Done>) {
        done.extend(ops.drain(..).map(|op| Done { token: op.token, status: Status::Ok }));
    }

    fn reap(&mut self, _chains: &Chains, _done: &mut Vec<Done>) {}

    fn in_flight(&self) -> usize {
        0
    }
}

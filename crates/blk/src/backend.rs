//! The contract between the virtio-blk device and its storage.
//!
//! A [`Backend`] is shared by all queues; each queue has a [`Channel`] of its own on it, which its I/O thread opens and is
//! the only one to use. Work goes down in bursts ([`Channel::submit`]) and comes back in bursts ([`Channel::reap`]), so one
//! virtual call serves many requests.

use std::os::fd::RawFd;
use std::sync::Arc;

use virtio::Memory;
use virtio::ring::{Chains, Token};

/// What kind of storage this is; fixed but for `bytes`, which a resize changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Capacity in bytes, a multiple of 512.
    pub bytes: u64,
    /// Smallest efficient unit in bytes, a power of two of at least 512. Offsets and lengths of reads and writes need
    /// not be multiples.
    pub block_bytes: u32,
    /// The least that the storage itself reads and writes, in bytes: 512, 1024, 2048 or 4096. Less is possible, at the
    /// price of reading and writing all of it.
    pub logical_block_bytes: u32,
    /// Nothing may be written.
    pub read_only: bool,
    /// `Flush` does something: writes are not durable before it.
    pub flush: bool,
    /// `Discard` is possible.
    pub discard: bool,
    /// `WriteZeroes` is possible.
    pub write_zeroes: bool,
    /// `SecureErase` is possible.
    pub secure_erase: bool,
}

impl Geometry {
    /// A writable disk of `bytes` bytes, rounded down to whole sectors, in units of 512 bytes, without any of what is
    /// optional.
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        Self {
            bytes: bytes & !511,
            block_bytes: 512,
            logical_block_bytes: 512,
            read_only: false,
            flush: false,
            discard: false,
            write_zeroes: false,
            secure_erase: false,
        }
    }
}

/// What to do. Ranges are checked by the device: they lie within the capacity, offsets and lengths are multiples of
/// 512, and nothing but `Read` and `Flush` reaches a read-only backend.
///
/// No order holds between operations in flight together, except that `Flush` covers the writes that were done
/// before it was submitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// Storage to the chain's writable buffers, all but their last byte.
    Read,
    /// The chain's readable buffers, from byte [`Op::DATA_OFFSET`] on, to storage.
    Write,
    /// All writes that were completed become durable.
    Flush,
    /// The range need not be kept; it may read as anything until written.
    Discard,
    /// The range reads as zeros.
    WriteZeroes {
        /// Space may be given back.
        unmap: bool,
    },
    /// No trace of the range is left, nor of copies that the storage made of it.
    SecureErase,
}

/// One request on its way to storage.
#[derive(Debug)]
pub struct Op {
    /// The chain that the request came in; it holds the buffers.
    pub token: Token,
    /// What to do.
    pub kind: OpKind,
    /// Where, in bytes.
    pub offset: u64,
    /// How much, in bytes; 0 for `Flush`, never 0 otherwise.
    pub len: u64,
    /// Of a write: it is over when it is durable. Only for channels that do that ([`Channel::writes_durably`]).
    pub durable: bool,
}

impl Op {
    /// Where a write's data begin in the chain's readable buffers: behind the request header.
    pub const DATA_OFFSET: usize = 16;
}

/// How a request ended: the status byte of virtio-blk (virtio 1.2, section 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// Failed.
    IoError = 1,
    /// Not something this device does.
    Unsupported = 2,
}

/// One request on its way back.
#[derive(Debug)]
pub struct Done {
    /// The chain that the request came in.
    pub token: Token,
    /// How it ended.
    pub status: Status,
}

/// Why storage could not be opened or resized. The message says what was being done, with what, and what is allowed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BackendError(pub String);

/// Opens a queue's way to the storage, on the I/O thread that will use it.
///
/// # Errors
/// A resource is missing; the queue then answers every request with an I/O error.
pub type ChannelBuilder = Box<dyn FnOnce() -> Result<Box<dyn Channel>, BackendError> + Send>;

/// Storage, shared by the queues of a device.
pub trait Backend: Send + Sync {
    /// What kind of storage this is, now.
    fn geometry(&self) -> Geometry;

    /// Prepares a queue's way to the storage. Called on a control thread, where it may wait; what it returns must not,
    /// and holds whatever must be had for as long as the channel. `memory` is the guest's, in which all buffers lie;
    /// `depth` is the most requests that are ever in flight.
    ///
    /// # Errors
    /// The storage is not to be had now: the queue does not start.
    fn channel(&self, memory: &Arc<Memory>, depth: u16) -> Result<ChannelBuilder, BackendError>;

    /// How many descriptors each channel takes.
    fn channel_descriptors(&self) -> u32 {
        0
    }

    /// Bytes that there are now, which differs from what `geometry` says where somebody else has changed them.
    ///
    /// # Errors
    /// It cannot be found out.
    fn bytes_now(&self) -> Result<u64, BackendError> {
        Ok(self.geometry().bytes)
    }

    /// Grows or shrinks the storage, or takes over a size that it was given from outside (`bytes` None). The new size is
    /// durable. Requests that were checked against a larger size may still be under way; they fail or not, but do no
    /// harm.
    ///
    /// # Errors
    /// The storage cannot have that size, or it is not durable; `geometry` tells which it has.
    fn resize(&self, bytes: Option<u64>) -> Result<Geometry, BackendError>;

    /// Leaves nothing that was written on any channel in this host's memory alone. Called on a control thread. That is a
    /// flush, unless the storage knows better.
    ///
    /// # Errors
    /// Something may be left.
    fn settle(&self) -> Result<(), BackendError> {
        let Geometry { flush, read_only, .. } = self.geometry();
        if flush && !read_only { self.flush() } else { Ok(()) }
    }

    /// Makes all writes durable that were completed on any channel. Called on a control thread, where it may wait.
    ///
    /// # Errors
    /// They are not durable. So it is where writes need a flush and the backend has none outside of its channels.
    fn flush(&self) -> Result<(), BackendError> {
        if self.geometry().flush {
            return Err(BackendError("flushing: this storage can be flushed by its queues only".to_owned()));
        }
        Ok(())
    }
}

/// One queue's way to the storage.
///
/// Dropping it with requests in flight is possible (the I/O thread was torn down) and must leave nothing behind that
/// still reaches guest memory once the memory map is gone.
pub trait Channel {
    /// Starts requests from the front of `ops` and removes them; what is left could not be taken now and is offered
    /// again with the next burst. Requests that are over at once go to `done`. With nothing in flight, at least one
    /// is taken.
    ///
    /// `chains` holds the buffers. The slices it lends end with the call; the memory they point to stays mapped, and
    /// the chain's, until its token is in `done`.
    fn submit(&mut self, ops: &mut Vec<Op>, chains: &Chains, done: &mut Vec<Done>);

    /// Collects requests that are over. Does not block, and costs next to nothing if there are none.
    fn reap(&mut self, chains: &Chains, done: &mut Vec<Done>);

    /// Requests started and not collected, and what is done for other queues. Unless none, it cannot be dropped without
    /// harm.
    fn in_flight(&self) -> usize;

    /// Whether [`Channel::reap`] has something to do though no request is in flight: for other queues of the storage.
    fn has_work(&self) -> bool {
        false
    }

    /// No request comes any more: nothing is to be taken on for other queues that they can do.
    fn retire(&mut self) {}

    /// Whether it heeds [`Op::durable`]. If not, a write that is to be durable is followed by a flush.
    fn writes_durably(&self) -> bool {
        false
    }

    /// A descriptor that becomes readable (edge-triggered) when requests are over, if any ever are later.
    fn completion_fd(&self) -> Option<RawFd> {
        None
    }

    /// The thread is about to sleep: completions must become visible on the descriptor. True if some are waiting.
    fn arm(&mut self) -> bool {
        false
    }

    /// The thread polls again: completions need not show on the descriptor.
    fn disarm(&mut self) {}
}

/// The way to storage that cannot be reached: every request fails.
pub(crate) struct Unreachable;

impl Channel for Unreachable {
    fn submit(&mut self, ops: &mut Vec<Op>, _chains: &Chains, done: &mut Vec<Done>) {
        done.extend(ops.drain(..).map(|op| Done { token: op.token, status: Status::IoError }));
    }

    fn reap(&mut self, _chains: &Chains, _done: &mut Vec<Done>) {}

    fn in_flight(&self) -> usize {
        0
    }
}

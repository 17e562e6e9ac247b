//! Guest memory registered with io_uring: its pages are looked up and pinned once instead of per request.
#![allow(unsafe_code)]

use io_uring::IoUring;
use reactor::LogLimit;
use virtio::Memory;

use crate::data::Piece;

/// The most bytes that io_uring takes as one buffer.
const BUFFER_BYTES_MAX: usize = 1 << 30;

/// One registered buffer.
#[derive(Clone, Copy, Debug)]
struct Buffer {
    start: usize,
    len: usize,
    index: u16,
}

impl Buffer {
    fn holds(&self, piece: &Piece) -> bool {
        let offset = piece.ptr.addr().wrapping_sub(self.start);
        offset < self.len && piece.len <= self.len - offset
    }
}

/// The registered buffers of a ring.
#[derive(Debug)]
pub(super) struct FixedBuffers {
    /// Sorted by address.
    buffers: Box<[Buffer]>,
    /// The one that was hit last.
    last: Buffer,
}

impl FixedBuffers {
    /// Registers all of `memory`; None if the system will not have it.
    pub(super) fn register(uring: &IoUring, memory: &Memory) -> Option<Self> {
        let mut vectors = Vec::new();
        for region in memory.regions() {
            let (base, mut from) = (region.backing().base().as_ptr(), 0);
            while from < region.backing().len() {
                let len = (region.backing().len() - from).min(BUFFER_BYTES_MAX);
                vectors.push(libc::iovec { iov_base: base.wrapping_add(from).cast(), iov_len: len });
                from += len;
            }
        }
        vectors.sort_unstable_by_key(|v| v.iov_base.addr());
        // SAFETY: the ranges are mapped, and the owner of the ring keeps them so for as long as the ring exists.
        if let Err(error) = unsafe { uring.submitter().register_buffers(&vectors) } {
            // A guest can start its queues as often as it likes.
            static LIMIT: LogLimit = LogLimit::new();
            if LIMIT.admits() {
                tracing::warn!(%error, "guest memory cannot be pinned: going on without");
            }
            return None;
        }
        let buffers: Box<[Buffer]> = vectors
            .iter()
            .zip(0..)
            .map(|(v, index)| Buffer { start: v.iov_base.addr(), len: v.iov_len, index })
            .collect();
        Some(Self { last: *buffers.first()?, buffers })
    }

    /// The buffer that all of the piece lies in.
    #[inline(always)]
    pub(super) fn index(&mut self, piece: &Piece) -> Option<u16> {
        if !self.last.holds(piece) {
            let after = self.buffers.partition_point(|buffer| buffer.start <= piece.ptr.addr());
            self.last = *self.buffers.get(after.checked_sub(1)?)?;
        }
        self.last.holds(piece).then_some(self.last.index)
    }
}

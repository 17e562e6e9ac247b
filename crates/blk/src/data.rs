//! Where in guest memory an operation's data are.

use virtio::Segment;
use virtio::ring::Chain;

use crate::backend::{Op, OpKind};

/// A contiguous piece of guest memory: an address to copy to or from, or to point the kernel at. It stays mapped as
/// long as the operation's chain is in flight.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub(crate) ptr: *mut u8,
    pub(crate) len: usize,
}

/// The pieces that hold the data of an operation, in order; never empty ones.
#[derive(Clone, Debug)]
pub(crate) struct Pieces<'a> {
    segments: &'a [Segment],
    skip: usize,
    left: u64,
}

impl<'a> Pieces<'a> {
    /// The `len` bytes from byte `from` of the data on. `kind` is `Read` or `Write`; nothing else has data.
    #[inline(always)]
    pub(crate) fn new(kind: OpKind, chain: Chain<'a>, from: u64, len: u64) -> Self {
        let (segments, skip) = match kind {
            OpKind::Read => (chain.writable, 0),
            _ => (chain.readable, Op::DATA_OFFSET),
        };
        Self { segments, skip: skip + from as usize, left: len }
    }
}

impl Iterator for Pieces<'_> {
    type Item = Piece;

    #[inline(always)]
    fn next(&mut self) -> Option<Piece> {
        while self.left > 0 {
            let (segment, rest) = self.segments.split_first()?;
            self.segments = rest;
            if self.skip >= segment.len() {
                self.skip -= segment.len();
                continue;
            }
            let here = (segment.len() - self.skip).min(usize::try_from(self.left).unwrap_or(usize::MAX));
            let ptr = segment.as_ptr().wrapping_add(self.skip);
            self.skip = 0;
            self.left -= here as u64;
            return Some(Piece { ptr, len: here });
        }
        None
    }
}

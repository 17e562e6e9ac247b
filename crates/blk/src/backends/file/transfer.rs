//! Transfers: work on ranges of open files, below the channels that requests come through.
//!
//! A raw file's channel makes one of each request; that of an image makes as many as the request has pieces, in several
//! files, and more for the image's own tables. How a transfer reaches the kernel is up to its [`Carrier`].

use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio::memory::scatter;
use virtio::ring::Chains;

use super::zero::zeros;
use crate::backend::{Op, OpKind, Status};
use crate::data::Pieces;

/// Work on a range of a file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Transfer {
    /// Which of the carrier's files.
    pub(crate) file: u8,
    /// What to do; never `SecureErase`.
    pub(crate) kind: OpKind,
    /// Of a write: it is over when it is durable.
    pub(crate) durable: bool,
    /// Where in the file, in bytes.
    pub(crate) offset: u64,
    /// How much, in bytes.
    pub(crate) len: u64,
    /// Where the bytes are that are read or written.
    pub(crate) data: Data,
}

/// Where the bytes of a read or a write are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Data {
    /// The data of the chain in this slot, from this byte on.
    Chain {
        /// The slot.
        slot: u16,
        /// Bytes before these.
        from: u64,
    },
    /// The buffer that comes with the transfer, all of it; or none are needed.
    Own,
}

impl Transfer {
    /// What a request asks of a raw file.
    #[inline(always)]
    pub(super) fn of_op(op: &Op) -> Self {
        let Op { kind, offset, len, durable, .. } = *op;
        let data = Data::Chain { slot: op.token.slot() as u16, from: 0 };
        Self { file: 0, kind, durable, offset, len, data }
    }

    /// Whether it writes what is durable only after a flush.
    #[inline(always)]
    pub(super) fn leaves_cached(&self) -> bool {
        matches!(self.kind, OpKind::WriteZeroes { .. }) || self.kind == OpKind::Write && !self.durable
    }

    /// Where the range ends, in bytes.
    #[inline(always)]
    pub(super) fn end(&self) -> u64 {
        self.offset + self.len
    }

    /// The pieces of guest memory for `len` bytes behind the first `progress` ones; none of a buffer of its own.
    #[inline(always)]
    pub(super) fn pieces<'a>(&self, chains: &'a Chains, progress: u64, len: u64) -> Option<Pieces<'a>> {
        match self.data {
            Data::Chain { slot, from } => {
                Some(Pieces::new(self.kind, chains.at(slot.into()), from + progress, len))
            }
            Data::Own => None,
        }
    }

    /// Copies `bytes` to where a read wants what is behind its first `progress` bytes.
    pub(super) fn deliver(&self, chains: &Chains, own: &mut [u8], progress: u64, bytes: &[u8]) {
        match self.data {
            Data::Chain { slot, from } => {
                scatter(chains.at(slot.into()).writable, (from + progress) as usize, bytes);
            }
            Data::Own => own[progress as usize..][..bytes.len()].copy_from_slice(bytes),
        }
    }

    /// Fills with zeros what a read wants behind its first `progress` bytes.
    #[cold]
    pub(super) fn deliver_zeros(&self, chains: &Chains, own: &mut [u8], mut progress: u64) {
        while progress < self.len {
            let bytes = zeros(self.len - progress);
            self.deliver(chains, own, progress, bytes);
            progress += bytes.len() as u64;
        }
    }
}

/// Fills `len` bytes of a read's data with zeros, from byte `from` on.
pub(crate) fn fill_with_zeros(chains: &Chains, slot: u16, from: u64, len: u64) {
    let data = Data::Chain { slot, from };
    let read = Transfer { file: 0, kind: OpKind::Read, durable: false, offset: 0, len, data };
    read.deliver_zeros(chains, &mut [], 0);
}

/// Copies `bytes` to a read's data, from byte `from` on.
pub(crate) fn scatter_data(chains: &Chains, slot: u16, from: u64, bytes: &[u8]) {
    scatter(chains.at(slot.into()).writable, from as usize, bytes);
}

/// A transfer that is over.
#[derive(Debug)]
pub(crate) struct Ended {
    /// As it was started.
    pub(crate) id: usize,
    /// How it ended.
    pub(crate) status: Status,
    /// The buffer that came with it.
    pub(crate) own: Vec<u8>,
}

/// A thread's way to some files.
pub(crate) trait Carrier {
    /// Begins a transfer, under a number below the carrier's depth that no other has now. `own` is its buffer, if it is to
    /// have one: as long as the transfer. It may be over at once.
    fn start(&mut self, id: usize, transfer: Transfer, own: Vec<u8>, chains: &Chains, ended: &mut Vec<Ended>);

    /// Shows the kernel what was begun.
    fn submit(&mut self);

    /// Collects transfers that are over. Does not block.
    fn reap(&mut self, chains: &Chains, ended: &mut Vec<Ended>);

    /// Transfers begun and not collected.
    fn in_flight(&self) -> usize;

    /// A descriptor that is readable when transfers are over, if armed. Others may write to it to wake the thread.
    fn event(&self) -> &Arc<OwnedFd>;

    /// Makes ends show on the descriptor; true if there is something to do already.
    fn arm(&mut self) -> bool;

    /// Makes them no longer show.
    fn disarm(&mut self);

    /// Whether it had to leave transfers to the kernel, which may carry them out at any time: so it may be when this is
    /// dropped. Waits for them first, for a while.
    fn abandons(&mut self) -> bool;
}

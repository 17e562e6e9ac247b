//! Reads and writes in place: one system call per request, and the I/O thread waits for it.
//!
//! Right for files whose pages are memory, where no request waits for a device. Elsewhere it stands in for io_uring where
//! that is refused, and keeps what was promised of the page cache.
#![allow(unsafe_code)]

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::fallocate;
use rustix::io::{Errno, ReadWriteFlags, pread, pwrite, pwritev2};
use virtio::ring::Chains;

use super::blocks::Need;
use super::bounce::{Bounce, Span};
use super::hold::Hold;
use super::transfer::{Data, Transfer};
use super::zero::{Step, zeros};
use super::{DirectAlign, Opened};
use crate::backend::{Op, OpKind, Status};
use crate::backends::stepwise::Steps;

/// The most bytes moved for one transfer in one go. A multiple of every alignment.
const COPY_BYTES_MAX: u64 = 256 << 10;
/// The most bytes given back to the file system in one go.
const FREE_BYTES_MAX: u64 = 2 << 20;
/// The most pieces in one system call (`UIO_MAXIOV`).
const PIECES_MAX: usize = 1024;

/// The way to a file, in place.
pub(super) struct Inline {
    hold: Arc<Hold>,
    /// An open file of this thread's own, through the page cache.
    own: OwnedFd,
    pieces: Vec<libc::iovec>,
    bounce: Option<Bounce>,
}

/// What a step of a transfer is about: its bytes behind the first `progress` ones, and where they are.
struct Part<'a> {
    transfer: &'a Transfer,
    progress: u64,
    chains: &'a Chains,
    own: &'a mut [u8],
}

impl Part<'_> {
    fn offset(&self) -> u64 {
        self.transfer.offset + self.progress
    }

    fn left(&self) -> u64 {
        self.transfer.len - self.progress
    }
}

impl Inline {
    pub(super) fn new(hold: Arc<Hold>, own: OwnedFd) -> Self {
        Self { hold, own, pieces: Vec::with_capacity(PIECES_MAX), bounce: None }
    }

    fn file(&self) -> &Opened {
        self.hold.file()
    }

    /// Where data go.
    fn main(&self) -> BorrowedFd<'_> {
        self.file().direct.as_ref().map_or(self.own.as_fd(), |(direct, _)| direct.as_fd())
    }

    /// Does `work` while no other queue changes a part of the range's blocks; as after a signal, so that it is tried
    /// again, if one does.
    fn claimed(
        &self,
        offset: u64,
        len: u64,
        need: Need,
        work: impl FnOnce() -> Result<u64, Errno>,
    ) -> Result<u64, Errno> {
        let Some(blocks) = &self.file().blocks else { return work() };
        let claim = blocks.claim(offset, len, need).ok_or(Errno::INTR)?;
        let result = work();
        blocks.release(claim);
        result
    }

    /// Moves the next part of a transfer's data. 0 if there are none in the file.
    fn transfer(&mut self, part: &mut Part<'_>) -> Result<u64, Errno> {
        let (at, left) = (part.offset(), part.left().min(COPY_BYTES_MAX));
        let align = self.file().align();
        let len = align.map_or(left, |align| align.whole_blocks_of(left));
        self.pieces.clear();
        let Some(pieces) = part.transfer.pieces(part.chains, part.progress, len) else {
            if let Some(align) = align {
                return self.transfer_bounced(align, part);
            }
            let bytes = &mut part.own[part.progress as usize..][..len as usize];
            self.pieces.push(libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() });
            return self.vectored(part.transfer, at);
        };
        let fits = align.is_none_or(|DirectAlign { memory, file }| {
            (at | len).is_multiple_of(file)
                && pieces.clone().take(PIECES_MAX + 1).count() <= PIECES_MAX
                && pieces.clone().all(|p| (p.ptr.addr() | p.len) & (memory - 1) == 0)
        });
        if let Some(align) = align
            && !fits
        {
            return self.transfer_bounced(align, part);
        }
        self.pieces
            .extend(pieces.take(PIECES_MAX).map(|p| libc::iovec { iov_base: p.ptr.cast(), iov_len: p.len }));
        match part.transfer.kind {
            OpKind::Read => self.vectored(part.transfer, at),
            _ => self.claimed(at, len, Need::Shared, || self.vectored(part.transfer, at)),
        }
    }

    /// One call for the pieces.
    fn vectored(&self, transfer: &Transfer, at: u64) -> Result<u64, Errno> {
        let (fd, iov, count) =
            (self.main().as_raw_fd(), self.pieces.as_ptr(), self.pieces.len() as libc::c_int);
        let flags = if transfer.durable { libc::RWF_DSYNC } else { 0 };
        // SAFETY: the pieces are guest memory, mapped while the chain is in flight, which it is during this call, or the
        // transfer's own buffer, borrowed for it; the list is this object's own and as long as `count` says.
        let moved = unsafe {
            match transfer.kind {
                OpKind::Read => libc::preadv(fd, iov, count, at as libc::off_t),
                _ => libc::pwritev2(fd, iov, count, at as libc::off_t, flags),
            }
        };
        u64::try_from(moved)
            .map_err(|_| Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
    }

    /// The same through a buffer of our own, in whole blocks. Where a part of them is to be written, they are read first.
    #[cold]
    fn transfer_bounced(&mut self, align: DirectAlign, part: &mut Part<'_>) -> Result<u64, Errno> {
        let mut bounce = self.bounce.take().unwrap_or_else(Bounce::new);
        let result = self.through(&mut bounce, align, part);
        self.bounce = Some(bounce);
        result
    }

    fn through(&self, bounce: &mut Bounce, align: DirectAlign, part: &mut Part<'_>) -> Result<u64, Errno> {
        let span = Span::new(align.file, part.offset(), part.left());
        let Span { start, len, head, data } = span;
        let &mut Part { transfer, progress, chains, ref mut own } = part;
        if transfer.kind == OpKind::Read {
            let moved = span.part_of(pread(self.main(), bounce.bytes(len), start)?);
            transfer.deliver(chains, own, progress, &bounce.bytes(head + moved)[head..]);
            return Ok(moved as u64);
        }
        let need = if span.is_whole() { Need::Shared } else { Need::Exclusive };
        self.claimed(start, len as u64, need, || {
            // The blocks may not all be there any more.
            if !span.is_whole() && pread(self.main(), bounce.bytes(len), start)? != len {
                return Ok(0);
            }
            match (transfer.kind, transfer.data) {
                (OpKind::Write, Data::Chain { slot, from }) => {
                    let from = Op::DATA_OFFSET + (from + progress) as usize;
                    bounce.gather(head, chains.at(slot.into()).readable, from, data);
                }
                (OpKind::Write, Data::Own) => {
                    bounce.bytes(head + data)[head..].copy_from_slice(&own[progress as usize..][..data]);
                }
                _ => bounce.clear(head, data),
            }
            let flags = if transfer.durable { ReadWriteFlags::DSYNC } else { ReadWriteFlags::empty() };
            let moved = pwritev2(self.main(), &[IoSlice::new(bounce.bytes(len))], start, flags)?;
            Ok(span.part_of(moved) as u64)
        })
    }

    /// Does the next step of a transfer that zeroes or frees a range; how far it came.
    fn zero(&mut self, part: &mut Part<'_>) -> Result<u64, Errno> {
        let (offset, mut refusals) = (part.offset(), 0);
        loop {
            match self.file().zero_step(part.transfer, part.progress, refusals) {
                Step::Allocate { mode, len } => {
                    let len = len.min(FREE_BYTES_MAX);
                    let work = || fallocate(self.main(), mode, offset, len).map(|()| len);
                    match self.claimed(offset, len, Need::Shared, work) {
                        Err(Errno::OPNOTSUPP) => refusals += 1,
                        result => return result,
                    }
                }
                Step::Write { len } => {
                    let align = self.file().align();
                    let len = align.map_or(len, |align| align.whole_blocks_of(len.min(COPY_BYTES_MAX)));
                    if let Some(align) = align
                        && !(offset | len).is_multiple_of(align.file)
                    {
                        return self.transfer_bounced(align, part);
                    }
                    let work = || pwrite(self.main(), zeros(len), offset).map(|len| len as u64);
                    return self.claimed(offset, len, Need::Shared, work);
                }
                Step::Skip { len } => return Ok(len),
            }
        }
    }

    /// Does the next step of a transfer, behind its first `progress` bytes; how many are done then.
    #[inline(always)]
    pub(super) fn step(
        &mut self,
        transfer: &Transfer,
        own: &mut [u8],
        progress: u64,
        chains: &Chains,
    ) -> Result<u64, Status> {
        let mut part = Part { transfer, progress, chains, own };
        self.file().note_cached(transfer);
        let result = match transfer.kind {
            OpKind::Write if transfer.end() > self.file().bytes() => Err(Errno::IO),
            OpKind::Read | OpKind::Write => match self.transfer(&mut part) {
                Ok(0) if transfer.kind == OpKind::Read && self.file().options.image => {
                    transfer.deliver_zeros(chains, part.own, progress);
                    Ok(transfer.len - progress)
                }
                // The file was cut off below the capacity. What stood there is lost, and zeros would hide that.
                Ok(0) => Err(Errno::IO),
                Err(error) => {
                    self.file().note_failed(transfer, error);
                    Err(error)
                }
                other => other,
            },
            OpKind::Discard | OpKind::WriteZeroes { .. } if !self.file().still_has(transfer) => {
                Err(Errno::IO)
            }
            OpKind::Discard | OpKind::WriteZeroes { .. } => match self.zero(&mut part) {
                Ok(0) => Err(Errno::IO),
                Ok(_) if !self.file().still_has(transfer) => Err(Errno::IO),
                other => other,
            },
            OpKind::Flush => self.file().sync(&self.own).map(|()| 0),
            OpKind::SecureErase => Err(Errno::OPNOTSUPP),
        };
        self.file().keep_cut(transfer);
        match result {
            Ok(moved) => Ok(progress + moved),
            // A signal (tmpfs has undone what it had done), or others have the blocks now.
            Err(Errno::INTR) if transfer.kind != OpKind::Flush => Ok(progress),
            Err(error) => Err(self.file().report(transfer, error)),
        }
    }
}

impl Steps for Inline {
    fn writes_durably(&self) -> bool {
        true
    }

    fn step(&mut self, op: &Op, progress: u64, chains: &Chains) -> Result<u64, Status> {
        Self::step(self, &Transfer::of_op(op), &mut [], progress, chains)
    }
}

//! Reads and writes in place: one system call per request, and the I/O thread waits for it.
//!
//! Right for files whose pages are memory, where no request waits for a device. Elsewhere it stands in for io_uring where
//! that is refused, and keeps what was promised of the page cache.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{fallocate, fdatasync};
use rustix::io::{Errno, pread, pwrite};
use virtio::ring::Chains;

use super::blocks::Need;
use super::bounce::{Bounce, Span};
use super::hold::Hold;
use super::zero::{Step, zeros};
use super::{DirectAlign, Opened};
use crate::backend::{Op, OpKind, Status};
use crate::backends::stepwise::Steps;
use crate::data::Pieces;

/// The most bytes moved for one operation in one go. A multiple of every alignment.
const COPY_BYTES_MAX: u64 = 256 << 10;
/// The most bytes given back to the file system in one go.
const FREE_BYTES_MAX: u64 = 2 << 20;
/// The most pieces in one system call (`UIO_MAXIOV`).
const PIECES_MAX: usize = 1024;

/// The way to a file, in place.
pub(super) struct Inline {
    hold: Arc<Hold>,
    /// An open file of this queue's own, through the page cache.
    own: OwnedFd,
    pieces: Vec<libc::iovec>,
    bounce: Option<Bounce>,
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

    /// Does `work` while no other queue changes a part of the range's blocks; 0, so that it is tried again, if one does.
    fn claimed(
        &self,
        offset: u64,
        len: u64,
        need: Need,
        work: impl FnOnce() -> Result<u64, Errno>,
    ) -> Result<u64, Errno> {
        let Some(blocks) = &self.file().blocks else { return work() };
        // As after a signal.
        let claim = blocks.claim(offset, len, need).ok_or(Errno::INTR)?;
        let result = work();
        blocks.release(claim);
        result
    }

    /// Moves the next part of an operation's data. 0 if there are none in the file.
    fn transfer(&mut self, op: &Op, progress: u64, chains: &Chains) -> Result<u64, Errno> {
        let (at, left) = (op.offset + progress, (op.len - progress).min(COPY_BYTES_MAX));
        let align = self.file().align();
        let len = align.map_or(left, |align| align.whole_blocks_of(left));
        self.pieces.clear();
        let pieces = Pieces::new(op.kind, chains.get(&op.token), progress, len);
        let fits = align.is_none_or(|DirectAlign { memory, file }| {
            (at | len).is_multiple_of(file)
                && pieces.clone().take(PIECES_MAX + 1).count() <= PIECES_MAX
                && pieces.clone().all(|p| (p.ptr.addr() | p.len) & (memory - 1) == 0)
        });
        if let Some(align) = align
            && !fits
        {
            return self.transfer_bounced(align, op, progress, chains);
        }
        self.pieces
            .extend(pieces.take(PIECES_MAX).map(|p| libc::iovec { iov_base: p.ptr.cast(), iov_len: p.len }));
        match op.kind {
            OpKind::Read => self.vectored(op, at),
            _ => self.claimed(at, len, Need::Shared, || self.vectored(op, at)),
        }
    }

    /// One call for the pieces.
    fn vectored(&self, op: &Op, at: u64) -> Result<u64, Errno> {
        let (fd, iov, count) =
            (self.main().as_raw_fd(), self.pieces.as_ptr(), self.pieces.len() as libc::c_int);
        let flags = if op.durable { libc::RWF_DSYNC } else { 0 };
        // SAFETY: the pieces are guest memory, mapped while the chain is in flight, which it is during this call; the
        // list is this object's own and as long as `count` says.
        let moved = unsafe {
            match op.kind {
                OpKind::Read => libc::preadv(fd, iov, count, at as libc::off_t),
                _ => libc::pwritev2(fd, iov, count, at as libc::off_t, flags),
            }
        };
        u64::try_from(moved)
            .map_err(|_| Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
    }

    /// The same through a buffer of our own, in whole blocks. Where a part of them is to be written, they are read first.
    #[cold]
    fn transfer_bounced(
        &mut self,
        align: DirectAlign,
        op: &Op,
        progress: u64,
        chains: &Chains,
    ) -> Result<u64, Errno> {
        let mut bounce = self.bounce.take().unwrap_or_else(Bounce::new);
        let result = self.through(&mut bounce, align, op, progress, chains);
        self.bounce = Some(bounce);
        result
    }

    fn through(
        &self,
        bounce: &mut Bounce,
        align: DirectAlign,
        op: &Op,
        progress: u64,
        chains: &Chains,
    ) -> Result<u64, Errno> {
        let span = Span::new(align.file, op.offset + progress, op.len - progress);
        let Span { start, len, head, data } = span;
        let chain = chains.get(&op.token);
        if op.kind == OpKind::Read {
            let part = span.part_of(pread(self.main(), bounce.bytes(len), start)?);
            bounce.scatter(head, chain.writable, progress as usize, part);
            return Ok(part as u64);
        }
        let need = if span.is_whole() { Need::Shared } else { Need::Exclusive };
        self.claimed(start, len as u64, need, || {
            // The blocks may not all be there any more.
            if !span.is_whole() && pread(self.main(), bounce.bytes(len), start)? != len {
                return Ok(0);
            }
            match op.kind {
                OpKind::Write => {
                    bounce.gather(head, chain.readable, Op::DATA_OFFSET + progress as usize, data)
                }
                _ => bounce.clear(head, data),
            }
            let moved = pwrite(self.main(), bounce.bytes(len), start)?;
            if op.durable {
                fdatasync(self.main())?;
            }
            Ok(span.part_of(moved) as u64)
        })
    }

    /// Does the next step of an operation on a range; how far it came.
    fn zero(&mut self, op: &Op, progress: u64, chains: &Chains) -> Result<u64, Errno> {
        let (offset, mut refusals) = (op.offset + progress, 0);
        loop {
            match self.file().zero_step(op, progress, refusals) {
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
                        return self.transfer_bounced(align, op, progress, chains);
                    }
                    let work = || pwrite(self.main(), zeros(len), offset).map(|len| len as u64);
                    return self.claimed(offset, len, Need::Shared, work);
                }
                Step::Skip { len } => return Ok(len),
            }
        }
    }
}

impl Steps for Inline {
    fn writes_durably(&self) -> bool {
        true
    }

    fn step(&mut self, op: &Op, progress: u64, chains: &Chains) -> Result<u64, Status> {
        let result = match op.kind {
            OpKind::Write if op.offset + op.len > self.file().bytes() => Err(Errno::IO),
            // The file was cut off below the capacity. What stood there is lost, and zeros would hide that.
            OpKind::Read | OpKind::Write => match self.transfer(op, progress, chains) {
                Ok(0) => Err(Errno::IO),
                other => other,
            },
            OpKind::Discard | OpKind::WriteZeroes { .. } if !self.file().still_has(op) => Err(Errno::IO),
            OpKind::Discard | OpKind::WriteZeroes { .. } => match self.zero(op, progress, chains) {
                Ok(0) => Err(Errno::IO),
                Ok(_) if !self.file().still_has(op) => Err(Errno::IO),
                other => other,
            },
            OpKind::Flush => self.file().flushed(fdatasync(&self.own)).map(|()| 0),
            OpKind::SecureErase => Err(Errno::OPNOTSUPP),
        };
        self.file().keep_cut(op);
        match result {
            Ok(moved) => Ok(progress + moved),
            // A signal (tmpfs has undone what it had done), or others have the blocks now.
            Err(Errno::INTR) if op.kind != OpKind::Flush => Ok(progress),
            Err(error) => Err(self.file().report(op, error)),
        }
    }
}

//! Reads and writes in place: one system call per request, and the I/O thread waits for it.
//!
//! Right for files whose pages are memory, where no request waits for a device.
#![allow(unsafe_code)]

use std::os::fd::AsRawFd;
use std::sync::Arc;

use rustix::fs::{fallocate, fdatasync};
use rustix::io::Errno;
use virtio::ring::Chains;

use super::hold::Hold;
use super::uring::report;
use super::zero::{Step, zeros};
use crate::backend::{Op, OpKind, Status};
use crate::backends::stepwise::Steps;
use crate::data::Pieces;

/// The most bytes moved for one operation in one go.
const COPY_BYTES_MAX: u64 = 256 << 10;
/// The most bytes given back to the file system in one go.
const FREE_BYTES_MAX: u64 = 2 << 20;
/// The most pieces in one system call (`UIO_MAXIOV`).
const PIECES_MAX: usize = 1024;

/// The way to a file, in place.
pub(super) struct Inline {
    hold: Arc<Hold>,
    pieces: Vec<libc::iovec>,
}

impl Inline {
    pub(super) fn new(hold: Arc<Hold>) -> Self {
        Self { hold, pieces: Vec::with_capacity(PIECES_MAX) }
    }

    fn transfer(&mut self, kind: OpKind, at: u64, pieces: Pieces<'_>) -> Result<u64, Errno> {
        self.pieces.clear();
        self.pieces
            .extend(pieces.take(PIECES_MAX).map(|p| libc::iovec { iov_base: p.ptr.cast(), iov_len: p.len }));
        let (fd, iov, count) =
            (self.hold.file().buffered.as_raw_fd(), self.pieces.as_ptr(), self.pieces.len() as libc::c_int);
        // SAFETY: the pieces are guest memory, mapped while the chain is in flight, which it is during this call; the
        // list is a local one and as long as `count` says.
        let moved = unsafe {
            match kind {
                OpKind::Read => libc::preadv(fd, iov, count, at as libc::off_t),
                _ => libc::pwritev(fd, iov, count, at as libc::off_t),
            }
        };
        u64::try_from(moved)
            .map_err(|_| Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
    }

    /// Does the next step of an operation on a range; how far it came.
    fn zero(&self, op: &Op, progress: u64) -> Result<u64, Errno> {
        let (file, offset, mut refusals) = (self.hold.file(), op.offset + progress, 0);
        loop {
            match file.zero_step(op, progress, refusals) {
                Step::Allocate { mode, len } => {
                    let len = len.min(FREE_BYTES_MAX);
                    match fallocate(&file.buffered, mode, offset, len) {
                        Err(Errno::OPNOTSUPP) => refusals += 1,
                        result => return result.map(|()| len),
                    }
                }
                Step::Write { len } => {
                    return rustix::io::pwrite(&file.buffered, zeros(len), offset).map(|len| len as u64);
                }
                Step::Skip { len } => return Ok(len),
            }
        }
    }
}

impl Steps for Inline {
    fn step(&mut self, op: &Op, progress: u64, chains: &Chains) -> Result<u64, Status> {
        let (at, left) = (op.offset + progress, op.len - progress);
        let result = match op.kind {
            OpKind::Read | OpKind::Write => {
                let pieces = Pieces::new(op.kind, chains.get(&op.token), progress, left.min(COPY_BYTES_MAX));
                match self.transfer(op.kind, at, pieces) {
                    // The file was cut off below the capacity. What stood there is lost, and zeros would hide that.
                    Ok(0) => Err(Errno::IO),
                    Err(Errno::INTR) => Ok(0),
                    other => other,
                }
            }
            OpKind::Discard | OpKind::WriteZeroes { .. } => match self.zero(op, progress) {
                // A signal: tmpfs has undone what it had done.
                Err(Errno::INTR) => Ok(0),
                other => other,
            },
            OpKind::Flush => fdatasync(&self.hold.file().buffered).map(|()| 0),
            OpKind::SecureErase => Err(Errno::OPNOTSUPP),
        };
        result.map(|moved| progress + moved).map_err(|error| report(&self.hold.file().path, op, error))
    }
}

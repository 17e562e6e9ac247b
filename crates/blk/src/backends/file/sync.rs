//! Durability, and the truth about it when storage fails.
//!
//! The system reports a failed write-back once for each open file, to whoever asks first; then it takes the data for
//! written, and the page cache goes on showing what is not on disk. So each queue has an open file of its own and asks for
//! one thing at a time ([`Lane`]); and once a flush has failed, all do, for as long as the file is open here.
//!
//! Whatever may be told of a failed write-back tells [`Opened::flushed`]. Only a write that is to be durable may fail alone,
//! and only while nothing else was put into the page cache: else the error may have been that one's.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::Ordering;

use reactor::LogLimit;
use rustix::fs::{CWD, Mode, OFlags, fdatasync, ftruncate, openat};
use rustix::io::{Errno, retry_on_intr};

use super::transfer::Transfer;
use super::{Kind, Opened};
use crate::backend::{OpKind, Status};

/// Requests of one queue of which the system answers for one at a time: flushes, and writes through the page cache that are
/// to be durable.
#[derive(Debug, Default)]
pub(super) struct Lane {
    /// The slot whose turn it is.
    current: Option<usize>,
    /// Flushes for which it stands too.
    companions: Vec<usize>,
    waiting: VecDeque<usize>,
}

impl Lane {
    /// Whether it is the turn of `slot`. If not, it waits.
    pub(super) fn enter(&mut self, slot: usize) -> bool {
        match self.current {
            None => self.current = Some(slot),
            Some(current) if current == slot => {}
            Some(_) => {
                self.waiting.push_back(slot);
                return false;
            }
        }
        true
    }

    /// Ends the turn of `slot`, if it has it. Returns whose turn it is then, if that is another's who waited; a flush stands
    /// for all that wait.
    pub(super) fn leave(&mut self, slot: usize, is_flush: impl Fn(usize) -> bool) -> Option<usize> {
        if self.current != Some(slot) {
            return None;
        }
        self.current = self.waiting.pop_front();
        if self.current.is_some_and(&is_flush) {
            let Self { companions, waiting, .. } = self;
            waiting.retain(|&slot| {
                let flush = is_flush(slot);
                if flush {
                    companions.push(slot);
                }
                !flush
            });
        }
        self.current
    }

    /// The flushes for which the present one stands.
    pub(super) fn take_companions(&mut self) -> Vec<usize> {
        std::mem::take(&mut self.companions)
    }
}

impl Opened {
    /// An open file of a queue's own, through the page cache, on what is open already. Where it cannot be had, queues
    /// share one.
    pub(crate) fn open_again(&self) -> Result<OwnedFd, Errno> {
        let access = if self.options.read_only { OFlags::RDONLY } else { OFlags::RDWR };
        let path = format!("/proc/self/fd/{}", self.buffered.as_raw_fd());
        openat(CWD, path, access | OFlags::CLOEXEC, Mode::empty()).or_else(|error| {
            tracing::debug!(path = %self.path.display(), %error, "queues share one open file");
            rustix::io::fcntl_dupfd_cloexec(self.buffered.as_fd(), 0)
        })
    }

    /// Takes note that a transfer, which begins, puts something into the page cache.
    #[inline(always)]
    pub(super) fn note_cached(&self, transfer: &Transfer) {
        if transfer.leaves_cached() && self.direct.is_none() && !self.is_cached.load(Ordering::Relaxed) {
            self.is_cached.store(true, Ordering::SeqCst);
        }
    }

    /// Takes note that the system has failed a transfer.
    #[cold]
    pub(super) fn note_failed(&self, transfer: &Transfer, error: Errno) {
        let for_now = matches!(error, Errno::INTR | Errno::AGAIN);
        if transfer.durable && !for_now && self.is_cached.load(Ordering::SeqCst) {
            let _ = self.flushed(Err(error));
        }
    }

    /// Asks the system to make durable what was written through `fd`, and says what to answer.
    pub(super) fn sync(&self, fd: impl AsFd) -> Result<(), Errno> {
        self.flushed(retry_on_intr(|| fdatasync(fd.as_fd())))
    }

    /// What to answer a flush that the system answered with `result`.
    pub(super) fn flushed(&self, result: Result<(), Errno>) -> Result<(), Errno> {
        if let Err(error) = result
            && !self.flush_failed.swap(true, Ordering::SeqCst)
        {
            tracing::error!(path = %self.path.display(), %error, "flush failed: what was written may be lost, and every flush fails until the disk is opened anew");
        }
        if self.flush_failed.load(Ordering::SeqCst) { Err(Errno::IO) } else { Ok(()) }
    }

    /// Whether the file still has all that an operation is about. The system zeroes beyond the end without a word.
    pub(super) fn still_has(&self, transfer: &Transfer) -> bool {
        let there = super::open::size(&self.buffered).is_ok_and(|bytes| transfer.end() <= bytes);
        if !there && !self.short_said.swap(true, Ordering::Relaxed) {
            tracing::warn!(path = %self.path.display(), offset = transfer.offset, len = transfer.len, "the file was cut off: requests beyond its end fail");
        }
        there
    }

    /// Cuts the file off once more if `transfer`, which is over, may have made it longer than it is to be: it was under way when
    /// the size was changed.
    #[inline(always)]
    pub(super) fn keep_cut(&self, transfer: &Transfer) {
        if transfer.end() > self.bytes() && transfer.kind != OpKind::Read {
            self.cut_again();
        }
    }

    #[cold]
    fn cut_again(&self) {
        let _alone = self.sizing.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let bytes = self.bytes();
        if self.kind != Kind::Block
            && self.was_cut.load(Ordering::Relaxed)
            && super::open::size(&self.buffered).is_ok_and(|now| now > bytes)
            && let Err(error) = ftruncate(&self.buffered, bytes)
        {
            tracing::warn!(path = %self.path.display(), %error, "a write that was under way has undone a change of its size");
        }
    }

    /// Logs why a transfer failed, and says how to answer it.
    #[cold]
    pub(super) fn report(&self, transfer: &Transfer, error: Errno) -> Status {
        static LIMIT: LogLimit = LogLimit::new();
        if error == Errno::OPNOTSUPP {
            return Status::Unsupported;
        }
        if LIMIT.admits() {
            tracing::warn!(path = %self.path.display(), kind = ?transfer.kind, offset = transfer.offset, len = transfer.len, %error, "request failed");
        }
        Status::IoError
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_has_one_at_a_time_and_a_flush_stands_for_others() {
        let (mut lane, is_flush) = (Lane::default(), |slot: usize| slot >= 10);
        assert!(lane.enter(1) && lane.enter(1));
        assert!(![10, 2, 11, 12].into_iter().any(|slot| lane.enter(slot)));
        assert_eq!(lane.leave(2, is_flush), None, "it is not its turn");
        assert_eq!(lane.leave(1, is_flush), Some(10));
        assert!(lane.enter(10) && !lane.enter(13));
        assert_eq!(lane.take_companions(), [11, 12]);
        assert_eq!(lane.leave(10, is_flush), Some(2));
        assert_eq!(lane.leave(2, is_flush), Some(13));
        assert!(lane.take_companions().is_empty());
        assert_eq!(lane.leave(13, is_flush), None);
        assert!(lane.enter(3));
    }
}

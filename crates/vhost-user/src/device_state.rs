//! A device's own state on its way to or from a pipe, during a migration.
//!
//! The front end reads or writes the other end whenever it likes, while the session goes on answering. So the transfer
//! is a little state machine that moves what can be moved now; it has a limit in bytes and in time.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::fs::OFlags;
use rustix::io::Errno;

use virtio::Trust;

use crate::peer_fd::{PeerFdError, Stream};
use crate::request::Direction;

/// The most a device's state may take.
pub(crate) const STATE_BYTES_MAX: usize = 64 << 20;
/// How long the transfer may take.
pub(crate) const TRANSFER_DEADLINE: Duration = Duration::from_secs(30);
const CHUNK_BYTES: usize = 64 << 10;

/// Why a transfer failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TransferError {
    #[error("device state of more than {} MiB", STATE_BYTES_MAX >> 20)]
    TooLarge,
    #[error("the transfer of the device state took more than {} seconds", TRANSFER_DEADLINE.as_secs())]
    TooSlow,
    #[error("the device state cannot be transferred: {0}")]
    System(#[from] Errno),
}

/// A transfer that is under way.
pub(crate) struct Transfer {
    stream: Stream,
    direction: Direction,
    bytes: Vec<u8>,
    written: usize,
    deadline: Instant,
}

/// How far a transfer is.
pub(crate) enum Progress {
    /// It waits for the front end.
    Waiting,
    /// Done; what was read, if it was a load.
    Done(Vec<u8>),
}

impl Transfer {
    pub(crate) fn new(
        direction: Direction,
        fd: OwnedFd,
        state: Vec<u8>,
        trust: Trust,
    ) -> Result<Self, PeerFdError> {
        let access = match direction {
            Direction::Save => OFlags::WRONLY,
            Direction::Load => OFlags::RDONLY,
        };
        let stream = Stream::new(fd, access, trust)?;
        let deadline = Instant::now() + TRANSFER_DEADLINE;
        Ok(Self { stream, direction, bytes: state, written: 0, deadline })
    }

    pub(crate) fn direction(&self) -> Direction {
        self.direction
    }

    /// What to wait for before the next [`Transfer::advance`].
    pub(crate) fn events(&self) -> PollFlags {
        match self.direction {
            Direction::Save => PollFlags::OUT,
            Direction::Load => PollFlags::IN,
        }
    }

    /// When it has failed.
    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Moves what can be moved now.
    pub(crate) fn advance(&mut self) -> Result<Progress, TransferError> {
        loop {
            let moved = match self.direction {
                Direction::Save if self.written == self.bytes.len() => return Ok(Progress::Done(Vec::new())),
                Direction::Save => {
                    let end = self.bytes.len().min(self.written + CHUNK_BYTES);
                    self.stream.write(&self.bytes[self.written..end], None).map(|n| self.written += n)
                }
                Direction::Load => match self.read() {
                    Ok(0) => return Ok(Progress::Done(std::mem::take(&mut self.bytes))),
                    read => read.map(drop),
                },
            };
            match moved {
                Ok(()) if self.bytes.len() > STATE_BYTES_MAX => return Err(TransferError::TooLarge),
                Ok(()) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if Instant::now() >= self.deadline => return Err(TransferError::TooSlow),
                Err(Errno::AGAIN) => return Ok(Progress::Waiting),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn read(&mut self) -> Result<usize, Errno> {
        let start = self.bytes.len();
        self.bytes.resize(start + CHUNK_BYTES, 0);
        let read = self.stream.read(&mut self.bytes[start..]);
        self.bytes.truncate(start + *read.as_ref().unwrap_or(&0));
        read
    }
}

impl AsFd for Transfer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

//! A device's own state on its way to or from the front end, during a migration.
//!
//! Here it goes through a socket of our own; the thread of the connection moves it from or to the front end's pipe
//! ([`crate::intake`]). The front end reads or writes whenever it likes, while the session goes on answering. So the transfer
//! is a little state machine that moves what can be moved now; it has a limit in bytes and in time.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, Shutdown, recv, shutdown};

use crate::request::Direction;
use crate::wire::send;

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
    socket: OwnedFd,
    direction: Direction,
    bytes: Vec<u8>,
    written: usize,
    /// All is written, and the other side has been told so.
    is_sent: bool,
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
    pub(crate) fn new(direction: Direction, socket: OwnedFd, state: Vec<u8>) -> Self {
        let deadline = Instant::now() + TRANSFER_DEADLINE;
        Self { socket, direction, bytes: state, written: 0, is_sent: false, deadline }
    }

    pub(crate) fn direction(&self) -> Direction {
        self.direction
    }

    /// What to wait for before the next [`Transfer::advance`].
    pub(crate) fn events(&self) -> PollFlags {
        match self.direction {
            Direction::Save if !self.is_sent => PollFlags::OUT,
            Direction::Save => PollFlags::IN,
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
                Direction::Save if self.written == self.bytes.len() => match self.acknowledgement() {
                    Ok(0) => Err(Errno::PIPE),
                    Ok(_) => return Ok(Progress::Done(Vec::new())),
                    Err(error) => Err(error),
                },
                Direction::Save => {
                    let end = self.bytes.len().min(self.written + CHUNK_BYTES);
                    send(self.socket.as_fd(), &self.bytes[self.written..end], None).map(|n| self.written += n)
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

    /// Says that this was all, and hears a byte when it has reached the front end's file.
    fn acknowledgement(&mut self) -> Result<usize, Errno> {
        if !std::mem::replace(&mut self.is_sent, true) {
            shutdown(&self.socket, Shutdown::Write)?;
        }
        recv(&self.socket, &mut [0], RecvFlags::DONTWAIT).map(|(bytes, _)| bytes)
    }

    fn read(&mut self) -> Result<usize, Errno> {
        let start = self.bytes.len();
        self.bytes.resize(start + CHUNK_BYTES, 0);
        let read = recv(&self.socket, &mut self.bytes[start..], RecvFlags::DONTWAIT).map(|(bytes, _)| bytes);
        self.bytes.truncate(start + *read.as_ref().unwrap_or(&0));
        read
    }
}

impl AsFd for Transfer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

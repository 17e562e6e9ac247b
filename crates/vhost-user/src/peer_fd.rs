//! Descriptors that the front end chose and that this process will use for as long as a queue runs.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use reactor::WatchError;
use rustix::fs::{FileType, Mode, OFlags, fstat, open};

/// Why a descriptor was refused.
#[derive(Debug, thiserror::Error)]
pub enum PeerFdError {
    /// Not an eventfd, pipe or socket.
    #[error(transparent)]
    Kind(#[from] WatchError),
    /// The system refused.
    #[error("cannot use the descriptor: {0}")]
    System(#[from] rustix::io::Errno),
}

/// Checks a descriptor that is waited on.
pub(crate) fn to_wait_on(fd: OwnedFd) -> Result<OwnedFd, PeerFdError> {
    reactor::check_peer_fd(fd.as_fd())?;
    Ok(fd)
}

/// Checks a descriptor that is written to, and makes sure that writing does not block.
///
/// `O_NONBLOCK` belongs to the open file, which the front end shares and could clear again. So a pipe is opened once
/// more, as a file of our own. (Sockets are non-blocking by the flags of each call. Of an eventfd there is only the
/// one file; writing to it blocks if the front end fills it to the brim, which serves nobody.)
pub(crate) fn to_write_to(fd: OwnedFd) -> Result<OwnedFd, PeerFdError> {
    reactor::check_peer_fd(fd.as_fd())?;
    reopen_pipe(fd, OFlags::WRONLY)
}

/// Replaces a pipe by a non-blocking file of our own; anything else is made non-blocking as far as it goes.
pub(crate) fn reopen_pipe(fd: OwnedFd, access: OFlags) -> Result<OwnedFd, PeerFdError> {
    // `check_peer_fd` has made sure that this asks no file system.
    if FileType::from_raw_mode(fstat(&fd)?.st_mode) == FileType::Fifo {
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let flags = access | OFlags::NONBLOCK | OFlags::CLOEXEC;
        if let Ok(own) = open(&*path, flags, Mode::empty()) {
            return Ok(own);
        }
    }
    // Not a pipe, or no /proc: the flag of the shared file.
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
    Ok(fd)
}

//! Descriptors that the front end chose and that this process will use for as long as a queue runs.
//!
//! `O_NONBLOCK` belongs to the open file, which the front end shares and could clear again. So a pipe is opened once
//! more, as a file of our own, and sockets are used with the non-blocking flag of each call. Of an eventfd, or of a pipe
//! that another user made or that has a name, there is only the one file: calls on it are watched, and the first one that blocks is the
//! last ([`Trust`]).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use reactor::WatchError;
use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, StatxFlags, fcntl_getfl, fcntl_setfl, open, readlink, statx,
};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SocketType, recv, sockopt};
use virtio::Trust;

use crate::wire::send;

/// Why a descriptor was refused.
#[derive(Debug, thiserror::Error)]
pub enum PeerFdError {
    /// Not an eventfd, pipe or socket.
    #[error(transparent)]
    Kind(#[from] WatchError),
    /// An eventfd, say, where bytes are to flow.
    #[error("not a pipe or stream socket")]
    NotAStream,
    /// The system refused.
    #[error("cannot use the descriptor: {0}")]
    System(#[from] Errno),
}

/// Checks a descriptor that is waited on.
pub(crate) fn to_wait_on(fd: OwnedFd) -> Result<OwnedFd, PeerFdError> {
    reactor::check_peer_fd(fd.as_fd())?;
    Ok(fd)
}

/// Checks a descriptor that announces something by being written to.
pub(crate) fn to_signal(fd: OwnedFd) -> Result<OwnedFd, PeerFdError> {
    reactor::check_peer_fd(fd.as_fd())?;
    match kind(&fd)? {
        FileType::Fifo => Ok(own_pipe(fd, OFlags::WRONLY)?),
        _ => Ok(fd),
    }
}

/// A pipe or stream socket of the front end's. No operation on it blocks for long, or more than once.
pub(crate) struct Stream {
    fd: OwnedFd,
    is_socket: bool,
    trust: Trust,
}

impl Stream {
    /// Checks a descriptor on which bytes are to flow; `access` is what is done with it if it is a pipe.
    pub(crate) fn new(fd: OwnedFd, access: OFlags, trust: Trust) -> Result<Self, PeerFdError> {
        reactor::check_peer_fd(fd.as_fd())?;
        match kind(&fd)? {
            FileType::Fifo => Ok(Self { fd: own_pipe(fd, access)?, is_socket: false, trust }),
            FileType::Socket if sockopt::socket_type(&fd)? == SocketType::STREAM => {
                Ok(Self { fd, is_socket: true, trust })
            }
            _ => Err(PeerFdError::NotAStream),
        }
    }

    /// Whether descriptors can be sent along.
    pub(crate) fn is_socket(&self) -> bool {
        self.is_socket
    }

    /// Whether it has been made blocking.
    pub(crate) fn is_hostile(&self) -> bool {
        self.trust.is_lost()
    }

    /// Writes what there is room for. A descriptor goes with the first byte, on a socket.
    pub(crate) fn write(&self, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<usize, Errno> {
        if self.is_socket {
            send(self.as_fd(), bytes, fd)
        } else {
            self.trust.attempt(|| rustix::io::write(&self.fd, bytes))
        }
    }

    /// Reads what there is; 0 at the end.
    pub(crate) fn read(&self, to: &mut [u8]) -> Result<usize, Errno> {
        if self.is_socket {
            Ok(recv(&self.fd, to, RecvFlags::DONTWAIT)?.0)
        } else {
            self.trust.attempt(|| rustix::io::read(&self.fd, to))
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What a descriptor is, without asking a file system that the front end may serve: a named pipe can be on one.
fn kind(fd: &OwnedFd) -> Result<FileType, Errno> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    Ok(FileType::from_raw_mode(statx(fd, c"", flags, StatxFlags::TYPE)?.stx_mode.into()))
}

fn own_pipe(fd: OwnedFd, access: OFlags) -> Result<OwnedFd, Errno> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    // Opening a named one would ask its file system; other names begin with a slash.
    let has_no_name = readlink(&*path, Vec::new()).is_ok_and(|name| name.to_bytes().starts_with(b"pipe:["));
    if has_no_name && let Ok(own) = open(&*path, access | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()) {
        return Ok(own);
    }
    // Named, or of another user, or no /proc: the flag of the shared file has to do.
    fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
    Ok(fd)
}

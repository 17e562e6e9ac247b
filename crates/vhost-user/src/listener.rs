//! The socket that front ends connect to.
//!
//! A service that was killed leaves its socket file behind. Such a file is recognised by connecting to it, and
//! replaced; one that somebody still listens on is refused, with their process ID; anything that is no socket is never
//! touched. On exit the file is removed, if it is still ours.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, chmod, fchmod, lstat, unlink};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with, sockopt,
};

/// Front ends that may wait to be told that the device is taken.
const BACKLOG: i32 = 16;

/// Why nobody can connect.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process listens there.
    #[error("{} is in use by process {}", path.display(), pid.map_or("?".to_owned(), |pid| pid.to_string()))]
    InUse {
        /// The socket.
        path: PathBuf,
        /// Who has it, if that could be found out.
        pid: Option<i32>,
    },
    /// There is something else.
    #[error("{} exists and is not a socket", path.display())]
    NotASocket {
        /// What was to be the socket.
        path: PathBuf,
    },
    /// The system refused.
    #[error("cannot {what} {}: {source}", path.display())]
    System {
        /// What was being done.
        what: &'static str,
        /// To which socket.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
}

/// A listening Unix socket, non-blocking, and its file, which goes with it.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
    /// Device and inode of the file.
    identity: (u64, u64),
}

impl Listener {
    /// Listens at `path`, whose permissions are set to `mode`.
    ///
    /// # Errors
    /// See [`ListenError`].
    pub fn new(path: &Path, mode: u32) -> Result<Self, ListenError> {
        let system = |what| move |errno: Errno| system(what, path, errno);
        let address = SocketAddrUnix::new(path).map_err(system("use as the name of a socket"))?;
        let socket = stream_socket().map_err(system("make a socket for"))?;
        // The file is made with the permissions of the socket (less those in the umask), so that it never has more than
        // it should.
        fchmod(&socket, Mode::from_raw_mode(mode)).map_err(system("set the permissions of"))?;
        if let Err(errno) = bind(&socket, &address) {
            if errno != Errno::ADDRINUSE {
                return Err(system("listen on")(errno));
            }
            remove_stale(path, &address)?;
            bind(&socket, &address).map_err(system("listen on"))?;
        }
        let found = lstat(path).map_err(system("examine"))?;
        let listener =
            Self { socket: socket.into(), path: path.to_owned(), identity: (found.st_dev, found.st_ino) };
        chmod(path, Mode::from_raw_mode(mode)).map_err(system("set the permissions of"))?;
        listen(&listener.socket, BACKLOG).map_err(system("listen on"))?;
        Ok(listener)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next peer, if one waits.
    ///
    /// # Errors
    /// The system refuses to accept, for want of descriptors for example.
    pub fn accept(&self) -> std::io::Result<Option<UnixStream>> {
        match self.socket.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => Ok(None),
            // It has gone again.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionAborted => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let ours = lstat(&self.path).is_ok_and(|found| (found.st_dev, found.st_ino) == self.identity);
        if ours && let Err(error) = unlink(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "socket not removed");
        }
    }
}

fn stream_socket() -> Result<OwnedFd, Errno> {
    socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)
}

/// Removes a socket file on which nobody listens.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), ListenError> {
    let system = |what| move |errno: Errno| system(what, path, errno);
    let found = lstat(path).map_err(system("examine"))?;
    if FileType::from_raw_mode(found.st_mode) != FileType::Socket {
        return Err(ListenError::NotASocket { path: path.to_owned() });
    }
    let probe = stream_socket().map_err(system("make a socket for"))?;
    let in_use = |pid| Err(ListenError::InUse { path: path.to_owned(), pid });
    match connect(&probe, address) {
        Err(Errno::CONNREFUSED) => {}
        Ok(()) => {
            let owner = sockopt::socket_peercred(&probe).map(|cred| cred.pid.as_raw_nonzero().get());
            return in_use(owner.ok());
        }
        // Its backlog is full.
        Err(Errno::AGAIN) => return in_use(None),
        Err(errno) => return Err(system("find out who uses")(errno)),
    }
    // Somebody else may have replaced it by now, and listens.
    let again = lstat(path).map_err(system("examine"))?;
    if (again.st_dev, again.st_ino) != (found.st_dev, found.st_ino) {
        return in_use(None);
    }
    tracing::info!(path = %path.display(), "replacing the socket of a service that is gone");
    unlink(path).map_err(system("remove"))
}

fn system(what: &'static str, path: &Path, errno: Errno) -> ListenError {
    ListenError::System { what, path: path.to_owned(), source: errno.into() }
}

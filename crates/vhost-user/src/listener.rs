//! The socket that front ends connect to.
//!
//! A service that was killed leaves its socket file behind. Such a file is recognised by connecting to it, and
//! replaced; one that somebody still listens on is refused, with their process ID; anything that is no socket is never
//! touched. On exit the file is removed, if it is still ours.
//!
//! Others may be able to write to the folder. Once made, the file is looked up one time, without following a symbolic
//! link, and what is given permissions and a group is what was found then: a socket of this user, or nothing.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, chmod, chownat, fchmod, fstat, lstat, openat, unlink,
};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, shutdown,
    socket_with, sockopt,
};

use crate::intake;

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
        Self::for_group(path, mode, None)
    }

    /// The same, and gives the socket to a group.
    ///
    /// # Errors
    /// See [`ListenError`].
    pub fn for_group(path: &Path, mode: u32, group: Option<u32>) -> Result<Self, ListenError> {
        let system = |what| move |errno: Errno| system(what, path, errno);
        let address = SocketAddrUnix::new(path).map_err(system("use as the name of a socket"))?;
        let socket = stream_socket().map_err(system("make a socket for"))?;
        // The file is made with the permissions of the socket (less those in the umask), so that it never has more than
        // it should, and with the group of this process.
        let first = if group.is_some() { mode & 0o700 } else { mode };
        fchmod(&socket, Mode::from_raw_mode(first)).map_err(system("set the permissions of"))?;
        if let Err(errno) = bind(&socket, &address) {
            if errno != Errno::ADDRINUSE {
                return Err(system("listen on")(errno));
            }
            remove_stale(path, &address)?;
            bind(&socket, &address).map_err(system("listen on"))?;
        }
        let (file, identity) = find(path)?;
        let listener = Self { socket: socket.into(), path: path.to_owned(), identity };
        give(&file, mode, group).map_err(system("set the group and the permissions of"))?;
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
        // Peers that were not accepted may have sent descriptors.
        intake::outlive(self.socket.as_fd());
    }
}

fn stream_socket() -> Result<OwnedFd, Errno> {
    socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)
}

/// The socket file that was just made, and its device and inode.
fn find(path: &Path) -> Result<(OwnedFd, (u64, u64)), ListenError> {
    let system = |what| move |errno: Errno| system(what, path, errno);
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = openat(CWD, path, flags, Mode::empty()).map_err(system("find"))?;
    let found = fstat(&file).map_err(system("examine"))?;
    let ours = FileType::from_raw_mode(found.st_mode) == FileType::Socket
        && found.st_uid == rustix::process::geteuid().as_raw();
    if ours {
        Ok((file, (found.st_dev, found.st_ino)))
    } else {
        Err(ListenError::NotASocket { path: path.to_owned() })
    }
}

fn give(file: &OwnedFd, mode: u32, group: Option<u32>) -> Result<(), Errno> {
    if let Some(group) = group {
        chownat(file, c"", None, Some(Gid::from_raw(group)), AtFlags::EMPTY_PATH)?;
    }
    if fstat(file)?.st_mode & 0o7777 == mode {
        return Ok(());
    }
    // The only way to a descriptor of this kind that older systems have too.
    chmod(format!("/proc/self/fd/{}", file.as_raw_fd()), Mode::from_raw_mode(mode))
}

/// Removes a socket file on which nobody listens.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), ListenError> {
    let system = |what| move |errno: Errno| system(what, path, errno);
    let found = lstat(path).map_err(system("examine"))?;
    if FileType::from_raw_mode(found.st_mode) != FileType::Socket {
        return Err(ListenError::NotASocket { path: path.to_owned() });
    }
    let probe = stream_socket().map_err(system("make a socket for"))?;
    // Whoever listens there is to send nothing, least of all descriptors.
    shutdown(&probe, Shutdown::Read).map_err(system("make a socket for"))?;
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

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("exitless-listener-{}-{name}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn what_is_put_in_the_place_of_the_socket_is_left_alone() {
        let folder = Folder::new("planted");
        let (victim, planted) = (folder.0.join("victim"), folder.0.join("a.sock"));
        fs::write(&victim, "").unwrap();
        let other = UnixListener::bind(folder.0.join("other.sock")).unwrap();
        for target in [victim.clone(), folder.0.join("other.sock")] {
            symlink(&target, &planted).unwrap();
            assert!(matches!(find(&planted), Err(ListenError::NotASocket { .. })), "{}", target.display());
            fs::remove_file(&planted).unwrap();
        }
        assert!(matches!(find(&victim), Err(ListenError::NotASocket { .. })));
        drop(other);
    }

    #[test]
    fn what_was_found_stays_what_is_changed() {
        let folder = Folder::new("swapped");
        let (victim, socket) = (folder.0.join("victim"), folder.0.join("a.sock"));
        fs::write(&victim, "").unwrap();
        fs::set_permissions(&victim, fs::Permissions::from_mode(0o600)).unwrap();
        let listener = Listener::new(&socket, 0o600).unwrap();
        let (file, _) = find(&socket).unwrap();
        fs::rename(&socket, folder.0.join("moved.sock")).unwrap();
        symlink(&victim, &socket).unwrap();
        give(&file, 0o666, Some(rustix::process::getegid().as_raw())).unwrap();
        let mode = |path: &Path| fs::symlink_metadata(path).unwrap().mode() & 0o7777;
        assert_eq!((mode(&victim), mode(&folder.0.join("moved.sock"))), (0o600, 0o666));
        drop(listener);
        assert!(fs::symlink_metadata(&socket).is_ok(), "no longer ours to remove");
    }

    #[test]
    fn permissions_are_as_asked_whatever_the_umask() {
        let folder = Folder::new("mode");
        for mode in [0o600, 0o660, 0o666, 0o777] {
            let path = folder.0.join(format!("{mode:o}.sock"));
            let group = rustix::process::getegid().as_raw();
            let _listener = Listener::for_group(&path, mode, Some(group)).unwrap();
            assert_eq!(fs::symlink_metadata(&path).unwrap().mode() & 0o7777, mode);
        }
    }
}

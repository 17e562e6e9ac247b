//! Descriptors of a peer, told apart without asking whoever may serve them.
//!
//! The names that the kernel gives to open files are its own: those of files in a file system begin with a slash, so
//! none can pass for an eventfd. (`/proc/…/fdinfo` would tell the same, but takes a lock of an epoll, which the peer
//! may hold.) The names are looked up for this thread: its table of descriptors is not the process's.

use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, StatxFlags, fcntl_getfl, fcntl_setfl, open, readlink, statx,
};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, sockopt};
use vhost::vhost_user::message::{FrontendReq, VhostTransferStateDirection};
use virtio::memory::Mapping;

use super::pair;
use super::pump::{End, Pump};

/// What becomes of a descriptor.
pub(super) enum Admitted {
    /// It goes to the control thread, and further.
    Passed(OwnedFd),
    /// It is served here; `ours` goes instead.
    Pumped {
        pump: Pump,
        ours: OwnedFd,
        /// Descriptors can be sent along.
        takes_fds: bool,
    },
    /// The message means nothing by it, or should not have it.
    Kept(OwnedFd),
    /// It cannot be what the message says it is.
    Refused(OwnedFd, String),
}

/// What a message has a descriptor for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To be waited on by an I/O thread.
    Kick,
    /// To be written to by an I/O thread.
    Signal,
    /// To be mapped.
    Memory,
    /// For this back end's own messages.
    Channel,
    /// For the device's state, out of the back end.
    Save,
    /// For the device's state, into it.
    Load,
    /// None.
    Nothing,
}

impl Purpose {
    pub(super) fn of(request: u32, body: &[u8]) -> Self {
        use FrontendReq as R;
        let saves = VhostTransferStateDirection::SAVE as u32;
        match FrontendReq::try_from(request) {
            Ok(R::SET_VRING_KICK) => Self::Kick,
            Ok(R::SET_VRING_CALL | R::SET_VRING_ERR) => Self::Signal,
            Ok(R::SET_MEM_TABLE | R::ADD_MEM_REG | R::SET_LOG_BASE | R::SET_INFLIGHT_FD) => Self::Memory,
            Ok(R::SET_BACKEND_REQ_FD) => Self::Channel,
            Ok(R::SET_DEVICE_STATE_FD) if body.starts_with(&saves.to_ne_bytes()) => Self::Save,
            Ok(R::SET_DEVICE_STATE_FD) => Self::Load,
            _ => Self::Nothing,
        }
    }

    /// Whether the descriptor may be of a kind that is served by the connection's thread.
    pub(super) fn may_be_pumped(self) -> bool {
        matches!(self, Self::Signal | Self::Channel | Self::Save | Self::Load)
    }
}

/// Decides what becomes of a descriptor.
pub(super) fn admit(purpose: Purpose, fd: OwnedFd) -> Admitted {
    let pumped = match purpose {
        Purpose::Nothing => return Admitted::Kept(fd),
        Purpose::Memory => {
            return match Mapping::check(&fd) {
                Ok(()) => Admitted::Passed(fd),
                Err(error) => Admitted::Refused(fd, error.to_string()),
            };
        }
        Purpose::Kick | Purpose::Signal if is_eventfd(&fd) => return Admitted::Passed(fd),
        Purpose::Kick => return Admitted::Refused(fd, "a kick must be an eventfd".to_owned()),
        Purpose::Signal => signal(fd),
        Purpose::Channel => channel(fd),
        Purpose::Save => state(fd, OFlags::WRONLY),
        Purpose::Load => state(fd, OFlags::RDONLY),
    };
    pumped.unwrap_or_else(|(fd, reason)| Admitted::Refused(fd, reason))
}

type Pumped = Result<Admitted, (OwnedFd, String)>;

/// User-Mode Linux listens on pipes.
fn signal(fd: OwnedFd) -> Pumped {
    match kind(&fd) {
        Kind::Pipe => {}
        _ => return Err((fd, "neither an eventfd nor a pipe".to_owned())),
    }
    let to = End::Pipe(own_pipe(fd, OFlags::WRONLY)?);
    use rustix::event::{EventfdFlags, eventfd};
    let made = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    let made = made.and_then(|ours| Ok((ours.try_clone().map_err(errno)?, ours)));
    with_pair(to, made, |from, to| Pump::new(End::Eventfd(from), to), false)
}

fn channel(fd: OwnedFd) -> Pumped {
    let (to, takes_fds) = match kind(&fd) {
        Kind::Pipe => (End::Pipe(own_pipe(fd, OFlags::WRONLY)?), false),
        Kind::Stream => (End::Socket(fd), true),
        Kind::Other => return Err((fd, "neither a pipe nor a Unix stream socket".to_owned())),
    };
    // Messages stay whole, and keep their descriptors.
    with_pair(to, pair(SocketType::SEQPACKET), |ours, to| Pump::new(End::Channel(ours), to), takes_fds)
}

fn state(fd: OwnedFd, access: OFlags) -> Pumped {
    let theirs = match kind(&fd) {
        Kind::Pipe => End::Pipe(own_pipe(fd, access)?),
        Kind::Stream => End::Socket(fd),
        Kind::Other => return Err((fd, "neither a pipe nor a Unix stream socket".to_owned())),
    };
    let pump = |ours, theirs| match access {
        OFlags::RDONLY => Pump::new(theirs, End::Socket(ours)),
        _ => Pump::acknowledging(End::Socket(ours), theirs),
    };
    with_pair(theirs, pair(SocketType::STREAM), pump, false)
}

/// Puts a pump between the peer's file and one end of `pair`; the other end goes to the control thread.
fn with_pair(
    theirs: End,
    pair: Result<(OwnedFd, OwnedFd), Errno>,
    pump: impl FnOnce(OwnedFd, End) -> Pump,
    takes_fds: bool,
) -> Pumped {
    match pair {
        Ok((here, ours)) => Ok(Admitted::Pumped { pump: pump(here, theirs), ours, takes_fds }),
        Err(error) => Err((theirs.into_fd(), format!("no file of our own to go with it: {error}"))),
    }
}

/// Kinds of files that can be pumped to and from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Pipe,
    /// A Unix stream socket.
    Stream,
    Other,
}

/// What a file is, without asking a file system that the peer may serve: a named pipe can be on one.
fn kind(fd: &OwnedFd) -> Kind {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let Ok(found) = statx(fd, c"", flags, StatxFlags::TYPE) else { return Kind::Other };
    match FileType::from_raw_mode(found.stx_mode.into()) {
        FileType::Fifo => Kind::Pipe,
        FileType::Socket
            if sockopt::socket_domain(fd) == Ok(AddressFamily::UNIX)
                && sockopt::socket_type(fd) == Ok(SocketType::STREAM) =>
        {
            Kind::Stream
        }
        _ => Kind::Other,
    }
}

fn is_eventfd(fd: &OwnedFd) -> bool {
    name(fd).is_some_and(|name| name == b"anon_inode:[eventfd]")
}

/// What the kernel calls the file.
fn name(fd: &OwnedFd) -> Option<Vec<u8>> {
    readlink(path(fd), Vec::new()).ok().map(|name| name.into_bytes())
}

fn path(fd: &OwnedFd) -> String {
    format!("/proc/thread-self/fd/{}", fd.as_raw_fd())
}

/// Opens a pipe once more, as a file of our own: `O_NONBLOCK` belongs to the open file, and a peer could clear it.
fn own_pipe(fd: OwnedFd, access: OFlags) -> Result<OwnedFd, (OwnedFd, String)> {
    // Opening a named one would ask its file system; other names begin with a slash.
    if name(&fd).is_some_and(|name| name.starts_with(b"pipe:[")) {
        match open(path(&fd), access | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()) {
            Ok(own) => return Ok(own),
            Err(Errno::NXIO) => return Err((fd, "a pipe that nobody reads".to_owned())),
            Err(_) => {}
        }
    }
    // Named, or of another user, or no /proc: the flag of the shared file has to do. Nobody else waits.
    match fcntl_getfl(&fd).and_then(|flags| fcntl_setfl(&fd, flags | OFlags::NONBLOCK)) {
        Ok(()) => Ok(fd),
        Err(error) => Err((fd, format!("a pipe whose flags cannot be set: {error}"))),
    }
}

fn errno(error: std::io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, epoll, eventfd};
    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    /// One file of each kind, the eventfd first.
    fn files() -> Vec<OwnedFd> {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let (stream, _) = pair(SocketType::STREAM).unwrap();
        let internet = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        vec![
            eventfd(0, EventfdFlags::CLOEXEC).unwrap(),
            epoll::create(epoll::CreateFlags::CLOEXEC).unwrap(),
            memfd_create("anon_inode:[eventfd]", MemfdFlags::CLOEXEC).unwrap(),
            read,
            write,
            stream,
            internet.into(),
            std::fs::File::open("/dev/null").unwrap().into(),
            std::fs::File::open("/").unwrap().into(),
        ]
    }

    #[test]
    fn only_an_eventfd_kicks() {
        let passed: Vec<bool> =
            files().into_iter().map(|fd| matches!(admit(Purpose::Kick, fd), Admitted::Passed(_))).collect();
        assert_eq!(passed.iter().position(|&passed| passed), Some(0));
        assert_eq!(passed.iter().filter(|&&passed| passed).count(), 1);
    }

    #[test]
    fn a_file_that_is_named_like_an_eventfd_is_none() {
        let path = std::env::temp_dir().join("anon_inode:[eventfd]");
        let file: OwnedFd = std::fs::File::create(&path).unwrap().into();
        std::fs::remove_file(path).unwrap();
        assert!(!is_eventfd(&file));
    }

    #[test]
    fn what_is_neither_pipe_nor_unix_socket_is_not_pumped() {
        for (i, fd) in files().into_iter().enumerate().skip(1) {
            let pumped = matches!(admit(Purpose::Channel, fd), Admitted::Pumped { .. });
            assert_eq!(pumped, matches!(i, 3..=5), "{i}");
        }
        // Not even a Unix socket is signalled.
        for (i, fd) in files().into_iter().enumerate().skip(1) {
            let pumped = matches!(admit(Purpose::Signal, fd), Admitted::Pumped { .. });
            assert_eq!(pumped, matches!(i, 3 | 4), "{i}");
        }
    }
}

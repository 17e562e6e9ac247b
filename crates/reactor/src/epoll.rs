//! Sleeping until a poller's descriptor has an edge, with descriptors that somebody hostile may have chosen.
//!
//! A vhost-user peer picks the file behind its kick descriptor. Hence:
//! - Every watch holds its **own duplicate**. An epoll registration lives as long as the open file, which the peer
//!   keeps open; the only way to be rid of it is to remove it through the descriptor number it was added with.
//!   The duplicate keeps that number ours until then, whatever the poller closes first.
//! - Descriptors are watched edge-triggered and never read, so a readable one wakes the thread once, not forever,
//!   and a peer that clears `O_NONBLOCK` cannot block it. (A pipe that is never read fills up after 64 KiB of
//!   kicks; an eventfd does not.)
//! - Files whose `poll` handler belongs to somebody else are refused before the kernel calls it: on FUSE it is a
//!   request that the peer's daemon may never answer. [`check_peer_fd`] refuses character devices for the same
//!   reason (CUSE); a poller's own descriptors may be such devices (TAP).

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::rc::Rc;

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::fs::{AtFlags, FileType, StatxFlags, statx};
use rustix::time::Timespec;

use crate::raw_fd::duplicate;

/// Events taken per wake-up. More that are ready end the next sleep at once.
const EVENTS_PER_WAIT: usize = 64;
/// Descriptors one poller may have watched. Each takes a duplicate.
pub const WAKE_FDS_MAX: usize = 64;

/// Why a descriptor cannot wake a thread.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// Not an open descriptor, or no more can be opened.
    #[error("cannot duplicate descriptor {fd}: {source}")]
    Duplicate {
        /// The number as given.
        fd: RawFd,
        /// `EBADF` if it is not open, `EMFILE` if the process has too many.
        source: std::io::Error,
    },
    /// A kind of file that has no edges, or whose readiness would be asked of somebody who may not answer.
    #[error("descriptor {fd} is a {kind}; only eventfds, pipes, sockets{devices} announce work")]
    Kind {
        /// The number as given.
        fd: RawFd,
        /// What it is instead.
        kind: &'static str,
        /// The other kinds allowed here.
        devices: &'static str,
    },
    /// The kernel refused to watch it.
    #[error("cannot watch descriptor {fd}: {source}")]
    Refused {
        /// The number as given.
        fd: RawFd,
        /// `EPERM` if the file cannot be polled, `ENOSPC` at the user's limit of watches, and so on.
        source: std::io::Error,
    },
    /// One poller wants more descriptors watched than the limit.
    #[error("{count} wake descriptors; at most {WAKE_FDS_MAX} are allowed")]
    TooMany {
        /// How many it asked for.
        count: usize,
    },
}

/// Checks that a descriptor which came from a peer is an eventfd, a pipe or a socket (or another anonymous file),
/// so that neither this process nor an I/O thread ever asks a file system of the peer's whether it is readable.
///
/// The check itself does not ask it either. Call it before a peer's kick descriptor becomes a wake descriptor.
///
/// # Errors
/// [`WatchError::Kind`] for any other file, [`WatchError::Refused`] if it cannot be told.
pub fn check_peer_fd(fd: BorrowedFd<'_>) -> Result<(), WatchError> {
    use std::os::fd::AsRawFd;
    check_kind(fd, fd.as_raw_fd(), "")
}

/// `devices` is empty if character devices are refused, else names them for the message.
fn check_kind(file: BorrowedFd<'_>, fd: RawFd, devices: &'static str) -> Result<(), WatchError> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let found = statx(file, c"", flags, StatxFlags::TYPE)
        .map_err(|source| WatchError::Refused { fd, source: source.into() })?;
    // Anonymous files (eventfd, timerfd, io_uring) have a mode without a type.
    let kind = match FileType::from_raw_mode(found.stx_mode.into()) {
        FileType::Fifo | FileType::Socket | FileType::Unknown => return Ok(()),
        FileType::CharacterDevice if !devices.is_empty() => return Ok(()),
        FileType::CharacterDevice => "character device",
        FileType::BlockDevice => "block device",
        FileType::Directory => "directory",
        FileType::Symlink => "symbolic link",
        FileType::RegularFile => "regular file",
    };
    Err(WatchError::Kind { fd, kind, devices })
}

/// The thread's epoll instance.
#[derive(Debug)]
pub(crate) struct Epoll(OwnedFd);

/// Why a sleep ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Woken {
    /// Some descriptor had an edge; `inbox` if the mailbox's did, `pollers` if a watched one did.
    Edge { inbox: bool, pollers: bool },
    /// The time is over.
    Timeout,
    /// A signal, or an error that will show again.
    Interrupted,
}

const INBOX: u64 = 0;
const POLLER: u64 = 1;

impl Epoll {
    /// An instance that watches the mailbox.
    pub(crate) fn new(inbox: BorrowedFd<'_>) -> rustix::io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, inbox, EventData::new_u64(INBOX), EventFlags::IN | EventFlags::ET)?;
        Ok(Self(epoll))
    }

    /// Sleeps until an edge or for `timeout` (`None`: for ever). Edges since the last call end it at once.
    pub(crate) fn wait(&self, timeout: Option<&Timespec>) -> Woken {
        let mut buffer = [MaybeUninit::<epoll::Event>::uninit(); EVENTS_PER_WAIT];
        match epoll::wait(&self.0, &mut buffer, timeout) {
            Ok(([], _)) => Woken::Timeout,
            Ok((events, _)) => {
                let has = |token| events.iter().any(|event| { event.data }.u64() == token);
                Woken::Edge { inbox: has(INBOX), pollers: has(POLLER) }
            }
            Err(_) => Woken::Interrupted,
        }
    }
}

/// A watched descriptor. Dropping it removes it from epoll for good.
#[derive(Debug)]
pub(crate) struct Watch {
    epoll: Rc<Epoll>,
    file: OwnedFd,
}

impl Watch {
    /// Watches every one of a poller's descriptors, or none.
    pub(crate) fn all(epoll: &Rc<Epoll>, fds: &[RawFd]) -> Result<Vec<Self>, WatchError> {
        if fds.len() > WAKE_FDS_MAX {
            return Err(WatchError::TooMany { count: fds.len() });
        }
        let once = |(index, fd): &(usize, &RawFd)| !fds[..*index].contains(*fd);
        fds.iter().enumerate().filter(once).map(|(_, &fd)| Self::new(epoll, fd)).collect()
    }

    fn new(epoll: &Rc<Epoll>, fd: RawFd) -> Result<Self, WatchError> {
        let file = duplicate(fd).map_err(|source| WatchError::Duplicate { fd, source: source.into() })?;
        check_kind(file.as_fd(), fd, ", character devices")?;
        epoll::add(&epoll.0, &file, EventData::new_u64(POLLER), EventFlags::IN | EventFlags::ET)
            .map_err(|source| WatchError::Refused { fd, source: source.into() })?;
        Ok(Self { epoll: epoll.clone(), file })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Err(error) = epoll::delete(&self.epoll.0, &self.file) {
            tracing::error!(%error, "a wake descriptor could not be removed from epoll");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    const AT_ONCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
    const EDGE: Woken = Woken::Edge { inbox: false, pollers: true };

    fn event() -> OwnedFd {
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
    }

    fn kick(fd: impl AsFd) {
        rustix::io::write(fd, &1_u64.to_ne_bytes()).unwrap();
    }

    fn epoll() -> (Rc<Epoll>, OwnedFd) {
        let inbox = event();
        (Rc::new(Epoll::new(inbox.as_fd()).unwrap()), inbox)
    }

    #[test]
    fn each_write_to_a_full_eventfd_is_one_edge() {
        let (epoll, inbox) = epoll();
        let file = event();
        let _watch = Watch::all(&epoll, &[file.as_raw_fd()]).unwrap();
        for _ in 0..3 {
            kick(&file);
            assert_eq!(epoll.wait(Some(&AT_ONCE)), EDGE);
            assert_eq!(epoll.wait(Some(&AT_ONCE)), Woken::Timeout);
        }
        kick(&inbox);
        assert_eq!(epoll.wait(Some(&AT_ONCE)), Woken::Edge { inbox: true, pollers: false });
    }

    #[test]
    fn a_removed_watch_is_silent_though_the_file_lives_on_and_its_number_was_closed_first() {
        let (epoll, _inbox) = epoll();
        let peers = event();
        let ours = peers.try_clone().unwrap();
        let watch = Watch::all(&epoll, &[ours.as_raw_fd()]).unwrap();
        drop(ours);
        kick(&peers);
        assert_eq!(epoll.wait(Some(&AT_ONCE)), EDGE, "a closed number does not end the watch");
        drop(watch);
        kick(&peers);
        assert_eq!(epoll.wait(Some(&AT_ONCE)), Woken::Timeout);
    }

    #[test]
    fn a_descriptor_named_twice_is_watched_once_and_two_pollers_may_share_one() {
        let (epoll, _inbox) = epoll();
        let file = event();
        let fd = file.as_raw_fd();
        let first = Watch::all(&epoll, &[fd, fd]).unwrap();
        assert_eq!(first.len(), 1);
        let second = Watch::all(&epoll, &[fd]).unwrap();
        drop(first);
        kick(&file);
        assert_eq!(epoll.wait(Some(&AT_ONCE)), EDGE);
        drop(second);
        kick(&file);
        assert_eq!(epoll.wait(Some(&AT_ONCE)), Woken::Timeout);
    }

    #[test]
    fn files_without_edges_are_refused_with_their_kind() {
        let (epoll, _inbox) = epoll();
        let regular = std::fs::File::open("/proc/self/exe").unwrap();
        let error = Watch::all(&epoll, &[regular.as_raw_fd()]).unwrap_err();
        assert!(matches!(error, WatchError::Kind { kind: "regular file", .. }), "{error}");
        let directory = std::fs::File::open("/").unwrap();
        let error = check_peer_fd(directory.as_fd()).unwrap_err();
        assert!(
            error.to_string().ends_with("is a directory; only eventfds, pipes, sockets announce work"),
            "{error}"
        );
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(
            check_peer_fd(null.as_fd()),
            Err(WatchError::Kind { kind: "character device", .. })
        ));
    }

    #[test]
    fn a_failure_leaves_nothing_watched() {
        let (epoll, _inbox) = epoll();
        let file = event();
        for bad in [-1, i32::MAX] {
            let error = Watch::all(&epoll, &[file.as_raw_fd(), bad]).unwrap_err();
            assert!(matches!(error, WatchError::Duplicate { fd, .. } if fd == bad), "{error}");
        }
        let error = Watch::all(&epoll, &[0; WAKE_FDS_MAX + 1]).unwrap_err();
        assert!(matches!(error, WatchError::TooMany { .. }), "{error}");
        kick(&file);
        assert_eq!(epoll.wait(Some(&AT_ONCE)), Woken::Timeout);
    }

    #[test]
    fn what_a_peer_may_send_is_accepted() {
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        for fd in [event().as_fd(), reader.as_fd(), socket.as_fd()] {
            check_peer_fd(fd).unwrap();
        }
    }
}

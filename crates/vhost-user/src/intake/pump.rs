//! Moves bytes between a file of the peer's and one of ours, on the connection's thread.
//!
//! Only a file that a system call makes wait is waited for here, and only the peer's own connection with it. Descriptors
//! are moved to the peer, never from it.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags};
use rustix::io::{Errno, read, write};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recv, recvmsg};

use crate::wire::send;

const CHUNK_BYTES: usize = 64 << 10;
/// Chunks moved at a time, so that a peer that writes all the time has its messages read as well.
const CHUNKS_PER_STEP: u32 = 16;

/// One end of a pump.
pub(super) enum End {
    /// Ours, counting what is to be signalled. It is read as one signal, however often it was written to.
    Eventfd(OwnedFd),
    /// Ours, of messages that may each have a descriptor.
    Channel(OwnedFd),
    Pipe(OwnedFd),
    Socket(OwnedFd),
}

/// How far a pump came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// There is nothing to move.
    Idle,
    /// There is more to move, now or when there is room.
    Busy,
    /// One of the ends has gone, and what had come is through.
    Over,
}

/// Moves what can be read at one end to the other.
pub(super) struct Pump {
    from: End,
    to: End,
    bytes: Vec<u8>,
    written: usize,
    /// Comes with the first of `bytes`.
    fd: Option<OwnedFd>,
    /// The end that is read is told, by a byte, that all is through.
    acknowledges: bool,
}

impl Pump {
    pub(super) fn new(from: End, to: End) -> Self {
        Self { from, to, bytes: Vec::new(), written: 0, fd: None, acknowledges: false }
    }

    /// The same, and the end that is read is told by a byte when all is through.
    pub(super) fn acknowledging(from: End, to: End) -> Self {
        Self { acknowledges: true, ..Self::new(from, to) }
    }

    /// Whether the end that is read is told when all is through.
    pub(super) fn acknowledges(&self) -> bool {
        self.acknowledges
    }

    /// What to wait for before the next step: at the end that is read, and at the other, which is always heard of when
    /// it goes.
    pub(super) fn waits_for(&self) -> [PollFd<'_>; 2] {
        let wait = |end, events| PollFd::from_borrowed_fd(End::as_fd(end), events);
        match self.bytes.is_empty() {
            true => [wait(&self.from, PollFlags::IN), wait(&self.to, PollFlags::empty())],
            // What is at the end that is read has to wait.
            false => [wait(&self.to, PollFlags::OUT), wait(&self.to, PollFlags::OUT)],
        }
    }

    /// Goes on after waiting for what [`Pump::waits_for`] says; false if that was the end.
    pub(super) fn go_on(&mut self, revents: [PollFlags; 2]) -> bool {
        let gone = PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL;
        let ready = revents.iter().any(|revents| !revents.is_empty());
        !revents[1].intersects(gone) && (!ready || self.step() != Step::Over)
    }

    /// Moves what can be moved now.
    pub(super) fn step(&mut self) -> Step {
        for _ in 0..CHUNKS_PER_STEP {
            let moved = match self.bytes.is_empty() {
                true => self.fill(),
                false => self.empty(),
            };
            match moved {
                Ok(0) => return Step::Over,
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if self.bytes.is_empty() => return Step::Idle,
                Err(Errno::AGAIN) => return Step::Busy,
                Err(_) => return Step::Over,
            }
        }
        Step::Busy
    }

    fn fill(&mut self) -> Result<usize, Errno> {
        self.bytes.resize(CHUNK_BYTES, 0);
        let result = self.from.read(&mut self.bytes);
        let (bytes, fd) = result.inspect_err(|_| self.bytes.clear())?;
        self.bytes.truncate(bytes);
        self.fd = fd;
        if bytes == 0 && self.acknowledges {
            self.from.write(&[1], None)?;
        }
        Ok(bytes)
    }

    fn empty(&mut self) -> Result<usize, Errno> {
        let written = self.to.write(&self.bytes[self.written..], self.fd.as_ref().map(AsFd::as_fd))?;
        self.fd = None;
        self.written += written;
        if self.written == self.bytes.len() {
            self.bytes.clear();
            self.written = 0;
        }
        Ok(written)
    }
}

impl End {
    pub(super) fn into_fd(self) -> OwnedFd {
        match self {
            Self::Eventfd(fd) | Self::Channel(fd) | Self::Pipe(fd) | Self::Socket(fd) => fd,
        }
    }

    fn read(&self, to: &mut [u8]) -> Result<(usize, Option<OwnedFd>), Errno> {
        match self {
            Self::Eventfd(fd) => {
                let signal = 1u64.to_ne_bytes();
                let (count, _) = to.split_at_mut(signal.len());
                read(fd, &mut *count)?;
                count.copy_from_slice(&signal);
                Ok((signal.len(), None))
            }
            Self::Pipe(fd) => Ok((read(fd, to)?, None)),
            // Descriptors that come along are the peer's: the system closes them, on this thread.
            Self::Socket(fd) => Ok((recv(fd, to, RecvFlags::DONTWAIT)?.0, None)),
            Self::Channel(fd) => {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = RecvAncillaryBuffer::new(&mut space);
                let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
                let received = recvmsg(fd, &mut [IoSliceMut::new(to)], &mut control, flags)?;
                let fds = control.drain().filter_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                    _ => None,
                });
                Ok((received.bytes, fds.flatten().last()))
            }
        }
    }

    fn write(&self, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<usize, Errno> {
        match self {
            Self::Socket(socket) | Self::Channel(socket) => send(socket.as_fd(), bytes, fd),
            Self::Eventfd(fd) | Self::Pipe(fd) => write(fd, bytes),
        }
    }
}

impl AsFd for End {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Eventfd(fd) | Self::Channel(fd) | Self::Pipe(fd) | Self::Socket(fd) => fd.as_fd(),
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};
    use rustix::net::SocketType;

    use super::super::pair;
    use super::*;

    /// A pump from one socket to another, and the other ends of both.
    fn pump(from: fn(OwnedFd) -> End) -> (Pump, OwnedFd, OwnedFd) {
        let (near, far) = pair(SocketType::STREAM).unwrap();
        let (to, end) = pair(SocketType::STREAM).unwrap();
        (Pump::new(from(near), End::Socket(to)), far, end)
    }

    /// What has come through, and whether with a descriptor.
    fn moved(from: fn(OwnedFd) -> End) -> (usize, bool) {
        let (mut pump, far, end) = pump(from);
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        send(far.as_fd(), b"state", Some(fd.as_fd())).unwrap();
        assert_eq!(pump.step(), Step::Idle);
        let (bytes, fd) = End::Channel(end).read(&mut [0; 8]).unwrap();
        (bytes, fd.is_some())
    }

    #[test]
    fn descriptors_come_through_from_us_and_not_from_a_peer() {
        assert_eq!(moved(End::Channel), (5, true));
        assert_eq!(moved(End::Socket), (5, false));
    }
}

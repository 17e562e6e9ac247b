//! Messages on a Unix stream socket: header, body, and the descriptors that travel with them.
//!
//! A message is taken in piece by piece as it arrives, never waiting for the rest. The peer decides what it sends and
//! whether it reads; so every size is bounded before it is believed, a message that does not get finished within
//! [`MESSAGE_DEADLINE`] is an error, and so is a reply that the peer does not take.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Request, flags and size, 32 bits each.
pub(crate) const HEADER_BYTES: usize = 12;
/// The largest body: a configuration access of 4 KiB with its header. (A memory table of [`FDS_MAX`] regions is half
/// of that.)
pub(crate) const BODY_BYTES_MAX: usize = 12 + 4096;
/// The most descriptors in one message; only a memory table has more than one.
pub(crate) const FDS_MAX: usize = 64;
/// How long the rest of a message, or room for a reply, may take to come.
pub(crate) const MESSAGE_DEADLINE: Duration = Duration::from_secs(10);

/// Flags of a header: the version in bits 0 and 1, and two bits.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// Why a connection cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The peer closed the connection in the middle of a message.
    #[error("the connection ended after {0} bytes of a message")]
    Truncated(usize),
    /// The rest of a message did not come.
    #[error("a message was left unfinished for {} seconds", MESSAGE_DEADLINE.as_secs())]
    Unfinished,
    /// The peer does not read its replies.
    #[error("a reply was not read for {} seconds", MESSAGE_DEADLINE.as_secs())]
    NotRead,
    /// Not a request of this protocol.
    #[error("message header with flags {0:#x}: expected version 1 and no reply")]
    BadFlags(u32),
    /// The body is too large.
    #[error("message {request} with a body of {size} bytes: at most {BODY_BYTES_MAX} are allowed")]
    TooLong {
        /// The request code.
        request: u32,
        /// The size announced.
        size: u32,
    },
    /// Too many descriptors.
    #[error("a message with more than {FDS_MAX} file descriptors")]
    TooManyFds,
    /// The system refused.
    #[error("the connection failed: {0}")]
    System(#[from] Errno),
    /// One of these, as the thread that takes messages in has told.
    #[error("{0}")]
    Told(String),
    /// That thread has ended without a word.
    #[error("the thread that takes messages in has ended")]
    Lost,
    /// That thread waits in one of the peer's descriptors, and the peer has gone.
    #[error(
        "the front end has gone, and one of its descriptors does not let go of the thread that closes it"
    )]
    Stuck,
}

/// A request as it came in; `F` is what became of each of its descriptors.
#[derive(Debug)]
pub(crate) struct Message<F = OwnedFd> {
    /// The request code.
    pub(crate) request: u32,
    /// The sender waits for an acknowledgement.
    pub(crate) need_reply: bool,
    pub(crate) body: Vec<u8>,
    pub(crate) fds: Vec<F>,
}

/// What there was to receive.
#[derive(Debug)]
pub(crate) enum Received<F = OwnedFd> {
    Message(Message<F>),
    /// Not yet a whole message.
    Nothing,
    /// The peer has closed the connection, between two messages.
    End,
}

/// The receiving half of a connection.
pub(crate) struct Connection {
    socket: UnixStream,
    bytes: Box<[u8; HEADER_BYTES + BODY_BYTES_MAX]>,
    have: usize,
    fds: Vec<OwnedFd>,
    /// When the message that is coming in must be whole.
    deadline: Option<Instant>,
    patience: Duration,
}

impl Connection {
    pub(crate) fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            bytes: Box::new([0; HEADER_BYTES + BODY_BYTES_MAX]),
            have: 0,
            fds: Vec::new(),
            deadline: None,
            patience: MESSAGE_DEADLINE,
        }
    }

    /// Takes in what has arrived, up to the end of one message.
    pub(crate) fn receive(&mut self) -> Result<Received, WireError> {
        loop {
            let want = match self.header()? {
                None => HEADER_BYTES,
                Some(header) => {
                    let len = HEADER_BYTES + header.size as usize;
                    if self.have == len {
                        return Ok(Received::Message(self.take(header)));
                    }
                    len
                }
            };
            match self.read_until(want) {
                Ok(0) if self.have == 0 && self.fds.is_empty() => return Ok(Received::End),
                Ok(0) => return Err(WireError::Truncated(self.have)),
                Ok(_) => {}
                Err(WireError::System(Errno::AGAIN)) => {
                    let late = self.deadline.is_some_and(|deadline| Instant::now() >= deadline);
                    return if late { Err(WireError::Unfinished) } else { Ok(Received::Nothing) };
                }
                Err(WireError::System(Errno::INTR)) => {}
                Err(WireError::System(Errno::CONNRESET)) if self.have == 0 => return Ok(Received::End),
                Err(error) => return Err(error),
            }
        }
    }

    /// When to call [`Connection::receive`] even if nothing has arrived.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    fn header(&self) -> Result<Option<Header>, WireError> {
        let Some((header, _)) = self.bytes[..self.have].split_first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let word =
            |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let header = Header { request: word(0), flags: word(4), size: word(8) };
        if header.flags & VERSION_MASK != VERSION || header.flags & REPLY != 0 {
            return Err(WireError::BadFlags(header.flags));
        }
        if header.size as usize > BODY_BYTES_MAX {
            return Err(WireError::TooLong { request: header.request, size: header.size });
        }
        Ok(Some(header))
    }

    /// Reads bytes up to position `end` of the message, and their descriptors. Never beyond: the descriptors of the
    /// next message come with its first byte.
    fn read_until(&mut self, end: usize) -> Result<usize, WireError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut buffers = [IoSliceMut::new(&mut self.bytes[self.have..end])];
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = recvmsg(&self.socket, &mut buffers, &mut control, flags)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        if self.fds.len() > FDS_MAX || received.flags.contains(ReturnFlags::CTRUNC) {
            return Err(WireError::TooManyFds);
        }
        if received.bytes > 0 {
            self.have += received.bytes;
            let patience = self.patience;
            self.deadline.get_or_insert_with(|| Instant::now() + patience);
        }
        Ok(received.bytes)
    }

    fn take(&mut self, header: Header) -> Message {
        let body = self.bytes[HEADER_BYTES..self.have].to_vec();
        self.have = 0;
        self.deadline = None;
        let need_reply = header.flags & NEED_REPLY != 0;
        Message { request: header.request, need_reply, body, fds: std::mem::take(&mut self.fds) }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The sending half of a connection.
pub(crate) struct Replies {
    socket: UnixStream,
    patience: Duration,
}

impl Replies {
    pub(crate) fn new(socket: UnixStream) -> Self {
        Self { socket, patience: MESSAGE_DEADLINE }
    }

    /// Sends a reply to `request`. Waits for room, but not for ever.
    pub(crate) fn reply(
        &self,
        request: u32,
        body: &[u8],
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), WireError> {
        let deadline = Instant::now() + self.patience;
        let message = encode(request, VERSION | REPLY, body);
        let (mut sent, mut fd) = (0, fd);
        while sent < message.len() {
            match send(self.socket.as_fd(), &message[sent..], fd) {
                Ok(bytes) => {
                    sent += bytes;
                    // The descriptor went with the first byte.
                    fd = None;
                }
                Err(Errno::AGAIN) => self.wait_for_room(deadline)?,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn wait_for_room(&self, deadline: Instant) -> Result<(), WireError> {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&self.socket, PollFlags::OUT)], Some(&timeout)) {
            Ok(0) => Err(WireError::NotRead),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Replies {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Replies {
    /// The peer is to see the end now, whoever else still has the socket.
    fn drop(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

#[derive(Clone, Copy)]
struct Header {
    request: u32,
    flags: u32,
    size: u32,
}

/// A request of ours, on the channel to the front end.
pub(crate) fn encode_request(request: u32, body: &[u8]) -> Vec<u8> {
    encode(request, VERSION, body)
}

fn encode(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(HEADER_BYTES + body.len());
    for word in [request, flags, body.len() as u32] {
        message.extend(word.to_ne_bytes());
    }
    message.extend(body);
    message
}

/// Sends without waiting; returns how many bytes went.
pub(crate) fn send(socket: BorrowedFd<'_>, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if fd.is_some() {
        // One descriptor fits: the space was made for it.
        control.push(SendAncillaryMessage::ScmRights(fd.as_slice()));
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn pair() -> (UnixStream, Connection) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (theirs, Connection::new(ours))
    }

    fn request(flags: u32, body: &[u8]) -> Vec<u8> {
        encode(7, flags, body)
    }

    #[test]
    fn a_message_may_come_byte_by_byte() {
        let (mut peer, mut connection) = pair();
        let bytes = request(VERSION | NEED_REPLY, b"body");
        for &byte in &bytes[..bytes.len() - 1] {
            peer.write_all(&[byte]).unwrap();
            assert!(matches!(connection.receive(), Ok(Received::Nothing)));
            assert!(connection.deadline().is_some());
        }
        peer.write_all(&bytes[bytes.len() - 1..]).unwrap();
        let Ok(Received::Message(message)) = connection.receive() else { panic!("a whole message") };
        assert_eq!((message.request, message.need_reply, &*message.body), (7, true, &b"body"[..]));
        assert!(connection.deadline().is_none());
    }

    #[test]
    fn descriptors_stay_with_their_message() {
        let (peer, mut connection) = pair();
        let file = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        for fds in [0, 1, 1, 0] {
            let fd = (fds == 1).then_some(file.as_fd());
            send(peer.as_fd(), &request(VERSION, &[0; 100]), fd).unwrap();
        }
        for fds in [0, 1, 1, 0] {
            let Ok(Received::Message(message)) = connection.receive() else { panic!("a whole message") };
            assert_eq!(message.fds.len(), fds);
        }
        drop(peer);
        assert!(matches!(connection.receive(), Ok(Received::End)));
    }

    #[test]
    fn half_a_message_ends_the_connection_at_its_deadline_or_with_the_peer() {
        let (mut peer, mut connection) = pair();
        connection.patience = Duration::ZERO;
        peer.write_all(&request(VERSION, b"body")[..14]).unwrap();
        assert!(matches!(connection.receive(), Err(WireError::Unfinished)));

        let (mut peer, mut connection) = pair();
        peer.write_all(&request(VERSION, b"body")[..14]).unwrap();
        drop(peer);
        assert!(matches!(connection.receive(), Err(WireError::Truncated(14))));
    }

    #[test]
    fn a_peer_that_does_not_read_is_not_waited_for() {
        let (ours, peer) = UnixStream::pair().unwrap();
        let replies = Replies { socket: ours, patience: Duration::ZERO };
        let error = (0..100_000).find_map(|_| replies.reply(1, &[0; 4096], None).err());
        assert!(matches!(error, Some(WireError::NotRead)), "{error:?}");
        drop(peer);
    }

    #[test]
    fn headers_are_checked_before_they_are_believed() {
        for flags in [0, 2, 3, VERSION | REPLY] {
            let (mut peer, mut connection) = pair();
            peer.write_all(&request(flags, &[])).unwrap();
            assert!(matches!(connection.receive(), Err(WireError::BadFlags(found)) if found == flags));
        }
        let (mut peer, mut connection) = pair();
        for word in [1, VERSION, u32::MAX] {
            peer.write_all(&word.to_ne_bytes()).unwrap();
        }
        assert!(matches!(connection.receive(), Err(WireError::TooLong { size: u32::MAX, .. })));
    }

    #[test]
    fn too_many_descriptors_are_an_error_and_are_closed() {
        let (peer, mut connection) = pair();
        let mut pipe = rustix::pipe::pipe().unwrap();
        let fds = vec![pipe.1.as_fd(); FDS_MAX + 1];
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX + 1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let bytes = request(VERSION, &[]);
        sendmsg(&peer, &[IoSlice::new(&bytes)], &mut control, SendFlags::empty()).unwrap();
        assert!(matches!(connection.receive(), Err(WireError::TooManyFds)));
        drop((connection, fds));
        // With every copy of the writing end closed, the pipe ends.
        let (read, write) = (&mut pipe.0, pipe.1);
        drop(write);
        let mut file = std::fs::File::from(read.try_clone().unwrap());
        assert_eq!(file.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn a_reply_carries_its_descriptor() {
        let (ours, peer) = UnixStream::pair().unwrap();
        let replies = Replies::new(ours);
        let file = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        replies.reply(5, b"answer", Some(file.as_fd())).unwrap();
        // The reply flag is what the receiver of requests refuses, so the other end is read by hand.
        let mut other = Connection::new(peer);
        assert_eq!(other.read_until(HEADER_BYTES + 6).unwrap(), HEADER_BYTES + 6);
        assert_eq!(&other.bytes[HEADER_BYTES..HEADER_BYTES + 6], b"answer");
        assert_eq!(other.fds.len(), 1);
    }
}

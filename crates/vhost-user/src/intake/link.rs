//! Messages from a connection's thread to the control thread: one packet each, with the descriptors that may pass.
//!
//! A packet begins with its kind. That of a message goes on with the request's code, whether a reply is needed, how
//! many descriptors came, what became of each, and the body.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::wire::{BODY_BYTES_MAX, FDS_MAX, Message, Received, WireError};

/// Kinds of packets.
const MESSAGE: u8 = 0;
const END: u8 = 1;
const ERROR: u8 = 2;
/// What became of a descriptor.
const OPEN: u8 = 0;
const OPEN_TAKES_FDS: u8 = 1;
const KEPT: u8 = 2;
const REFUSED: u8 = 3;
/// A reason comes with its length in one byte.
const REASON_BYTES_MAX: usize = 255;
const PACKET_BYTES_MAX: usize = 7 + FDS_MAX * (2 + REASON_BYTES_MAX) + BODY_BYTES_MAX;

/// What became of a descriptor of a message.
#[derive(Debug)]
pub(crate) enum PeerFd {
    /// An eventfd or a file that can be mapped; or a socket of our own in place of what the peer sent.
    Open {
        fd: OwnedFd,
        /// Descriptors can be sent on it.
        takes_fds: bool,
    },
    /// The message means nothing by it.
    Kept,
    /// It is not what the message says.
    Refused(String),
}

/// What is sent on a link.
pub(super) struct Packet {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Packet {
    pub(super) fn message(message: Message<PeerFd>) -> Self {
        let Message { request, need_reply, body, fds: arrived } = message;
        let mut bytes = vec![MESSAGE];
        bytes.extend(request.to_le_bytes());
        bytes.extend([need_reply.into(), arrived.len() as u8]);
        let mut fds = Vec::new();
        for fd in arrived {
            match fd {
                PeerFd::Open { fd, takes_fds } => {
                    bytes.push(if takes_fds { OPEN_TAKES_FDS } else { OPEN });
                    fds.push(fd);
                }
                PeerFd::Kept => bytes.push(KEPT),
                PeerFd::Refused(reason) => {
                    let ends = reason.char_indices().map(|(at, char)| at + char.len_utf8());
                    let len = ends.take_while(|&end| end <= REASON_BYTES_MAX).last().unwrap_or(0);
                    bytes.extend([REFUSED, len as u8]);
                    bytes.extend(&reason.as_bytes()[..len]);
                }
            }
        }
        bytes.extend(body);
        Self { bytes, fds }
    }

    /// The peer has closed the connection.
    pub(super) fn end() -> Self {
        Self { bytes: vec![END], fds: Vec::new() }
    }

    /// The connection cannot go on.
    pub(super) fn error(reason: &str) -> Self {
        let mut bytes = vec![ERROR];
        bytes.extend(reason.as_bytes());
        Self { bytes, fds: Vec::new() }
    }

    /// Sends it whole or not at all, without waiting.
    pub(super) fn send(&self, link: BorrowedFd<'_>) -> Result<(), Errno> {
        let fds: Vec<BorrowedFd<'_>> = self.fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            // A message has no more than fit.
            control.push(SendAncillaryMessage::ScmRights(&fds));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        sendmsg(link, &[IoSlice::new(&self.bytes)], &mut control, flags).map(drop)
    }
}

/// The control thread's end of a link.
pub(crate) struct Link {
    socket: OwnedFd,
    bytes: Box<[u8; PACKET_BYTES_MAX]>,
}

impl Link {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self { socket, bytes: Box::new([0; PACKET_BYTES_MAX]) }
    }

    /// The next message, if one has come.
    pub(crate) fn receive(&mut self) -> Result<Received<PeerFd>, WireError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received =
            match recvmsg(&self.socket, &mut [IoSliceMut::new(&mut *self.bytes)], &mut control, flags) {
                Ok(received) => received,
                Err(Errno::AGAIN | Errno::INTR) => return Ok(Received::Nothing),
                Err(error) => return Err(error.into()),
            };
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(more) = message {
                fds.extend(more);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            // There was room for all of them, but no number.
            return Err(Errno::MFILE.into());
        }
        match self.bytes[..received.bytes].split_first() {
            Some((&MESSAGE, rest)) => {
                decode(rest, fds).map(Received::Message).ok_or(WireError::System(Errno::BADMSG))
            }
            Some((&ERROR, reason)) => Err(WireError::Told(String::from_utf8_lossy(reason).into_owned())),
            Some((&END, _)) => Ok(Received::End),
            _ => Err(WireError::Lost),
        }
    }

    /// Has the connection's thread end. What is returned hangs up when it has closed all it had.
    pub(crate) fn leave(self) -> OwnedFd {
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Write);
        self.socket
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// None: not what [`Packet::message`] makes.
fn decode(bytes: &[u8], fds: Vec<OwnedFd>) -> Option<Message<PeerFd>> {
    let (code, rest) = bytes.split_first_chunk::<4>()?;
    let (&[need_reply, count], mut rest) = rest.split_first_chunk::<2>()?;
    let mut open = fds.into_iter();
    let mut fds = Vec::with_capacity(count.into());
    for _ in 0..count {
        let (&tag, after) = rest.split_first()?;
        rest = after;
        fds.push(match tag {
            OPEN | OPEN_TAKES_FDS => PeerFd::Open { fd: open.next()?, takes_fds: tag == OPEN_TAKES_FDS },
            KEPT => PeerFd::Kept,
            _ => {
                let (&len, after) = rest.split_first()?;
                let (reason, after) = after.split_at_checked(len.into())?;
                rest = after;
                PeerFd::Refused(String::from_utf8_lossy(reason).into_owned())
            }
        });
    }
    Some(Message {
        request: u32::from_le_bytes(*code),
        need_reply: need_reply != 0,
        body: rest.to_vec(),
        fds,
    })
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};
    use rustix::net::SocketType;

    use super::super::pair;
    use super::*;

    fn link() -> (OwnedFd, Link) {
        let (theirs, ours) = pair(SocketType::SEQPACKET).unwrap();
        (theirs, Link::new(ours))
    }

    #[test]
    fn a_message_comes_through_with_what_became_of_its_descriptors() {
        let (theirs, mut link) = link();
        let fd = || eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let fds = vec![
            PeerFd::Kept,
            PeerFd::Open { fd: fd(), takes_fds: false },
            PeerFd::Refused("ä".repeat(200)),
            PeerFd::Open { fd: fd(), takes_fds: true },
        ];
        let body = vec![9; BODY_BYTES_MAX];
        Packet::message(Message { request: u32::MAX - 1, need_reply: true, body: body.clone(), fds })
            .send(theirs.as_fd())
            .unwrap();
        Packet::end().send(theirs.as_fd()).unwrap();
        let Ok(Received::Message(message)) = link.receive() else { panic!("a message") };
        assert_eq!((message.request, message.need_reply), (u32::MAX - 1, true));
        assert_eq!(message.body, body);
        let [PeerFd::Kept, PeerFd::Open { takes_fds: false, .. }, PeerFd::Refused(reason), last] =
            &message.fds[..]
        else {
            panic!("{:?}", message.fds)
        };
        assert_eq!(*reason, "ä".repeat(REASON_BYTES_MAX / 2));
        assert!(matches!(last, PeerFd::Open { takes_fds: true, .. }));
        assert!(matches!(link.receive(), Ok(Received::End)));
        assert!(matches!(link.receive(), Ok(Received::Nothing)));
    }

    #[test]
    fn errors_and_lost_threads_are_told() {
        let (theirs, mut link) = link();
        Packet::error("a reason").send(theirs.as_fd()).unwrap();
        assert_eq!(link.receive().unwrap_err().to_string(), "a reason");
        drop(theirs);
        assert!(matches!(link.receive(), Err(WireError::Lost)));
    }
}

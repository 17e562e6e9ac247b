//! A front end that says whatever a test wants to say.

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vhost::vhost_user::message::FrontendReq;

use crate::host::PATIENCE;

pub(crate) const NEED_REPLY: u32 = 8;

pub(crate) struct Raw(pub(crate) UnixStream);

impl Raw {
    pub(crate) fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(stream)
    }

    /// Sends bytes as they are; false if the other end has gone.
    pub(crate) fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).is_ok()
    }

    pub(crate) fn send(&self, request: FrontendReq, flags: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        self.send_bytes(&message(request.into(), 1 | flags, body), fds)
    }

    /// The next reply: request code and body. None if the connection has ended.
    pub(crate) fn reply(&mut self) -> Option<(u32, Vec<u8>)> {
        let mut header = [0; 12];
        self.0.read_exact(&mut header).ok()?;
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!(word(4), 5, "version 1, reply");
        let mut body = vec![0; word(8) as usize];
        self.0.read_exact(&mut body).ok()?;
        Some((word(0), body))
    }

    pub(crate) fn reply_u64(&mut self) -> Option<u64> {
        let (_, body) = self.reply()?;
        Some(u64::from_ne_bytes(body.try_into().expect("8 bytes")))
    }

    pub(crate) fn ask(&mut self, request: FrontendReq) -> Option<u64> {
        self.send(request, 0, &[], &[]);
        self.reply_u64()
    }

    pub(crate) fn set(&self, request: FrontendReq, value: u64) -> bool {
        self.send(request, 0, &value.to_ne_bytes(), &[])
    }

    /// A request whose body is two numbers.
    pub(crate) fn vring(&self, request: FrontendReq, index: u32, num: u32) -> bool {
        self.send(request, 0, &words(&[index, num]), &[])
    }

    pub(crate) fn vring_fd(&self, request: FrontendReq, index: u64, fd: &OwnedFd) -> bool {
        self.send(request, 0, &index.to_ne_bytes(), &[fd.as_fd()])
    }

    /// Negotiates everything but `without`, and acknowledgements if the back end has them.
    pub(crate) fn negotiate(&mut self, without: u64) -> u64 {
        self.send(FrontendReq::SET_OWNER, 0, &[], &[]);
        let features = self.ask(FrontendReq::GET_FEATURES).unwrap() & !without;
        let protocol = self.ask(FrontendReq::GET_PROTOCOL_FEATURES).unwrap();
        self.set(FrontendReq::SET_PROTOCOL_FEATURES, protocol);
        self.set(FrontendReq::SET_FEATURES, features);
        features
    }

    /// Waits until the other end has gone, reading whatever it still says.
    pub(crate) fn wait_for_end(&mut self) {
        let mut rest = Vec::new();
        // Both an orderly end and a reset will do.
        if let Err(error) = self.0.read_to_end(&mut rest) {
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "the other end is still there");
        }
    }

    pub(crate) fn write_half(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }
}

pub(crate) fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = words(&[request, flags, body.len() as u32]);
    bytes.extend(body);
    bytes
}

pub(crate) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

pub(crate) fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_ne_bytes()).collect()
}

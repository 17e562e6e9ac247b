//! The channel on which this back end makes requests of the front end.
//!
//! I/O threads use it too (calls in band), so nothing here blocks: what cannot be sent now is remembered, one flag for
//! each thing there is to say, and sent by the control thread when there is room. Replies are never asked for, hence
//! none come and the channel is never read. Here it is always a socket of our own; between it and the front end's socket,
//! or pipe (User-Mode Linux), moves the thread of the connection ([`crate::intake`]).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;
use vhost::vhost_user::message::BackendReq;
use virtio::Call;

use crate::bell::Bell;
use crate::wire::{encode_request, send};

/// The page size that host notifiers are mapped with.
pub(crate) const NOTIFIER_BYTES: u64 = 4096;

/// What there is to say about one ring.
#[derive(Default)]
struct Pending {
    call: AtomicBool,
    error: AtomicBool,
}

/// The channel. Shared by the control thread and the I/O threads of the device.
pub(crate) struct Channel {
    socket: OwnedFd,
    /// Whether descriptors can be sent along.
    takes_fds: bool,
    rings: Box<[Pending]>,
    /// Wakes the control thread when something is left to be sent.
    bell: Arc<Bell>,
}

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sent {
    Yes,
    /// No room.
    NotYet,
    /// Nobody will ever read it.
    Never,
}

impl Channel {
    pub(crate) fn new(socket: OwnedFd, takes_fds: bool, rings: u16, bell: Arc<Bell>) -> Self {
        Self { socket, takes_fds, rings: (0..rings).map(|_| Pending::default()).collect(), bell }
    }

    /// Says that the configuration space has changed; false if that must be tried again.
    pub(crate) fn config_changed(&self) -> bool {
        self.send(BackendReq::CONFIG_CHANGE_MSG, &[], None) != Sent::NotYet
    }

    /// Offers memory that the guest may write to instead of kicking, or takes the offer back. It is an offer: if it
    /// cannot be sent, the guest goes on kicking.
    pub(crate) fn host_notifier(&self, index: u16, page: Option<BorrowedFd<'_>>) {
        /// "No descriptor", as in the payload of SET_VRING_KICK.
        const NO_FD: u64 = 1 << 8;
        let index = u64::from(index) | if page.is_some() { 0 } else { NO_FD };
        let body: Vec<u8> = [index, NOTIFIER_BYTES, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
        self.send(BackendReq::VRING_HOST_NOTIFIER_MSG, &body, page);
    }

    /// Says that a ring is broken.
    pub(crate) fn ring_error(&self, index: u16) {
        self.tell(BackendReq::VRING_ERR, index, |pending| &pending.error);
    }

    /// Whether something waits for room.
    pub(crate) fn is_waiting(&self) -> bool {
        let waits = |p: &Pending| p.call.load(Ordering::Acquire) || p.error.load(Ordering::Acquire);
        self.rings.iter().any(waits)
    }

    /// Sends what waits, as far as there is room.
    pub(crate) fn flush(&self) {
        for (index, pending) in (0u16..).zip(&self.rings) {
            for (request, flag) in
                [(BackendReq::VRING_CALL, &pending.call), (BackendReq::VRING_ERR, &pending.error)]
            {
                // Cleared before it is sent: a call that comes meanwhile sets it again.
                if flag.swap(false, Ordering::AcqRel) && self.send_ring(request, index) == Sent::NotYet {
                    flag.store(true, Ordering::Release);
                    return;
                }
            }
        }
    }

    /// From any thread: says something about a ring, now or when there is room.
    fn tell(&self, request: BackendReq, index: u16, flag: impl Fn(&Pending) -> &AtomicBool) -> bool {
        let Some(pending) = self.rings.get(usize::from(index)) else { return false };
        if flag(pending).load(Ordering::Acquire) {
            return true;
        }
        match self.send_ring(request, index) {
            Sent::Yes => true,
            Sent::Never => false,
            Sent::NotYet => {
                flag(pending).store(true, Ordering::Release);
                self.bell.ring();
                true
            }
        }
    }

    /// A message about a ring: its index, and a number that is reserved.
    fn send_ring(&self, request: BackendReq, index: u16) -> Sent {
        let mut body = [0; 8];
        body[..4].copy_from_slice(&u32::from(index).to_ne_bytes());
        self.send(request, &body, None)
    }

    /// The socket takes a message whole or not at all.
    fn send(&self, request: BackendReq, body: &[u8], fd: Option<BorrowedFd<'_>>) -> Sent {
        if fd.is_some() && !self.takes_fds {
            return Sent::Never;
        }
        let message = encode_request(request.into(), body);
        loop {
            return match send(self.as_fd(), &message, fd) {
                Ok(_) => Sent::Yes,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => Sent::NotYet,
                Err(_) => Sent::Never,
            };
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Announces completions of one ring by messages.
pub(crate) struct InBandCall {
    pub(crate) channel: Arc<Channel>,
    pub(crate) index: u16,
}

impl Call for InBandCall {
    fn call(&self) -> bool {
        self.channel.tell(BackendReq::VRING_CALL, self.index, |pending| &pending.call)
    }
}

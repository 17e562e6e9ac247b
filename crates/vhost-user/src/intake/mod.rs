//! Where messages come in: a thread for each connection, alone with what the peer sends.
//!
//! A peer chooses the files behind its descriptors, and some make whoever closes, polls or writes to them wait without
//! end, unimpressed even by SIGKILL: a file on FUSE, an epoll that watches one, a pipe whose reader waits inside a page
//! fault, a TCP socket that lingers. So they come into a thread that has a table of descriptors of its own
//! ([`reactor::spawn_apart`]), and that nobody waits for. It passes on what cannot do harm: eventfds, and files that
//! are memory or local ([`check`]). For a pipe, or the socket of a channel, it passes on one end of a pair of our own
//! and moves between the other end and the peer's file what there is to move ([`pump`]). All else stays here, and is
//! closed here.
//!
//! The thread starts from another, made once, whose table is all but empty: nothing of a neighbour's is ever copied.

mod check;
mod link;
mod pump;

use std::collections::BTreeMap;
use std::io;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use vhost::vhost_user::message::FrontendReq;

use crate::wire::{Connection, MESSAGE_DEADLINE, Message, Received};

use check::{Admitted, Purpose};
use link::Packet;
use pump::{Pump, Step};

pub(crate) use link::{Link, PeerFd};

const THREAD: &str = "intake";

/// Hands a connection over to a thread of its own; messages come from the link.
///
/// # Errors
/// The system refuses a pair of sockets, or the thread that starts the others.
pub(crate) fn open(stream: &UnixStream) -> io::Result<Link> {
    let (ours, theirs) = pair(SocketType::SEQPACKET)?;
    let fds = [stream.as_fd(), theirs.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(starter()?, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL)?;
    Ok(Link::new(ours))
}

/// Makes sure that connections can be handed over. The thread that starts the others gets the CPUs of the caller.
pub(crate) fn start() -> io::Result<()> {
    starter().map(drop)
}

fn starter() -> io::Result<BorrowedFd<'static>> {
    static STARTER: OnceLock<io::Result<OwnedFd>> = OnceLock::new();
    let make = || {
        let (ours, theirs) = pair(SocketType::SEQPACKET)?;
        reactor::spawn_apart(THREAD, vec![theirs], start_others)?;
        Ok(ours)
    };
    let starter = STARTER.get_or_init(make).as_ref();
    starter.map(AsFd::as_fd).map_err(|error| io::Error::new(error.kind(), error.to_string()))
}

fn start_others(fds: Vec<OwnedFd>) {
    let Some(requests) = fds.into_iter().next() else { return };
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let received =
            recvmsg(&requests, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC);
        match received {
            Ok(received) if received.bytes > 0 => {}
            Err(Errno::INTR) => continue,
            _ => return,
        }
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(more) = message {
                fds.extend(more);
            }
        }
        let told = fds.last().and_then(|link| link.try_clone().ok());
        if let (Err(error), Some(link)) = (reactor::spawn_apart(THREAD, fds, serve), told) {
            let _ = Packet::error(&format!("no thread for the connection: {error}")).send(link.as_fd());
        }
    }
}

/// The life of a connection's thread.
fn serve(fds: Vec<OwnedFd>) {
    let mut fds = fds.into_iter();
    if let (Some(stream), Some(link)) = (fds.next(), fds.next()) {
        let mut intake = Intake { connection: Connection::new(stream.into()), pumps: BTreeMap::new(), link };
        // None: nobody is left to be told.
        if let Some(last) = intake.run() {
            intake.send(&last);
        }
    }
}

/// A request that comes with a descriptor to be pumped to or from, and its ring if it has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct PumpKey(u32, u8);

impl PumpKey {
    /// The pump for a device's state.
    const STATE: Self = Self(FrontendReq::SET_DEVICE_STATE_FD as u32, 0);

    fn of(request: u32, purpose: Purpose, body: &[u8]) -> Self {
        // The ring is in the low byte of the first number.
        let ring = if purpose == Purpose::Signal { body.first().copied() } else { None };
        Self(request, ring.unwrap_or(0))
    }
}

/// A connection as seen by its thread. Closed from top to bottom: who sees the link closed knows that all else is.
struct Intake {
    connection: Connection,
    pumps: BTreeMap<PumpKey, Pump>,
    link: OwnedFd,
}

/// The control thread has no more use for the connection.
struct Unwanted;

impl Intake {
    /// Takes messages in until there are no more, and returns what there is to say then.
    fn run(&mut self) -> Option<Packet> {
        loop {
            self.wait(false).ok()?;
            match self.connection.receive() {
                Ok(Received::Message(message)) => self.take(message).ok()?,
                Ok(Received::Nothing) => {}
                Ok(Received::End) => return Some(Packet::end()),
                Err(error) => return Some(Packet::error(&error.to_string())),
            }
        }
    }

    /// Passes a message on with what may be passed on of its descriptors.
    fn take(&mut self, message: Message) -> Result<(), Unwanted> {
        let Message { request, need_reply, body, fds } = message;
        let purpose = Purpose::of(request, &body);
        let key = PumpKey::of(request, purpose, &body);
        // Closed only when the message is on its way: that may take its time.
        let mut discarded = Vec::new();
        let mut replaced: Vec<Pump> = Vec::new();
        if purpose.may_be_pumped() {
            replaced.extend(self.pumps.remove(&key));
        }
        let admit = |fd| match check::admit(purpose, fd) {
            Admitted::Passed(fd) => PeerFd::Open { fd, takes_fds: false },
            Admitted::Pumped { pump, ours, takes_fds } => {
                replaced.extend(self.pumps.insert(key, pump));
                PeerFd::Open { fd: ours, takes_fds }
            }
            Admitted::Kept(fd) => {
                discarded.push(fd);
                PeerFd::Kept
            }
            Admitted::Refused(fd, reason) => {
                discarded.push(fd);
                PeerFd::Refused(reason)
            }
        };
        let fds = fds.into_iter().map(admit).collect();
        if request == u32::from(FrontendReq::CHECK_DEVICE_STATE) {
            self.finish_load()?;
        }
        self.send(&Packet::message(Message { request, need_reply, body, fds })).then_some(()).ok_or(Unwanted)
    }

    /// Has all that the front end has written of a device's state on its way before the question whether it came.
    fn finish_load(&mut self) -> Result<(), Unwanted> {
        let deadline = Instant::now() + MESSAGE_DEADLINE;
        while let Some(pump) = self.pumps.get_mut(&PumpKey::STATE).filter(|pump| !pump.acknowledges())
            && Instant::now() < deadline
        {
            match pump.step() {
                Step::Idle => return Ok(()),
                Step::Over => drop(self.pumps.remove(&PumpKey::STATE)),
                Step::Busy => self.wait(true)?,
            }
        }
        Ok(())
    }

    /// Sends a packet, and waits for room; false if nobody will have it.
    fn send(&mut self, packet: &Packet) -> bool {
        loop {
            match packet.send(self.link.as_fd()) {
                Ok(()) => return true,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if self.wait(true).is_ok() => {}
                Err(_) => return false,
            }
        }
    }

    /// Waits for something to do, and does what there is to do for the pumps. `sending`: for room in the link, and not
    /// for the peer.
    fn wait(&mut self, sending: bool) -> Result<(), Unwanted> {
        let (link, stream) = match sending {
            true => (PollFlags::RDHUP | PollFlags::OUT, None),
            false => (PollFlags::RDHUP, Some(PollFd::new(&self.connection, PollFlags::IN))),
        };
        let mut fds = vec![PollFd::new(&self.link, link)];
        fds.extend(self.pumps.values().flat_map(Pump::waits_for));
        fds.extend(stream);
        let deadline = self.connection.deadline().filter(|_| !sending);
        let timeout = deadline.map(|deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() }
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return Err(Unwanted),
        }
        let revents: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        let (&of_link, of_others) = revents.split_first().ok_or(Unwanted)?;
        if of_link.intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR) {
            return Err(Unwanted);
        }
        let (of_pumps, _) = of_others.as_chunks();
        let mut of_pumps = of_pumps.iter();
        self.pumps.retain(|_, pump| of_pumps.next().is_none_or(|&revents| pump.go_on(revents)));
        Ok(())
    }
}

fn pair(kind: SocketType) -> Result<(OwnedFd, OwnedFd), Errno> {
    socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
}

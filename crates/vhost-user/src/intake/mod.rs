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
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use reactor::NotSpawned;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, recvmsg, sendmsg, socketpair,
};
use vhost::vhost_user::message::FrontendReq;

use crate::wire::{Connection, MESSAGE_DEADLINE, Message, Received};

use check::{Admitted, Purpose};
use link::Packet;
use pump::{Pump, Step};

pub(crate) use link::{Link, PeerFd};

const THREAD: &str = "intake";
/// How long after the system refused a thread, or memory, it is asked again.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// Hands a connection over to a thread of its own; messages come from the link. That thread closes the connection last
/// if the caller has closed its own copy when it has the thread end, with [`Link::leave`]: what the peer has sent and
/// nobody took goes with the last.
///
/// # Errors
/// The system refuses a pair of sockets, or the thread that starts the others, or that one does not follow.
pub(crate) fn open(stream: &UnixStream) -> io::Result<Link> {
    let (ours, theirs) = pair(SocketType::SEQPACKET)?;
    hand_over(&[stream.as_fd(), theirs.as_fd()])?;
    Ok(Link::new(ours))
}

/// Leaves it to a thread of its own to close a socket for the last time, in which there may be descriptors of a peer.
/// The caller closes it after this.
pub(crate) fn outlive(socket: BorrowedFd<'_>) {
    if let Err(error) = hand_over(&[socket]) {
        tracing::warn!(%error, "a socket stays open: there is no thread to close it");
        // Rather for the rest of this process's life than waited for.
        let _ = socket.try_clone_to_owned().map(std::mem::forget);
    }
}

/// Makes sure that connections can be handed over.
pub(crate) fn start() -> io::Result<()> {
    starter().map(drop)
}

fn hand_over(fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(fds));
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    sendmsg(starter()?, &[IoSlice::new(&[0])], &mut control, flags)?;
    Ok(())
}

/// The thread that starts the others, on the CPUs of helpers, and for all devices.
fn starter() -> io::Result<BorrowedFd<'static>> {
    static STARTER: MadeOnce = MadeOnce::new();
    STARTER.get(|| {
        let (ours, theirs) = pair(SocketType::SEQPACKET)?;
        reactor::spawn_apart(THREAD, vec![theirs], start_others)?;
        Ok(ours)
    })
}

/// A descriptor that is made when it is first needed, and once. Making it may fail, and is tried again then.
struct MadeOnce {
    made: OnceLock<OwnedFd>,
    making: Mutex<()>,
}

impl MadeOnce {
    const fn new() -> Self {
        Self { made: OnceLock::new(), making: Mutex::new(()) }
    }

    fn get(&self, make: impl FnOnce() -> io::Result<OwnedFd>) -> io::Result<BorrowedFd<'_>> {
        let _making = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        let made = match self.made.get() {
            Some(made) => made,
            None => {
                let made = make()?;
                self.made.get_or_init(|| made)
            }
        };
        Ok(made.as_fd())
    }
}

/// The life of the thread that starts the others. Only when it is told that nobody needs them any more does it end.
fn start_others(fds: Vec<OwnedFd>) {
    let Some(requests) = fds.into_iter().next() else { return };
    loop {
        match handed_over(&requests) {
            Ok(None) => return,
            Ok(Some(fds)) => start_one(fds),
            Err(Errno::INTR) => {}
            // Out of memory: what is to be handed over waits.
            Err(_) => std::thread::sleep(RETRY_PAUSE),
        }
    }
}

/// What is handed over next; None if nobody can.
fn handed_over(requests: &OwnedFd) -> Result<Option<Vec<OwnedFd>>, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let received =
        recvmsg(requests, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fds = fds.flatten().collect();
    Ok((received.bytes > 0).then_some(fds))
}

/// Starts the thread for a connection, or the one that closes a socket. Until the system allows one, both stay open, and
/// the others wait: they could not be served either.
fn start_one(mut fds: Vec<OwnedFd>) {
    let mut is_told = false;
    while let Err(NotSpawned { error, fds: returned }) = reactor::spawn_apart(THREAD, fds, serve) {
        fds = returned;
        if !std::mem::replace(&mut is_told, true)
            && let [_, link] = &fds[..]
        {
            let _ = Packet::error(&format!("no thread for the connection: {error}")).send(link.as_fd());
        }
        std::thread::sleep(RETRY_PAUSE);
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
        intake.outlast();
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

/// What an intake waits for, beside its pumps.
enum WaitFor {
    /// The peer.
    Message,
    /// Room in the link, and not for the peer.
    Room,
    /// Nothing else, until this time.
    Pumps(Instant),
}

impl Intake {
    /// Takes messages in until there are no more, and returns what there is to say then.
    fn run(&mut self) -> Option<Packet> {
        loop {
            self.wait(WaitFor::Message).ok()?;
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
                Step::Busy => drop(self.wait(WaitFor::Pumps(deadline))?),
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
                Err(Errno::AGAIN) if self.wait(WaitFor::Room).is_ok() => {}
                Err(_) => return false,
            }
        }
    }

    /// Waits for something to do, and does what there is to do for the pumps; false if the time was up.
    fn wait(&mut self, what: WaitFor) -> Result<bool, Unwanted> {
        let (link, stream, deadline) = match what {
            WaitFor::Message => {
                let stream = PollFd::new(&self.connection, PollFlags::IN);
                (PollFlags::RDHUP, Some(stream), self.connection.deadline())
            }
            WaitFor::Room => (PollFlags::RDHUP | PollFlags::OUT, None, None),
            WaitFor::Pumps(deadline) => (PollFlags::RDHUP, None, Some(deadline)),
        };
        let mut fds = vec![PollFd::new(&self.link, link)];
        fds.extend(self.pumps.values().flat_map(Pump::waits_for));
        fds.extend(stream);
        let timeout = deadline.map(|deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() }
        });
        let ready = match poll(&mut fds, timeout.as_ref()) {
            Ok(ready) => ready > 0,
            Err(Errno::INTR) => true,
            Err(error) => {
                let _ = Packet::error(&format!("the front end cannot be waited for: {error}"))
                    .send(self.link.as_fd());
                return Err(Unwanted);
            }
        };
        let revents: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        let (&of_link, of_others) = revents.split_first().ok_or(Unwanted)?;
        if of_link.intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR) {
            return Err(Unwanted);
        }
        let (of_pumps, _) = of_others.as_chunks();
        let mut of_pumps = of_pumps.iter();
        self.pumps.retain(|_, pump| of_pumps.next().is_none_or(|&revents| pump.go_on(revents)));
        Ok(ready)
    }

    /// Waits until the control thread has closed the connection. It is not to close it last.
    fn outlast(&self) {
        // Nothing is ever sent this way.
        while recv(&self.link, &mut [0], RecvFlags::empty()) == Err(Errno::INTR) {}
    }
}

fn pair(kind: SocketType) -> Result<(OwnedFd, OwnedFd), Errno> {
    socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_not_be_made_is_made_later_and_once() {
        let made = MadeOnce::new();
        assert!(made.get(|| Err(Errno::MFILE.into())).is_err());
        assert!(made.get(|| Ok(pair(SocketType::STREAM)?.0)).is_ok());
        assert!(made.get(|| panic!("once")).is_ok());
    }

    /// Not even for room in the link, which there is.
    #[test]
    fn the_state_is_waited_for_at_its_pump_alone() {
        let (stream, _peer) = UnixStream::pair().unwrap();
        let (link, _control) = pair(SocketType::SEQPACKET).unwrap();
        let (from, theirs) = pair(SocketType::STREAM).unwrap();
        let (to, _ours) = pair(SocketType::STREAM).unwrap();
        let mut pump = Pump::new(pump::End::Socket(from), pump::End::Socket(to));
        while pump.step() != Step::Busy {
            crate::wire::send(theirs.as_fd(), &[0; 1 << 16], None).unwrap();
        }
        let pumps = BTreeMap::from([(PumpKey::STATE, pump)]);
        let mut intake = Intake { connection: Connection::new(stream), pumps, link };
        // Both ends of the pump are full.
        let past = Instant::now();
        assert!(matches!(intake.wait(WaitFor::Pumps(past)), Ok(false)));
    }
}

//! The control thread of one device.
//!
//! It waits for everything at once (shutdown, the device, the listener, the front end) and hands whole messages to the
//! session. One front end at a time holds the device; a second one is turned away, and when the first is gone, for
//! whatever reason, the next may come: at once, or after a pause if the first kept a thread waiting that others need.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use virtio::{QueueCounters, QueueSet};

use crate::bell::Bell;
use crate::inflight::RecordId;
use crate::intake::{self, Link};
use crate::listener::{ListenError, Listener};
use crate::peer_log::{Kind, PeerLog};
use crate::session::{Reply, Session, SessionError, SessionOptions, lock};
use crate::wire::{Received, Replies, WireError};

/// How long no front end is accepted after the system refused to (it is out of descriptors), or while none may be.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// How long no front end is accepted after one that made a thread of ours wait. It can do that for some 20 ms in a
/// session, so this keeps whoever tries it all the time below 0.1 % of an I/O thread's time.
const HOSTILE_PAUSE: Duration = Duration::from_secs(60);
/// How long messages are waited for that a front end sent before it hung up. They come at once, unless it keeps the
/// thread that takes them in.
const HANG_UP_PATIENCE: Duration = Duration::from_secs(2);
/// Threads of connections that are over, and that wait in a descriptor. With so many no front end is accepted.
const LEAVING_MAX: usize = 8;

/// How a device is served.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where front ends connect.
    pub socket: PathBuf,
    /// Permissions of the socket file.
    pub socket_mode: u32,
    /// Group of the socket file, if it is not to be this process's.
    pub socket_group: Option<u32>,
    /// Virtio feature bits not to offer, whatever the device has. User-Mode Linux up to 6.x needs none withheld: its
    /// way of setting up packed rings is recognised.
    pub without: u64,
    /// Offer guests memory to write to instead of kicking, for the queues whose thread never sleeps.
    pub host_notifier: bool,
}

impl Options {
    /// A socket for this user only, and everything offered.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            socket_mode: 0o600,
            socket_group: None,
            without: 0,
            host_notifier: false,
        }
    }
}

/// Why a device cannot be served (any longer).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody can connect.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The system refused.
    #[error("cannot {what}: {source}")]
    System {
        /// What was being done.
        what: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
}

/// Who is at the other end, as the kernel says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Process.
    pub pid: i32,
    /// User.
    pub uid: u32,
}

/// The state of one queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueStatus {
    /// The front end has kicked or is to be polled.
    pub started: bool,
    /// The front end wants it served.
    pub enabled: bool,
    /// Descriptors; None if the front end has not said.
    pub size: Option<u16>,
    /// What it has counted since it was last started; None while it does not run (or is just stopping).
    pub counters: Option<QueueCounters>,
    /// Its ring is broken, or the device's code for it has failed.
    pub failed: bool,
}

/// What a server is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// A front end has the device.
    pub connected: bool,
    /// Who that is, if the kernel knows.
    pub peer: Option<Peer>,
    /// Virtio features it has negotiated.
    pub features: u64,
    /// Front ends so far, this one included.
    pub sessions: u64,
    /// Front ends turned away because another had the device.
    pub refused: u64,
    /// Messages received, in all sessions.
    pub messages: u64,
    /// Why the last session that did not end in peace has ended.
    pub last_error: Option<String>,
    /// The queues.
    pub queues: Vec<QueueStatus>,
}

/// What the control thread shares with others.
struct Shared {
    status: Mutex<Status>,
    /// Held while a front end gets the device, or while none is to get it.
    admission: Mutex<()>,
    queues: Arc<Mutex<QueueSet>>,
    record: Arc<Mutex<Option<RecordId>>>,
}

impl Shared {
    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For a front end to get the device; None if that has to wait.
    fn try_admission(&self) -> Option<MutexGuard<'_, ()>> {
        match self.admission.try_lock() {
            Ok(admission) => Some(admission),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

/// Tells about a server, from any thread.
#[derive(Clone)]
pub struct ServerHandle(Arc<Shared>);

impl ServerHandle {
    /// What the server is doing.
    #[must_use]
    pub fn status(&self) -> Status {
        let mut status = self.0.status().clone();
        // Not waiting for a queue that is being stopped: its backend may take its time.
        if let Ok(queues) = self.0.queues.try_lock() {
            for (index, queue) in (0u16..).zip(&mut status.queues) {
                queue.counters = queues.counters(index);
                queue.failed = queues.has_failed(index) || queues.error(index).is_some();
            }
        }
        status
    }

    /// Does something while no front end has the device, and has those wait that would connect meanwhile; None if one
    /// has it. It may take its time: the control thread and [`ServerHandle::status`] do not wait for it.
    pub fn unless_connected<T>(&self, act: impl FnOnce() -> T) -> Option<T> {
        let _admission = self.0.admission.lock().unwrap_or_else(PoisonError::into_inner);
        let connected = self.0.status().connected;
        (!connected).then(act)
    }
}

/// Where a device says that its configuration has changed.
struct Signals {
    bell: Arc<Bell>,
    config_changed: AtomicBool,
}

/// A device behind a vhost-user socket.
pub struct Server {
    listener: Listener,
    shared: Arc<Shared>,
    signals: Arc<Signals>,
    session_options: SessionOptions,
    log: Arc<PeerLog>,
}

impl Server {
    /// Makes the socket. Front ends can connect from now on and are served by [`Server::run`].
    ///
    /// # Errors
    /// The socket cannot be made, or somebody else uses it.
    pub fn new(queues: QueueSet, options: &Options) -> Result<Self, Error> {
        intake::start()
            .map_err(|source| Error::System { what: "start the thread for connections", source })?;
        let listener = Listener::for_group(&options.socket, options.socket_mode, options.socket_group)?;
        let bell = Bell::new().map_err(|e| Error::System { what: "make an eventfd", source: e.into() })?;
        let signals = Arc::new(Signals { bell: Arc::new(bell), config_changed: AtomicBool::new(false) });
        let device = queues.device().clone();
        let for_device = signals.clone();
        device.set_config_listener(Some(Arc::new(move || {
            for_device.config_changed.store(true, Ordering::Release);
            for_device.bell.ring();
        })));
        let status =
            Status { queues: vec![QueueStatus::default(); device.queues().into()], ..Status::default() };
        let shared = Shared {
            status: Mutex::new(status),
            admission: Mutex::default(),
            queues: Arc::new(Mutex::new(queues)),
            record: Arc::default(),
        };
        Ok(Self {
            listener,
            shared: Arc::new(shared),
            signals,
            session_options: SessionOptions {
                without: options.without,
                host_notifier: options.host_notifier,
            },
            log: Arc::new(PeerLog::new()),
        })
    }

    /// Tells about the server.
    #[must_use]
    pub fn handle(&self) -> ServerHandle {
        ServerHandle(self.shared.clone())
    }

    /// Serves front ends until `shutdown` becomes readable (it is not read). Then the queues are stopped, which completes
    /// the requests in flight, and the connection is closed.
    ///
    /// # Errors
    /// The system refuses to wait for descriptors. No fault of a front end ends it.
    pub fn run(&self, shutdown: BorrowedFd<'_>) -> Result<(), Error> {
        let mut active: Option<Active> = None;
        let mut arrived: Option<UnixStream> = None;
        let mut deaf_until: Option<Instant> = None;
        let mut leaving: Vec<OwnedFd> = Vec::new();
        loop {
            let ready = self.wait(shutdown, active.as_ref(), &mut leaving, deaf_until)?;
            if ready.shutdown {
                break;
            }
            self.log.settle();
            if deaf_until.is_some_and(|until| Instant::now() >= until) {
                deaf_until = None;
            }
            if ready.bell {
                self.signals.bell.quiet();
            }
            let config_changed = self.signals.config_changed.swap(false, Ordering::AcqRel);
            if let Some(active) = &mut active {
                if config_changed {
                    active.session.config_changed();
                }
                if ready.hung_up {
                    active.hung_up.get_or_insert_with(Instant::now);
                }
            }
            active = active.and_then(|active| {
                let trust = active.session.trust().clone();
                let active = self.step(active, &mut leaving);
                if active.is_none() && trust.is_lost() {
                    deaf_until = Some(Instant::now() + HOSTILE_PAUSE);
                    let (socket, pause_s) = (self.listener.path().display(), HOSTILE_PAUSE.as_secs());
                    tracing::warn!(%socket, pause_s, "no front end is accepted for a while");
                }
                active
            });
            // While the front end that leaves is seen off, the next one waits.
            let waits = ready.listener || arrived.is_some() && leaving.len() < LEAVING_MAX;
            if waits && deaf_until.is_none() && (active.is_none() || !ready.hung_up) {
                match self.accept(&mut arrived, active.is_some(), &mut leaving) {
                    Accepted::Active(next) => active = Some(*next),
                    Accepted::Nobody => {}
                    Accepted::NotNow => deaf_until = Some(Instant::now() + ACCEPT_PAUSE),
                }
            }
        }
        if let Some(stream) = arrived {
            intake::outlive(stream.as_fd());
        }
        if let Some(active) = active {
            self.end(active, &mut leaving, None);
        }
        Ok(())
    }

    /// Waits until there is something to do.
    fn wait(
        &self,
        shutdown: BorrowedFd<'_>,
        active: Option<&Active>,
        leaving: &mut Vec<OwnedFd>,
        deaf_until: Option<Instant>,
    ) -> Result<Ready, Error> {
        let hung_up_at = active.and_then(|active| active.hung_up);
        let is_deaf = deaf_until.is_some() || hung_up_at.is_some() || leaving.len() >= LEAVING_MAX;
        let listens = if is_deaf { PollFlags::empty() } else { PollFlags::IN };
        let mut fds = vec![
            PollFd::from_borrowed_fd(shutdown, PollFlags::IN),
            PollFd::new(&*self.signals.bell, PollFlags::IN),
            PollFd::new(&self.listener, listens),
        ];
        // Heard of when they hang up.
        fds.extend(leaving.iter().map(|link| PollFd::new(link, PollFlags::empty())));
        let mut times =
            vec![deaf_until, hung_up_at.map(|since| since + HANG_UP_PATIENCE), self.log.settles_at()];
        let at_front_end = fds.len();
        if let Some(Active { link, replies, session, .. }) = active {
            // The link before the connection: when that has hung up, what came before may still be on its way.
            fds.push(PollFd::new(link, PollFlags::IN));
            if hung_up_at.is_none() {
                fds.push(PollFd::new(replies, PollFlags::empty()));
            }
            if let Some(channel) = session.channel_to_flush() {
                fds.push(PollFd::new(channel, PollFlags::OUT));
            }
            if let Some(transfer) = session.transfer() {
                fds.push(PollFd::new(transfer, transfer.events()));
                times.push(Some(transfer.deadline()));
            }
        }
        let timeout = times.into_iter().flatten().min().map(|deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() }
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => {
                return Err(Error::System { what: "wait for the front end", source: errno.into() });
            }
        }
        let revents: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        let mut of_leaving = revents[3..].iter();
        leaving.retain(|_| of_leaving.next().is_none_or(|revents| revents.is_empty()));
        let is_ready = |at: usize| !revents[at].is_empty();
        // Looked at after the listener: of a front end that closes and connects again, both are seen.
        let hung_up = hung_up_at.is_some()
            || active.is_some()
                && revents.get(at_front_end + 1).is_some_and(|revents| revents.contains(PollFlags::HUP));
        Ok(Ready { shutdown: is_ready(0), bell: is_ready(1), listener: is_ready(2), hung_up })
    }

    /// Accepts a front end, if one waits: it gets the device unless that `is_taken`.
    fn accept(
        &self,
        arrived: &mut Option<UnixStream>,
        is_taken: bool,
        leaving: &mut Vec<OwnedFd>,
    ) -> Accepted {
        self.try_accept(arrived, is_taken, leaving).unwrap_or_else(|error| {
            if self.log.admits(Kind::NotAccepted) {
                tracing::warn!(%error, "cannot accept a front end");
            }
            Accepted::NotNow
        })
    }

    /// One that `arrived` and could not be handed over goes first: it may have sent descriptors, so its connection is
    /// not closed here.
    fn try_accept(
        &self,
        arrived: &mut Option<UnixStream>,
        is_taken: bool,
        leaving: &mut Vec<OwnedFd>,
    ) -> std::io::Result<Accepted> {
        let admission = self.shared.try_admission();
        if !is_taken && admission.is_none() {
            return Ok(Accepted::NotNow);
        }
        let Some(stream) =
            arrived.take().map_or_else(|| self.listener.accept(), |stream| Ok(Some(stream)))?
        else {
            return Ok(Accepted::Nobody);
        };
        let link = match intake::open(&stream) {
            Ok(link) => link,
            Err(error) => {
                *arrived = Some(stream);
                return Err(error);
            }
        };
        let peer = peer_of(&stream);
        let replies = Replies::new(stream);
        if is_taken {
            self.turn_away(peer);
            see_off(replies, link, leaving);
            return Ok(Accepted::Nobody);
        }
        let Shared { queues, record, .. } = &*self.shared;
        let mut session = Session::new(
            queues.clone(),
            self.session_options,
            self.signals.bell.clone(),
            self.log.clone(),
            record.clone(),
        );
        session.driver_pid = peer.and_then(|peer| u32::try_from(peer.pid).ok());
        let mut status = self.shared.status();
        status.connected = true;
        status.peer = peer;
        status.sessions += 1;
        drop(status);
        let active = Active { session, replies, link, peer, has_spoken: false, hung_up: None };
        Ok(Accepted::Active(Box::new(active)))
    }

    fn turn_away(&self, peer: Option<Peer>) {
        let holder = {
            let mut status = self.shared.status();
            status.refused += 1;
            status.peer
        };
        if self.log.admits(Kind::TurnedAway) {
            let socket = self.listener.path().display();
            tracing::warn!(%socket, ?peer, ?holder, "front end refused: the device is taken");
        }
    }

    /// Does what there is to do for the front end; None if that was the end of it.
    fn step(&self, mut active: Active, leaving: &mut Vec<OwnedFd>) -> Option<Active> {
        let error = match active.step(|active| self.publish(active)) {
            Ok(Step::GoOn) => return Some(active),
            Ok(Step::End) => None,
            Err(error) => Some(error.to_string()),
        };
        self.end(active, leaving, error);
        None
    }

    fn end(&self, active: Active, leaving: &mut Vec<OwnedFd>, error: Option<String>) {
        let Active { link, replies, session, peer, has_spoken, .. } = active;
        let socket = self.listener.path().display();
        match &error {
            // Somebody who looks whether the socket is served.
            None if !has_spoken => tracing::debug!(%socket, ?peer, "a connection without a request"),
            _ if !self.log.admits(Kind::Went) => {}
            Some(error) => tracing::warn!(%socket, ?peer, %error, "front end disconnected"),
            None => tracing::info!(%socket, ?peer, "front end gone"),
        }
        // The queues first: whoever sees the connection closed finds the device free.
        drop(session);
        let mut status = self.shared.status();
        status.connected = false;
        status.peer = None;
        status.features = 0;
        status.queues.fill(QueueStatus::default());
        if error.is_some() {
            status.last_error = error;
        }
        drop(status);
        see_off(replies, link, leaving);
    }

    /// Notes a message. The first one is what makes a connection worth a line.
    fn publish(&self, active: &mut Active) {
        if !std::mem::replace(&mut active.has_spoken, true) && self.log.admits(Kind::Came) {
            tracing::info!(socket = %self.listener.path().display(), peer = ?active.peer, "front end connected");
        }
        let session = &active.session;
        let mut status = self.shared.status();
        status.messages += 1;
        status.features = session.features();
        for (queue, vring) in status.queues.iter_mut().zip(session.vrings()) {
            queue.started = vring.kick.is_some();
            queue.enabled = vring.enabled;
            queue.size = vring.size;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        lock(&self.shared.queues).device().set_config_listener(None);
    }
}

struct Ready {
    shutdown: bool,
    bell: bool,
    listener: bool,
    /// The front end has closed its connection, and may have left messages in it.
    hung_up: bool,
}

/// What came of accepting.
enum Accepted {
    /// A front end that has the device.
    Active(Box<Active>),
    /// None that is to be served.
    Nobody,
    /// The system refuses, or the device is to be without a front end for now.
    NotNow,
}

/// A front end and what it has set up. Dropped from top to bottom: see [`see_off`].
struct Active {
    session: Session,
    replies: Replies,
    link: Link,
    peer: Option<Peer>,
    /// It has sent a message.
    has_spoken: bool,
    /// Since when its end of the connection is closed.
    hung_up: Option<Instant>,
}

enum Step {
    GoOn,
    End,
}

#[derive(Debug, thiserror::Error)]
enum StepError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Session(#[from] SessionError),
}

impl Active {
    /// Takes in what has come, and answers after `publish`: whoever has the answer finds the status as it says.
    fn step(&mut self, publish: impl FnOnce(&mut Self)) -> Result<Step, StepError> {
        self.session.advance_transfer();
        match self.link.receive()? {
            Received::End => return Ok(Step::End),
            Received::Nothing if self.hung_up.is_some_and(|since| since.elapsed() >= HANG_UP_PATIENCE) => {
                return Err(WireError::Stuck.into());
            }
            Received::Nothing => {}
            Received::Message(message) => {
                let request = message.request;
                let reply = self.session.handle(message)?;
                publish(self);
                if let Some(Reply { body, fd }) = reply {
                    self.replies.reply(request, &body, fd.as_ref().map(AsFd::as_fd))?;
                }
            }
        }
        self.session.flush();
        if self.session.trust().is_lost() {
            return Err(SessionError::Blocked.into());
        }
        Ok(Step::GoOn)
    }
}

/// Ends a connection: this end before that of its thread, because what the front end has sent and nobody took is closed
/// with the last.
fn see_off(replies: Replies, link: Link, leaving: &mut Vec<OwnedFd>) {
    drop(replies);
    leaving.push(link.leave());
}

fn peer_of(stream: &UnixStream) -> Option<Peer> {
    let cred = rustix::net::sockopt::socket_peercred(stream).ok()?;
    Some(Peer { pid: cred.pid.as_raw_nonzero().get(), uid: cred.uid.as_raw() })
}

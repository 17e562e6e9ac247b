//! The thread that answers scrapes.
//!
//! One thread, a few connections, and a limit on everything: how long a connection lasts, how often new ones are
//! accepted, how often figures are collected. Whoever is slow loses its connection, whoever comes when all places are
//! taken gets the oldest one, and nothing keeps the thread from ending when it is told to.

use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags, accept_with, recv, send};
use vhost_user::Listener;

use super::address::Address;
use super::http::{PATH, Request};

/// The most connections at a time.
const CONNECTIONS_MAX: usize = 8;
/// How long a connection may last.
const CONNECTION_MAX: Duration = Duration::from_secs(5);
/// Between two connections; after a failure to accept one, which most likely comes again.
const ACCEPT_EVERY: Duration = Duration::from_millis(5);
const ACCEPT_AGAIN: Duration = Duration::from_secs(1);
/// Figures are collected so often; who asks in between gets the last ones.
const COLLECT_EVERY: Duration = Duration::from_millis(100);
/// How long it may take to end. Only collecting can take long, if a device is busy with storage that does not answer.
const END_MAX: Duration = Duration::from_secs(1);
/// A Unix socket is for its owner alone.
const MODE: u32 = 0o600;
/// Scrapes need no deep stacks.
const STACK_BYTES: usize = 256 << 10;

/// What collects the figures.
pub(crate) type Collect = Box<dyn Fn() -> String + Send>;

enum Socket {
    Unix(Listener),
    Tcp(TcpListener),
}

/// A socket for scrapes: nobody is answered yet.
pub(crate) struct MetricsSocket(Socket);

impl MetricsSocket {
    /// Listens at `address`. A Unix socket that was left behind is replaced.
    pub(crate) fn listen(address: &Address) -> anyhow::Result<Self> {
        match address {
            Address::Unix(path) => Listener::new(path, MODE).map(Socket::Unix).context("metrics"),
            Address::Tcp(address) => listen_tcp(address)
                .map(Socket::Tcp)
                .with_context(|| format!("metrics: cannot listen at {address}")),
        }
        .map(Self)
    }

    /// Where it is, as clients say it.
    pub(crate) fn place(&self) -> String {
        match &self.0 {
            Socket::Unix(listener) => Address::Unix(listener.path().to_owned()).to_string(),
            Socket::Tcp(listener) => match listener.local_addr() {
                Ok(address) => format!("http://{address}{PATH}"),
                Err(_) => "tcp".to_owned(),
            },
        }
    }

    /// Answers until the result is dropped, with what `collect` says.
    pub(crate) fn answer(self, collect: Collect) -> anyhow::Result<MetricsThread> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC).context("cannot make an eventfd")?;
        let stopped = stop.try_clone().context("cannot share an eventfd")?;
        let server = Server { socket: self.0, connections: Vec::new(), page: Page { collect, last: None } };
        let (running, ended) = channel();
        let run = move || {
            let _running = running;
            server.run(&stopped);
        };
        let thread = thread::Builder::new().name("metrics".to_owned()).stack_size(STACK_BYTES);
        thread.spawn(run).context("cannot start the metrics thread")?;
        Ok(MetricsThread { stop, ended })
    }
}

fn listen_tcp(address: &SocketAddr) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }
}

/// The thread; it ends when this is dropped, and the socket with it.
pub(crate) struct MetricsThread {
    stop: OwnedFd,
    ended: Receiver<Infallible>,
}

impl Drop for MetricsThread {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
        if let Err(RecvTimeoutError::Timeout) = self.ended.recv_timeout(END_MAX) {
            tracing::warn!("the metrics thread does not end; what it collects figures of does not answer");
        }
    }
}

/// The page, collected anew when it is old.
struct Page {
    collect: Collect,
    last: Option<(Instant, String)>,
}

impl Page {
    fn get(&mut self, now: Instant) -> String {
        match &self.last {
            Some((at, page)) if now.saturating_duration_since(*at) < COLLECT_EVERY => page.clone(),
            _ => {
                let page = (self.collect)();
                self.last = Some((now, page.clone()));
                page
            }
        }
    }
}

struct Server {
    socket: Socket,
    /// The oldest first.
    connections: Vec<Connection>,
    page: Page,
}

impl Server {
    fn run(mut self, stop: &OwnedFd) {
        let mut accept_at = Instant::now();
        loop {
            let now = Instant::now();
            self.connections.retain(|connection| connection.ends > now);
            let accepts = accept_at <= now;
            let next = self.connections.iter().map(|connection| connection.ends);
            let next = next.chain((!accepts).then_some(accept_at)).min();
            let Ok(ready) = self.wait(stop, accepts, next.map(|at| at.saturating_duration_since(now))) else {
                // A signal, or the system is out of memory.
                thread::sleep(ACCEPT_EVERY);
                continue;
            };
            if ready.stop {
                return;
            }
            let (mut ready_ones, page) = (ready.connections.into_iter(), &mut self.page);
            self.connections.retain_mut(|connection| {
                ready_ones.next() != Some(true) || connection.go_on(page) == Ok(Went::On)
            });
            if ready.listener {
                accept_at = Instant::now() + self.accept();
            }
        }
    }

    /// Waits until there is something to do, or for `timeout`.
    fn wait(&self, stop: &OwnedFd, accepts: bool, timeout: Option<Duration>) -> Result<Ready, Errno> {
        let mut fds = vec![PollFd::new(stop, PollFlags::IN)];
        let connection = |connection: &'_ Connection| connection.state.awaits();
        fds.extend(self.connections.iter().map(|each| PollFd::new(&each.stream, connection(each))));
        if accepts {
            fds.push(PollFd::new(&self.socket, PollFlags::IN));
        }
        let timeout = timeout.map(|timeout| Timespec {
            tv_sec: timeout.as_secs() as i64,
            tv_nsec: timeout.subsec_nanos().into(),
        });
        poll(&mut fds, timeout.as_ref())?;
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
        Ok(Ready {
            stop: ready.next() == Some(true),
            connections: ready.by_ref().take(self.connections.len()).collect(),
            listener: ready.next() == Some(true),
        })
    }

    /// Accepts a connection; how long it is until the next one may come.
    fn accept(&mut self) -> Duration {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        match accept_with(&self.socket, flags) {
            Ok(stream) => {
                if self.connections.len() == CONNECTIONS_MAX {
                    self.connections.remove(0);
                }
                let ends = Instant::now() + CONNECTION_MAX;
                self.connections.push(Connection { stream, ends, state: State::Asks(Request::default()) });
                ACCEPT_EVERY
            }
            // It has gone again.
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => ACCEPT_EVERY,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection for metrics");
                ACCEPT_AGAIN
            }
        }
    }
}

/// What can be done without waiting.
struct Ready {
    stop: bool,
    connections: Vec<bool>,
    listener: bool,
}

struct Connection {
    stream: OwnedFd,
    ends: Instant,
    state: State,
}

enum State {
    Asks(Request),
    IsAnswered { answer: Vec<u8>, sent: usize },
}

impl State {
    fn awaits(&self) -> PollFlags {
        match self {
            Self::Asks(_) => PollFlags::IN,
            Self::IsAnswered { .. } => PollFlags::OUT,
        }
    }
}

/// How far a connection has come.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Went {
    On,
    ToItsEnd,
}

impl Connection {
    /// Does what can be done without waiting.
    fn go_on(&mut self, page: &mut Page) -> Result<Went, Errno> {
        match &mut self.state {
            State::Asks(request) => {
                let mut bytes = [0; 1024];
                let room = request.room().min(bytes.len());
                let (count, _) = match recv(&self.stream, &mut bytes[..room], RecvFlags::DONTWAIT) {
                    Err(Errno::AGAIN | Errno::INTR) => return Ok(Went::On),
                    other => other?,
                };
                if count == 0 {
                    return Ok(Went::ToItsEnd);
                }
                if let Some(answer) = request.add(&bytes[..count], || page.get(Instant::now())) {
                    self.state = State::IsAnswered { answer, sent: 0 };
                }
                Ok(Went::On)
            }
            State::IsAnswered { answer, sent } => {
                match send(&self.stream, &answer[*sent..], SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                    Ok(count) => *sent += count,
                    Err(Errno::AGAIN | Errno::INTR) => {}
                    Err(errno) => return Err(errno),
                }
                Ok(if *sent == answer.len() { Went::ToItsEnd } else { Went::On })
            }
        }
    }
}

#[cfg(test)]
mod tests;

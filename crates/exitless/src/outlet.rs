//! Lines on their way to stdout and stderr, which may be pipes that nobody reads.
//!
//! A thread of its own writes them, so nobody else waits: no I/O thread for what it logs, and no service that is told to
//! end for saying so. Lines that do not fit any more are left out, and counted
//! on stderr.

use std::io::{self, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

/// Lines that may wait.
const LINES_MAX: usize = 1024;
/// How long the end of the program waits for what is unwritten.
const END_WAIT: Duration = Duration::from_secs(1);

/// What lines go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

enum Message {
    Line(Vec<u8>),
    /// All before it is written.
    Mark(SyncSender<()>),
}

struct Outlet {
    messages: SyncSender<Message>,
}

/// Lines that were left out, of each stream.
static LEFT_OUT: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];
static OUTLETS: [OnceLock<Option<Outlet>>; 2] = [const { OnceLock::new() }; 2];

impl Stream {
    /// Starts its thread, if there is none. To be called early, on a thread that may use any CPU.
    pub(crate) fn start(self) {
        let _ = self.outlet();
    }

    fn outlet(self) -> Option<&'static Outlet> {
        let start = || {
            let (messages, received) = sync_channel(LINES_MAX);
            let run = move || {
                reactor::run_as_helper();
                self.serve(&received);
            };
            std::thread::Builder::new().name("output".into()).spawn(run).ok().map(|_| Outlet { messages })
        };
        OUTLETS[self as usize].get_or_init(start).as_ref()
    }

    /// Writes a line, sooner or later; at once where there is no thread for it.
    pub(crate) fn line(self, line: Vec<u8>) {
        let Some(outlet) = self.outlet() else {
            return self.write(&line);
        };
        if outlet.messages.try_send(Message::Line(line)).is_err() {
            LEFT_OUT[self as usize].fetch_add(1, Ordering::Relaxed);
        }
    }

    fn serve(self, messages: &Receiver<Message>) {
        while let Ok(message) = messages.recv() {
            match message {
                Message::Line(line) => self.write(&line),
                Message::Mark(reached) => {
                    let _ = reached.try_send(());
                }
            }
            let left_out = LEFT_OUT[self as usize].swap(0, Ordering::Relaxed);
            if left_out > 0 && self == Self::Stderr {
                self.write(format!("({left_out} lines were left out: nobody read them)\n").as_bytes());
            }
        }
    }

    fn write(self, line: &[u8]) {
        // Whoever closed it does not want to know.
        let _ = match self {
            Self::Stdout => {
                let mut stdout = io::stdout().lock();
                stdout.write_all(line).and_then(|()| stdout.flush())
            }
            Self::Stderr => io::stderr().write_all(line),
        };
    }

    /// Waits until all lines are written, but not for long.
    fn end(self) {
        let Some(Some(outlet)) = OUTLETS[self as usize].get() else { return };
        let (reached, wait) = sync_channel(1);
        if outlet.messages.try_send(Message::Mark(reached)).is_ok() {
            let _ = wait.recv_timeout(END_WAIT);
        }
    }
}

/// Waits until all lines of both streams are written, but not for long.
pub(crate) fn end() {
    Stream::Stdout.end();
    Stream::Stderr.end();
}

/// A writer whose every write is a line.
pub(crate) struct Lines(pub(crate) Stream);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.line(bytes.to_vec());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

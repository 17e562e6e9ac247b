//! News of a service about itself: that it is ready, and that it ends. For people on stderr, for machines as JSON
//! lines on stdout. Nobody has to listen: a closed stream is no reason to stop serving.

use std::fmt;
use std::path::{Path, PathBuf};

use reactor::{Mode, format_cpus};
use serde::Serialize;

use crate::outlet::Stream;

/// A device that front ends may connect to.
#[derive(Clone, Debug, Serialize)]
pub struct Ready {
    /// Its name.
    pub device: String,
    /// What it is, like `virtio-blk`.
    pub kind: &'static str,
    /// Where to connect.
    pub socket: PathBuf,
    /// How many queues it has.
    pub queues: u16,
    /// The CPUs of the I/O threads that serve it.
    pub cpus: Vec<u32>,
    /// How its queues notice requests.
    #[serde(serialize_with = "as_text")]
    pub poll: Mode,
}

impl fmt::Display for Ready {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = |count: usize| if count == 1 { "" } else { "s" };
        write!(
            f,
            "socket {} ({}, {} queue{}, I/O thread{s} on CPU{s} {}, {})",
            self.socket.display(),
            self.kind,
            self.queues,
            plural(self.queues.into()),
            format_cpus(&self.cpus),
            self.poll,
            s = plural(self.cpus.len()),
        )
    }
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn as_text<S: serde::Serializer>(mode: &Mode, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(mode)
}

/// What happens to a service.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event<'a> {
    /// A device is ready.
    Ready(&'a Ready),
    /// Commands are accepted.
    Control {
        /// Where.
        socket: &'a Path,
    },
    /// Metrics are served.
    Metrics {
        /// Where.
        address: &'a str,
    },
    /// It was told to end, and lets requests in flight be completed.
    Stopping {
        /// By what.
        signal: &'a str,
    },
    /// It has completed them.
    Stopped,
}

impl fmt::Display for Event<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready(ready) => write!(f, "ready: {ready}"),
            Self::Control { socket } => write!(f, "control: socket {}", socket.display()),
            Self::Metrics { address } => write!(f, "metrics: {address}"),
            Self::Stopping { signal } => write!(f, "stopping: {signal}; a second signal ends it at once"),
            Self::Stopped => f.write_str("stopped: requests in flight are completed, sockets removed"),
        }
    }
}

/// Where events go.
#[derive(Clone, Copy, Debug)]
pub struct Reporter {
    /// JSON on stdout instead of text on stderr.
    pub json: bool,
}

impl Reporter {
    /// Tells the world.
    pub fn tell(self, event: &Event<'_>) {
        if !self.json {
            Stream::Stderr.line(format!("{event}\n").into_bytes());
        } else if let Ok(line) = serde_json::to_string(event) {
            Stream::Stdout.line(format!("{line}\n").into_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ready(queues: u16, cpus: &[u32]) -> Ready {
        Ready {
            device: "vm1-disk".into(),
            kind: "virtio-blk",
            socket: "/run/vm1-disk.sock".into(),
            queues,
            cpus: cpus.to_vec(),
            poll: Mode::Hybrid,
        }
    }

    #[test]
    fn people_are_told_where_and_how() {
        for (event, line) in [
            (
                Event::Ready(&ready(4, &[2, 3, 4, 5])),
                "ready: socket /run/vm1-disk.sock (virtio-blk, 4 queues, I/O threads on CPUs 2-5, hybrid)",
            ),
            (
                Event::Ready(&ready(1, &[3])),
                "ready: socket /run/vm1-disk.sock (virtio-blk, 1 queue, I/O thread on CPU 3, hybrid)",
            ),
            (Event::Control { socket: Path::new("/run/c") }, "control: socket /run/c"),
        ] {
            assert_eq!(event.to_string(), line);
        }
    }

    #[test]
    fn machines_are_told_the_same() {
        let json = |event: &Event<'_>| serde_json::to_string(event).unwrap();
        assert_eq!(
            json(&Event::Ready(&ready(1, &[3]))),
            r#"{"event":"ready","device":"vm1-disk","kind":"virtio-blk","socket":"/run/vm1-disk.sock","queues":1,"cpus":[3],"poll":"hybrid"}"#
        );
        assert_eq!(
            json(&Event::Stopping { signal: "SIGTERM" }),
            r#"{"event":"stopping","signal":"SIGTERM"}"#
        );
        assert_eq!(json(&Event::Stopped), r#"{"event":"stopped"}"#);
    }
}

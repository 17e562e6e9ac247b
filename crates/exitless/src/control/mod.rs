//! The control socket: a running service answers questions and takes orders.
//!
//! A command is one line of JSON, a [`Request`], and so is its answer, a [`Response`]. A connection may send any number
//! of them. Whoever may open the socket may do everything, so it belongs to its owner alone (mode 0600).

mod client;
mod server;
mod socket;
mod table;

use serde::{Deserialize, Serialize};

pub(crate) use client::run;
pub(crate) use socket::ControlSocket;

/// The longest command, in bytes, its newline included.
pub const REQUEST_BYTES_MAX: u64 = 4096;

/// What a service can be asked and told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// The devices.
    List,
    /// What has been done so far.
    Stats,
    /// Change the size of a disk.
    Resize {
        /// The disk's name.
        device: String,
        /// The new size; None to take over the one that its storage was given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        bytes: Option<u64>,
        /// It may be smaller than the present one, which destroys what is cut off.
        #[serde(default, skip_serializing_if = "is_false")]
        shrink: bool,
        /// Also while a guest is connected.
        #[serde(default, skip_serializing_if = "is_false")]
        force: bool,
    },
    /// Replace a disk's limits. What is None is not limited.
    Limit {
        /// The disk's name.
        device: String,
        /// The most requests per second.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        iops: Option<std::num::NonZeroU64>,
        /// The most bytes per second.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        bytes_per_s: Option<std::num::NonZeroU64>,
    },
}

fn is_false(flag: &bool) -> bool {
    !flag
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Response {
    /// To [`Request::List`].
    Devices(Vec<DeviceInfo>),
    /// To [`Request::Stats`].
    Stats(Stats),
    /// To [`Request::Resize`].
    Resized {
        /// The disk's name.
        device: String,
        /// Its size now.
        bytes: u64,
    },
    /// To [`Request::Limit`].
    Limited {
        /// The disk's name.
        device: String,
    },
    /// It could not be done, for this reason. Nothing was changed.
    Error(String),
}

/// A device as it is now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// Its name.
    pub name: String,
    /// What it is: `blk` or `rng`.
    pub kind: String,
    /// Where front ends connect.
    pub socket: String,
    /// The process that is connected, if one is.
    pub peer_pid: Option<i32>,
    /// How many queues it has.
    pub queues: u16,
    /// How many of them are in service.
    pub queues_running: u16,
    /// The polling mode that it was given.
    pub poll: String,
    /// A disk's size.
    pub bytes: Option<u64>,
    /// Why the last front end that did not leave in peace has lost its connection.
    pub last_error: Option<String>,
}

/// Counters, all since the service, or the queue, started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Of each device.
    pub devices: Vec<DeviceStats>,
    /// Of each I/O thread.
    pub threads: Vec<ThreadStats>,
}

/// What a device has done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStats {
    /// Its name.
    pub name: String,
    /// Its queues that are in service.
    pub queues: Vec<QueueStats>,
    /// A disk's requests by type.
    pub blk: Option<BlkStats>,
}

/// What a queue has done since it was last started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are those of virtio::QueueCounters")]
pub struct QueueStats {
    pub index: u16,
    /// Its ring is broken, or the device's code for it has failed. The log says why.
    pub failed: bool,
    pub requests: u64,
    pub bursts: u64,
    pub calls: u64,
    pub calls_suppressed: u64,
    pub kicks_enabled: u64,
}

/// What a disk has done since the service started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are those of blk::Counters")]
pub struct BlkStats {
    pub reads: u64,
    pub read_bytes: u64,
    pub writes: u64,
    pub written_bytes: u64,
    pub others: u64,
    pub errors: u64,
    pub throttled: u64,
}

impl From<blk::Counters> for BlkStats {
    fn from(counters: blk::Counters) -> Self {
        let blk::Counters { reads, read_bytes, writes, written_bytes, others, errors, throttled } = counters;
        Self { reads, read_bytes, writes, written_bytes, others, errors, throttled }
    }
}

/// What an I/O thread has done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are those of reactor::ThreadStats")]
pub struct ThreadStats {
    pub name: String,
    pub cpu: u32,
    /// The queues on it, by device and index.
    pub queues: Vec<String>,
    pub turns: u64,
    pub empty_turns: u64,
    pub arms: u64,
    pub slips: u64,
    pub sleeps: u64,
    pub wakes_by_fd: u64,
    pub wakes_by_message: u64,
    pub wakes_by_timer: u64,
    pub busy_ns: u64,
    pub asleep_ns: u64,
    pub total_ns: u64,
}

impl From<reactor::ThreadReport> for ThreadStats {
    fn from(report: reactor::ThreadReport) -> Self {
        let reactor::ThreadReport { name, cpu, stats, pollers } = report;
        Self {
            name,
            cpu,
            queues: pollers.into_iter().map(|poller| poller.label).collect(),
            turns: stats.turns,
            empty_turns: stats.empty_turns,
            arms: stats.arms,
            slips: stats.slips,
            sleeps: stats.sleeps,
            wakes_by_fd: stats.wakes_by_fd,
            wakes_by_message: stats.wakes_by_message,
            wakes_by_timer: stats.wakes_by_timer,
            busy_ns: stats.busy_ns,
            asleep_ns: stats.asleep_ns,
            total_ns: stats.total_ns,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_read_as_the_help_shows_them() {
        let resize = |device: &str, bytes, shrink, force| Request::Resize {
            device: device.to_owned(),
            bytes,
            shrink,
            force,
        };
        for (line, request) in [
            (r#"{"command":"list"}"#, Request::List),
            (r#"{"command":"stats"}"#, Request::Stats),
            (
                r#"{"command":"resize","device":"vm1-disk","bytes":17179869184}"#,
                resize("vm1-disk", Some(17_179_869_184), false, false),
            ),
            (r#"{"command":"resize","device":"a"}"#, resize("a", None, false, false)),
            (
                r#"{"command":"resize","device":"a","bytes":512,"shrink":true,"force":true}"#,
                resize("a", Some(512), true, true),
            ),
        ] {
            assert_eq!(serde_json::from_str::<Request>(line).unwrap(), request);
            assert_eq!(serde_json::to_string(&request).unwrap(), line);
        }
    }

    #[test]
    fn commands_that_are_none_are_refused_with_a_reason() {
        for (line, reason) in [
            (r#"{"command":"reboot"}"#, "unknown variant `reboot`, expected one of `list`"),
            (r#"{"command":"resize"}"#, "missing field `device`"),
            (r#"{"command":"limit","device":"a","iops":0}"#, "nonzero"),
            (r#"{"command":"limit","device":"a","ips":5}"#, "unknown field `ips`"),
            ("list", "expected value"),
        ] {
            let error = serde_json::from_str::<Request>(line).unwrap_err().to_string();
            assert!(error.contains(reason), "{line}: {error}");
        }
    }
}

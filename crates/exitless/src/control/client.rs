//! `exitless ctl`: sends one command and shows the answer.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use rustix::net::sockopt::socket_peercred;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

use super::table::{self, Table};
use super::{DeviceInfo, Request, Response, Stats};
use crate::cli::CtlCommand;
use crate::size::Size;

/// How long the service may take to answer.
const ANSWER_S_MAX: u64 = 5;
/// The same where it has to wait for storage, unless it is stopped.
const STORAGE_S_MAX: u64 = 60;

impl From<CtlCommand> for Request {
    fn from(command: CtlCommand) -> Self {
        match command {
            CtlCommand::List => Self::List,
            CtlCommand::Stats => Self::Stats,
            CtlCommand::Resize { device, size, shrink, force } => {
                Self::Resize { device, bytes: size.map(|size| size.0.get()), shrink, force }
            }
            CtlCommand::Limit { device, iops, bandwidth } => {
                Self::Limit { device, iops, bytes_per_s: bandwidth.map(|size| size.0) }
            }
        }
    }
}

/// Has the service at `socket` carry out `command`, and returns what to print: its answer, as it is or for people.
///
/// # Errors
/// The service cannot be reached, or says that it cannot do it.
pub(crate) fn run(socket: &Path, command: CtlCommand, json: bool) -> anyhow::Result<String> {
    let line =
        ask(socket, &command.into()).with_context(|| format!("control socket {}", socket.display()))?;
    match serde_json::from_str(&line).with_context(|| format!("the service answered {line:?}"))? {
        Response::Error(reason) => anyhow::bail!("{reason}"),
        _ if json => Ok(line),
        response => Ok(show(&response)),
    }
}

fn ask(socket: &Path, request: &Request) -> anyhow::Result<String> {
    let stream = connect(socket).map_err(silent)?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    (&stream).write_all(&line).map_err(silent)?;
    let begun = Instant::now();
    let patience_s = if matches!(request, Request::Resize { .. }) { STORAGE_S_MAX } else { ANSWER_S_MAX };
    let (mut lines, mut answer) = (BufReader::new(&stream), String::new());
    // What has come of an answer stays in it when the time is up.
    while let Err(error) = lines.read_line(&mut answer) {
        if !timed_out(&error) || begun.elapsed().as_secs() >= patience_s || is_stopped(&stream) {
            return Err(silent(error));
        }
    }
    anyhow::ensure!(answer.ends_with('\n'), "the service ended the connection without an answer");
    Ok(answer)
}

/// Connects, with limits on how long that and everything on the connection may take: also a service that is stopped
/// has a queue of connections, and the queue an end.
fn connect(socket: &Path) -> io::Result<UnixStream> {
    let stream = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    let stream = UnixStream::from(stream);
    let limit = Some(Duration::from_secs(ANSWER_S_MAX));
    stream.set_read_timeout(limit)?;
    stream.set_write_timeout(limit)?;
    rustix::net::connect(&stream, &SocketAddrUnix::new(socket)?)?;
    Ok(stream)
}

fn timed_out(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}

fn silent(error: io::Error) -> anyhow::Error {
    if timed_out(&error) {
        anyhow!(
            "no answer for {ANSWER_S_MAX} s: the service is stopped, or hangs; it may still do what it was told"
        )
    } else {
        error.into()
    }
}

/// Whether the process at the other end was stopped by a signal or a debugger (proc_pid_stat(5)).
fn is_stopped(stream: &UnixStream) -> bool {
    let Ok(peer) = socket_peercred(stream) else { return false };
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", peer.pid)).unwrap_or_default();
    let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
    matches!(state, Some('T' | 't'))
}

fn show(response: &Response) -> String {
    match response {
        Response::Devices(devices) => show_devices(devices),
        Response::Stats(stats) => show_stats(stats),
        Response::Resized { device, bytes } => {
            format!("{device}: {} ({bytes} bytes)\n", table::bytes(*bytes))
        }
        Response::Limited { device } => format!("{device}: limits replaced\n"),
        Response::Error(reason) => format!("{reason}\n"),
    }
}

fn show_devices(devices: &[DeviceInfo]) -> String {
    let mut table =
        Table::new(&["DEVICE", "KIND", "SIZE", "QUEUES", "RUNNING", "POLL", "PEER PID", "SOCKET"]);
    for device in devices {
        table.row([
            device.name.clone(),
            device.kind.clone(),
            device.bytes.map_or_else(|| "-".to_owned(), exact_size),
            device.queues.to_string(),
            device.queues_running.to_string(),
            device.poll.clone(),
            device.peer_pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
            device.socket.clone(),
        ]);
    }
    let errors = devices.iter().filter_map(|device| Some((&device.name, device.last_error.as_ref()?)));
    let errors = errors.map(|(name, error)| format!("{name}: the last front end to fail: {error}\n"));
    errors.fold(table.to_string(), |text, error| text + &error)
}

fn show_stats(stats: &Stats) -> String {
    let mut disks =
        Table::new(&["DISK", "READS", "READ", "WRITES", "WRITTEN", "OTHERS", "ERRORS", "THROTTLED"]);
    let mut queues =
        Table::new(&["QUEUE", "STATE", "REQUESTS", "PER BURST", "CALLS", "SUPPRESSED", "KICKS ON"]);
    for device in &stats.devices {
        if let Some(blk) = &device.blk {
            disks.row([
                device.name.clone(),
                blk.reads.to_string(),
                table::bytes(blk.read_bytes),
                blk.writes.to_string(),
                table::bytes(blk.written_bytes),
                blk.others.to_string(),
                blk.errors.to_string(),
                blk.throttled.to_string(),
            ]);
        }
        for queue in &device.queues {
            queues.row([
                format!("{}#{}", device.name, queue.index),
                if queue.failed { "failed" } else { "ok" }.to_owned(),
                queue.requests.to_string(),
                table::ratio(queue.requests, queue.bursts),
                queue.calls.to_string(),
                queue.calls_suppressed.to_string(),
                queue.kicks_enabled.to_string(),
            ]);
        }
    }
    let mut threads = Table::new(&["THREAD", "CPU", "BUSY", "ASLEEP", "TURNS", "EMPTY", "SLEEPS", "QUEUES"]);
    for thread in &stats.threads {
        threads.row([
            thread.name.clone(),
            thread.cpu.to_string(),
            table::percent(thread.busy_ns, thread.total_ns),
            table::percent(thread.asleep_ns, thread.total_ns),
            thread.turns.to_string(),
            thread.empty_turns.to_string(),
            thread.sleeps.to_string(),
            thread.queues.join(" "),
        ]);
    }
    let tables = [disks, queues, threads];
    let tables: Vec<_> = tables.iter().filter(|table| !table.is_empty()).map(Table::to_string).collect();
    if tables.is_empty() { "nothing has been done yet\n".to_owned() } else { tables.join("\n") }
}

fn exact_size(bytes: u64) -> String {
    std::num::NonZeroU64::new(bytes).map_or_else(|| "0".to_owned(), |bytes| Size(bytes).to_string())
}

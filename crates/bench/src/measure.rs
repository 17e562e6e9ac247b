//! One measurement: one server, started for it, one case, one repetition.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::backend::{BackendKind, Target};
use crate::case::{Case, Op};
use crate::client::guest::Guest;
use crate::client::lane::{Lane, Shape};
use crate::client::load::Load;
use crate::client::session::{Session, Unsupported};
use crate::client::verify;
use crate::cpus::{self, Cpus};
use crate::fio;
use crate::peer::{Fill, Installed, PeerKind};
use crate::row::{IdleUse, Measurement, Verified};
use crate::server::bare::Bare;
use crate::server::process::Process;
use crate::server::usage::Usage;

/// Between reading the server's CPU time, which delays the requests in flight, and counting.
const SETTLE_NS: u64 = 2_000_000;
const NS_PER_MS: u64 = 1_000_000;
/// How long an idle server may take to find out that it is.
const CALM_DOWN: Duration = Duration::from_millis(300);
const SEED: u64 = 0x0065_7869_746c_6573;

/// How long things take, and where they happen.
pub(crate) struct Settings<'a> {
    pub(crate) cpus: Cpus,
    pub(crate) warmup_ms: u64,
    pub(crate) measure_ms: u64,
    pub(crate) idle_ms: u64,
    /// How much of the disk the verifying pass covers.
    pub(crate) verify_bytes: u64,
    /// The most completions that the client answers before it publishes the answers.
    pub(crate) burst: u16,
    pub(crate) stop: &'a AtomicBool,
}

/// What became of a measurement.
pub(crate) enum Outcome {
    Measured(Measurement),
    /// The server does not do what the case asks for.
    Skipped(String),
}

impl Outcome {
    /// Where it says how far apart the CPUs were.
    pub(crate) fn hop_ns(&mut self) -> Option<&mut Option<f64>> {
        match self {
            Self::Measured(measurement) => Some(&mut measurement.hop_ns),
            Self::Skipped(_) => None,
        }
    }
}

/// Measures one repetition of `case` against a fresh `peer`. Checks the data first if `check` is set.
pub(crate) fn measure(
    installed: &Installed,
    case: &Case,
    target: &Target,
    settings: &Settings<'_>,
    check: bool,
) -> Result<Outcome> {
    let peer = &installed.peer;
    if !peer.has_backend(case.backend) {
        return Ok(Outcome::Skipped(format!("has no backend `{}`", case.backend.name())));
    }
    if let Some(max) = peer.ring_max.filter(|&max| case.ring_size() > max) {
        return Ok(Outcome::Skipped(format!(
            "takes rings of at most {max} descriptors, not {}",
            case.ring_size()
        )));
    }
    let scratch =
        tempfile::Builder::new().prefix("exitless-bench-").tempdir().context("cannot make a folder")?;
    let cpu = settings.cpus.server.unwrap_or(0);
    let mut fill = Fill { dir: scratch.path(), target, queues: case.queues, cpu, more: Vec::new() };
    let client = Client { case, target, settings, check, pages: peer.guest_memory };
    match peer.kind {
        PeerKind::Bare | PeerKind::Fio if case.shared_cpu => {
            Ok(Outcome::Skipped("has no client to share a CPU with, or polls without end".into()))
        }
        PeerKind::Fio => {
            fill.more = fio::placeholders(case, settings.warmup_ms, settings.measure_ms);
            fio::measure(&peer.command(&fill), case, scratch.path(), settings)
        }
        PeerKind::Bare if case.op == Op::Idle => Ok(Outcome::Skipped("polls without end".into())),
        PeerKind::Bare if case.inflight => Ok(Outcome::Skipped("does not track requests in flight".into())),
        PeerKind::Bare => client.run_pinned(None, |_, lanes, guest, call| {
            let rings: Vec<_> = lanes.iter().map(|lane| *lane.config()).collect();
            let bare = Bare::start(&rings, guest.memory(), call, settings.cpus.server)?;
            let usage = bare.usage();
            Ok((bare, usage))
        }),
        PeerKind::VhostUser => {
            peer.write_files(&fill)?;
            let mut process = Process::start(&peer.command(&fill), scratch.path(), settings.cpus.server)?;
            let usage = Usage::Process(process.pid());
            let within = Duration::from_millis(peer.ready_ms_max());
            let result = process.wait_ready(&fill.socket(), within, settings.stop).and_then(|()| {
                client.run_pinned(Some(&fill.socket()), |session, lanes, guest, call| {
                    if let Some(session) = session {
                        session.start(case, guest, lanes, call)?;
                    }
                    Ok(((), usage))
                })
            });
            result.with_context(|| format!("{} failed{}", peer.name, process.last_output()))
        }
    }
}

/// The client's side of a measurement.
struct Client<'a> {
    case: &'a Case,
    target: &'a Target,
    settings: &'a Settings<'a>,
    check: bool,
    pages: crate::peer::GuestPages,
}

impl Client<'_> {
    /// Runs on a thread of its own, bound to the client's CPU. `start` makes the server answer the queues; what it
    /// returns beside the usage is dropped after the load.
    fn run_pinned<S>(
        &self,
        socket: Option<&Path>,
        start: impl FnOnce(Option<&mut Session>, &[Lane], &Guest, &EventFd) -> Result<(S, Usage)> + Send,
    ) -> Result<Outcome> {
        std::thread::scope(|scope| {
            let run = || {
                let Cpus { server, client } = self.settings.cpus;
                cpus::pin(if self.case.shared_cpu { server } else { client })?;
                self.run(socket, start)
            };
            let thread = std::thread::Builder::new().name("client".into()).spawn_scoped(scope, run);
            match thread.context("cannot start a thread")?.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    fn run<S>(
        &self,
        socket: Option<&Path>,
        start: impl FnOnce(Option<&mut Session>, &[Lane], &Guest, &EventFd) -> Result<(S, Usage)>,
    ) -> Result<Outcome> {
        let case = self.case;
        let mut session = match socket.map(|socket| Session::connect(socket, case)).transpose()? {
            Some(Err(Unsupported(reason))) => return Ok(Outcome::Skipped(reason)),
            Some(Ok(session)) => Some(session),
            None => None,
        };
        let disk_bytes = session.as_ref().map_or(self.target.bytes, |session| session.capacity_bytes);
        ensure!(disk_bytes >= u64::from(case.block_bytes), "the disk has only {disk_bytes} bytes");
        let shape = Shape {
            format: case.ring.format(),
            ring_size: case.ring_size(),
            depth: case.depth,
            block_bytes: case.block_bytes,
            indirect: case.indirect,
            event_idx: session.as_ref().is_none_or(|s| s.features & virtio::features::EVENT_IDX != 0),
        };
        let mut guest = Guest::new(shape.memory_bytes() * u64::from(case.queues), self.pages)?;
        let mut lanes = (0..case.queues).map(|_| Lane::new(shape, &mut guest)).collect::<Result<Vec<_>>>()?;
        let call = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).context("cannot make an eventfd")?;
        let (server, usage) = start(session.as_mut(), &lanes, &guest, &call)?;
        let verified = self.verify(&guest, &mut lanes, disk_bytes)?;
        let mut measurement = match case.op {
            Op::Idle => self.idle(&mut lanes, disk_bytes, &call, &usage)?,
            _ => self.load(&mut lanes, disk_bytes, &call, &usage)?,
        };
        measurement.verified = verified;
        if let Some(session) = &mut session {
            session.stop(lanes.len())?;
        }
        drop(server);
        Ok(Outcome::Measured(measurement))
    }

    fn verify(&self, guest: &Guest, lanes: &mut [Lane], disk_bytes: u64) -> Result<Verified> {
        if self.target.kind == BackendKind::Null {
            return Ok(Verified::NothingStored);
        }
        if self.target.kind == BackendKind::Memory {
            verify::fill(guest, lanes, disk_bytes).context("filling the disk")?;
        }
        if !self.check {
            return Ok(Verified::Before);
        }
        let bytes = self.settings.verify_bytes.min(disk_bytes);
        verify::verify(guest, lanes, bytes, SEED).context("verifying the data")?;
        Ok(Verified::Bytes(bytes))
    }

    fn load(
        &self,
        lanes: &mut [Lane],
        disk_bytes: u64,
        call: &EventFd,
        usage: &Usage,
    ) -> Result<Measurement> {
        let settings = self.settings;
        let duration_ms = settings.measure_ms;
        let mut load =
            Load::new(self.case, lanes, disk_bytes, call, settings.stop, settings.burst, duration_ms)?;
        let mut calls = 0;
        load.begin()?;
        load.run(load.now_ns() + settings.warmup_ms * NS_PER_MS)?;
        let own = Usage::this_thread();
        let (before, own_before, cpu_from_ns) = (usage.cpu_time()?, own.cpu_time()?, load.now_ns());
        load.run(load.now_ns() + SETTLE_NS)?;
        let (kicks_before, calls_before) = load.notifications(&mut calls);
        let from_ns = load.restart();
        let to_ns = load.run(from_ns + duration_ms * NS_PER_MS)?;
        let (kicks, calls) = load.notifications(&mut calls);
        let (after, own_after, cpu_to_ns) = (usage.cpu_time()?, own.cpu_time()?, load.now_ns());
        load.finish()?;
        ensure!(!settings.stop.load(Ordering::Relaxed), "interrupted");

        let requests = load.requests();
        let share = |ns: u64| ns as f64 / (cpu_to_ns - cpu_from_ns).max(1) as f64;
        let ran = share(after.ran_ns - before.ran_ns);
        // Threads of a server also wait for each other; other processes had at most what the server did not use.
        let server_waited = share(after.waited_ns - before.waited_ns).min((1.0 - ran).max(0.0));
        let waited = server_waited.max(share(own_after.waited_ns - own_before.waited_ns));
        let per_request = |count: u64| count as f64 / requests.max(1) as f64;
        let quantile_us = |fraction| load.latency.quantile(fraction).map(|ns| ns / 1e3);
        Ok(Measurement {
            requests,
            iops_mean: Some(requests as f64 * 1e9 / (to_ns - from_ns).max(1) as f64),
            // With pauses, the rate of a single millisecond says nothing.
            iops_p90: load.windows.quantile(0.9, to_ns).filter(|_| self.case.pause_ms == 0),
            server_cores: Some(ran),
            waited_for_cpu: Some(waited),
            p50_us: quantile_us(0.5),
            p99_us: quantile_us(0.99),
            p999_us: quantile_us(0.999),
            kicks_per_request: Some(per_request(kicks - kicks_before)),
            calls_per_request: Some(per_request(calls - calls_before)),
            ..Measurement::default()
        })
    }

    fn idle(
        &self,
        lanes: &mut [Lane],
        disk_bytes: u64,
        call: &EventFd,
        usage: &Usage,
    ) -> Result<Measurement> {
        let settings = self.settings;
        let mut load =
            Load::new(self.case, lanes, disk_bytes, call, settings.stop, settings.burst, settings.warmup_ms)?;
        load.begin()?;
        load.run(load.now_ns() + settings.warmup_ms * NS_PER_MS)?;
        load.finish()?;
        std::thread::sleep(CALM_DOWN);
        let (before, from_ns) = (usage.cpu_time()?, load.now_ns());
        let end_ns = from_ns + settings.idle_ms * NS_PER_MS;
        while load.now_ns() < end_ns && !settings.stop.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let cores =
            (usage.cpu_time()?.ran_ns - before.ran_ns) as f64 / (load.now_ns() - from_ns).max(1) as f64;
        ensure!(!settings.stop.load(Ordering::Relaxed), "interrupted");
        let idle = IdleUse { cores, own_memory_kib: usage.own_memory_kib() };
        Ok(Measurement { idle: Some(idle), ..Measurement::default() })
    }
}

#[cfg(test)]
mod tests;

//! Runs one row once: starts what the row says, waits for its result, ends it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::condition::{BLOCK_BYTES, Condition};
use super::figures::{self, Figures};
use super::place::{self, Place, Seats};
use super::rows::{Completion, Placement, Row, RowKind, Rows, Threads};
use crate::backend::{BackendKind, Storage, Target};
use crate::case::{Case, Client, Ring};
use crate::cpus::Cpus;
use crate::measure::{Outcome, Settings, measure};
use crate::peer::{Fill, Installed, Peer, own_program};
use crate::server::process::Process;

/// As much as the guest verifies, and so fills, before it measures: memory that was never written is one page.
const MEMORY_BYTES: u64 = 16 << 20;
/// Requests of three descriptors that a ring of 1024, the largest that the guest takes, can hold.
const DIRECT_MAX: u16 = 1024 / 3;
/// What virtual machines need.
const KVM: &str = "/dev/kvm";
/// Beyond the measurement itself: booting, and verifying with a request at a time where each costs exits.
const PATIENCE: Duration = Duration::from_secs(60);

/// What became of a run.
pub(crate) enum Ran {
    Measured(Figures),
    /// The row cannot do it, and why.
    Skipped(String),
}

impl Ran {
    /// Where it says how far apart the CPUs were.
    pub(crate) fn hop_ns(&mut self) -> Option<&mut Option<f64>> {
        match self {
            Self::Measured(figures) => Some(&mut figures.hop_ns),
            Self::Skipped(_) => None,
        }
    }
}

/// Everything that rows need.
pub(crate) struct Runner<'a> {
    pub(crate) rows: &'a Rows,
    pub(crate) places: Vec<Place>,
    pub(crate) storage: Storage,
    pub(crate) measure_ms: u64,
    pub(crate) stop: &'a AtomicBool,
    /// The guest's ELF file for other monitors, and the folder that it is in.
    guest: Option<(tempfile::TempDir, PathBuf)>,
}

impl<'a> Runner<'a> {
    pub(crate) fn new(
        rows: &'a Rows,
        places: Vec<Place>,
        storage: Storage,
        measure_ms: u64,
        stop: &'a AtomicBool,
    ) -> Self {
        Self { rows, places, storage, measure_ms, stop, guest: None }
    }

    /// Why `row` cannot be run on this machine at all.
    pub(crate) fn obstacle(&self, row: &Row) -> Option<String> {
        if row.kind != RowKind::BareMetal
            && let Err(error) = File::options().read(true).write(true).open(KVM)
        {
            return Some(format!("cannot open {KVM}: {error}"));
        }
        if row.kind == RowKind::Qemu {
            let Some(program) = self.rows.qemu.first() else { return Some("there is no command".into()) };
            let list =
                Command::new(program).args(["-device", "virtio-blk-pci,help"]).stdin(Stdio::null()).output();
            let Ok(list) = list else { return Some(format!("{program} is not installed")) };
            let has = |property: &String| String::from_utf8_lossy(&list.stdout).contains(property.as_str());
            if let Some(property) = row.property.as_ref().filter(|property| !has(property)) {
                return Some(format!("not available: this {program} has no {property}"));
            }
        }
        row.server.as_ref().and_then(|server| server.detect().err())
    }

    /// Where the threads of `row` are.
    pub(crate) fn seats(&self, row: &Row, jobs: u16) -> Seats {
        place::seats(&self.places, row.placement, jobs)
    }

    /// How many I/O threads `row` has.
    pub(crate) fn io_threads(&self, row: &Row, jobs: u16) -> usize {
        let seats = self.seats(row, jobs);
        match (seats.io.len(), row.threads) {
            (0, Threads::PerQueue) => jobs.into(),
            (0, Threads::One) => 1,
            (threads, _) => threads,
        }
    }

    /// Measures once.
    pub(crate) fn run(&mut self, row: &Row, condition: &Condition) -> Result<Ran> {
        let Some(backend) = self.rows.backend(row, condition.backend).map(str::to_owned) else {
            return Ok(Ran::Skipped(format!("has no backend `{}`", condition.backend_name())));
        };
        let target = match condition.backend {
            BackendKind::Memory => Target { kind: BackendKind::Memory, bytes: MEMORY_BYTES, path: None },
            kind => match self.storage.target(kind)? {
                Ok(target) => target,
                Err(reason) => return Ok(Ran::Skipped(reason)),
            },
        };
        if row.kind == RowKind::BareMetal {
            return self.bare_metal(row, condition, &target);
        }
        let scratch =
            tempfile::Builder::new().prefix("exitless-vbmq-").tempdir().context("cannot make a folder")?;
        let dir = scratch.path();
        let server =
            row.server.as_ref().map(|server| self.serve(server, condition, &target, dir)).transpose()?;
        let guest = if row.kind == RowKind::Qemu { Some(self.guest()?) } else { None };
        let command = self.command(row, condition, &target, &backend, guest.as_deref(), dir);

        let ran = tempfile::tempdir_in(dir).context("cannot make a folder")?;
        let mut process = Process::start(&command, ran.path(), None)?;
        let status = process.wait(PATIENCE + Duration::from_millis(self.measure_ms), self.stop)?;
        let output = process.output();
        let figures = match row.kind {
            RowKind::Monitor if status.success() => figures::of_monitor(&output),
            RowKind::Monitor => Err(anyhow::anyhow!("the monitor ended with {status}")),
            // QEMU's own status says little: what the guest wrote to the exit port, doubled, plus one.
            _ => figures::of_guest(&output),
        };
        let figures = figures.with_context(|| format!("{} failed{}", row.title, process.last_output()));
        drop(server);
        figures.map(Ran::Measured)
    }

    fn serve(&self, server: &Peer, condition: &Condition, target: &Target, dir: &Path) -> Result<Process> {
        let cpu = self.cpus().server;
        let fill = Fill { dir, target, queues: condition.jobs, cpu: cpu.unwrap_or(0), more: Vec::new() };
        let mut process = Process::start(&server.command(&fill), dir, cpu)?;
        let within = Duration::from_millis(server.ready_ms_max());
        let ready = process.wait_ready(&fill.socket(), within, self.stop);
        ready.with_context(|| format!("{} failed{}", server.name, process.last_output()))?;
        Ok(process)
    }

    /// The CPUs of the first I/O thread, or of a server, and of the first vCPU, where there are two.
    pub(crate) fn cpus(&self) -> Cpus {
        let seats = place::seats(&self.places, Placement::Near, 1);
        let only = |cpus: &[u32]| cpus.first().copied().filter(|_| self.places.len() > 1);
        Cpus { server: only(&seats.io), client: only(&seats.vcpu) }
    }

    fn bare_metal(&self, row: &Row, condition: &Condition, target: &Target) -> Result<Ran> {
        let server = row.server.clone().context("a row without a server")?;
        let settings = Settings {
            cpus: self.cpus(),
            warmup_ms: (self.measure_ms / 10).clamp(10, 50),
            measure_ms: self.measure_ms,
            idle_ms: 0,
            verify_bytes: MEMORY_BYTES,
            // As the guest does it: all that has come back is answered at once.
            burst: condition.qd,
            stop: self.stop,
        };
        let case = Case {
            name: row.name.clone(),
            group: String::new(),
            backend: condition.backend,
            op: condition.op,
            block_bytes: BLOCK_BYTES,
            depth: condition.qd,
            queues: condition.jobs,
            ring: Ring::Split,
            client: Client::Polled,
            inflight: false,
            // As the guest does it: indirect where the ring has too few descriptors for all requests.
            indirect: condition.qd > DIRECT_MAX,
            pause_ms: 0,
            shared_cpu: false,
            quick: false,
        };
        let installed = Installed { peer: server, version: String::new() };
        Ok(match measure(&installed, &case, target, &settings, false)? {
            Outcome::Skipped(reason) => Ran::Skipped(reason),
            Outcome::Measured(measured) => {
                let figures = Figures {
                    requests: measured.requests,
                    iops: measured.iops_mean.unwrap_or(0.0),
                    p50_us: measured.p50_us.unwrap_or(0.0),
                    p99_us: measured.p99_us.unwrap_or(0.0),
                    ..Figures::default()
                };
                ensure!(figures.requests > 0, "no request was completed");
                Ran::Measured(figures)
            }
        })
    }

    /// The guest as a file, which this program writes when it is first needed.
    fn guest(&mut self) -> Result<PathBuf> {
        if let Some((_, path)) = &self.guest {
            return Ok(path.clone());
        }
        let folder =
            tempfile::Builder::new().prefix("exitless-vbmq-").tempdir().context("cannot make a folder")?;
        let path = folder.path().join("guest.elf");
        let program = own_program("{exitless}");
        let status =
            Command::new(&program).args(["run", "--save-guest"]).arg(&path).stdin(Stdio::null()).status();
        match status {
            Ok(status) if status.success() => {}
            Ok(status) => bail!("{program} run --save-guest ended with {status}"),
            Err(error) => bail!("cannot run {program}: {error}"),
        }
        self.guest = Some((folder, path.clone()));
        Ok(path)
    }

    /// The program and its arguments.
    fn command(
        &self,
        row: &Row,
        condition: &Condition,
        target: &Target,
        backend: &str,
        guest: Option<&Path>,
        dir: &Path,
    ) -> Vec<String> {
        let seats = self.seats(row, condition.jobs);
        let list = |cpus: &[u32]| cpus.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        let one = row.one_queue;
        let jobs = if one { 1 } else { condition.jobs };
        let qd = if one { condition.qd.saturating_mul(condition.jobs) } else { condition.qd };
        let threads = (0..jobs).map(|queue| format!("io{queue}"));
        let objects: Vec<_> = threads.clone().map(|id| format!("-object{LIST}iothread,id={id}")).collect();
        let mapping: Vec<_> = threads.map(|id| format!("{{\"iothread\":\"{id}\"}}")).collect();
        // Verifying is also what fills memory. A disk of nothing has nothing to verify.
        let verify = condition.backend == BackendKind::Memory;
        let irq = row.completion == Completion::Interrupt;
        let path = |path: Option<&Path>| path.map_or(String::new(), |path| path.display().to_string());
        let values = [
            ("{backend}", backend.to_owned()),
            ("{size}", target.bytes.to_string()),
            ("{path}", path(target.path.as_deref())),
            ("{queues}", jobs.to_string()),
            ("{jobs}", jobs.to_string()),
            ("{qd}", qd.to_string()),
            ("{rw}", condition.op.name().to_owned()),
            ("{seconds}", format!("{}", self.measure_ms as f64 / 1e3)),
            ("{ms}", self.measure_ms.to_string()),
            ("{completion}", row.completion.name().to_owned()),
            ("{irq}", u8::from(irq).to_string()),
            ("{verify}", if verify { "--verify".to_owned() } else { String::new() }),
            ("{verify01}", u8::from(verify).to_string()),
            ("{io_threads}", self.io_threads(row, condition.jobs).to_string()),
            ("{io_cpus}", list(&seats.io)),
            ("{vcpu_cpus}", list(&seats.vcpu)),
            ("{iothreads}", objects.join(LIST)),
            ("{mapping}", mapping.join(",")),
            ("{guest}", path(guest)),
            ("{socket}", dir.join("blk.sock").display().to_string()),
        ];
        let base = if row.kind == RowKind::Qemu { &self.rows.qemu } else { &self.rows.monitor };
        let words = base.iter().chain(&row.args).map(|word| own_program(&filled(word, &values)));
        words.flat_map(|word| split(&word)).collect()
    }
}

/// Stands between words that one placeholder became.
const LIST: &str = "\u{1f}";

/// The words that `word` became, none if it became empty.
fn split(word: &str) -> Vec<String> {
    word.split(LIST).map(str::trim).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

/// Fills in placeholders, of which the first ones may contain later ones.
fn filled(word: &str, values: &[(&str, String)]) -> String {
    values.iter().fold(word.to_owned(), |word, (name, value)| word.replace(name, value))
}

#[cfg(test)]
mod tests;

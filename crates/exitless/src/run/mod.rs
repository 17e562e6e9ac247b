//! `exitless run`: a virtual machine of our own, with disks, and what came of it.

mod console;
mod disk;
mod guest;
mod options;
mod progress;
mod report;

use std::io::{self, Write};
use std::num::NonZeroU16;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, anyhow};
use blk::Blk;
use reactor::Pool;
use reactor::placement::Wish;
use vmm::{Config, Kernel, Machine, Outcome, PciDevice};

pub(crate) use options::RunOptions;
use options::Switch;

use crate::drain::DRAIN_MAX;
use crate::failure::{EXIT_RUNTIME, Failure};
use crate::stop::StopSignals;
use disk::DiskOption;
use guest::{JobResult, Line};
use progress::Progress;
use report::{Measured, Report};

/// How often the progress line changes.
const PROGRESS: Duration = Duration::from_millis(500);

/// Runs the machine until its guest ends it, or somebody else does, and prints what was measured.
pub(crate) fn run(options: &RunOptions) -> Result<(), Failure> {
    if let Some(path) = &options.save_guest {
        std::fs::write(path, crate::guest::ELF)
            .with_context(|| format!("cannot write {}", path.display()))?;
        return Ok(());
    }
    let mut signals = StopSignals::install().context("cannot catch signals")?;
    vmm::check().map_err(Failure::usage)?;
    let wish = Wish { cpus: options.io_cpus.clone(), threads: options.io_threads };
    let pin = options.io_pin == Switch::On;
    let pool = Pool::start(reactor::Options { wish, pin, ..reactor::Options::default() });
    let pool = pool.map_err(Failure::usage)?;
    let pool = Arc::new(pool);
    let (tell, said) = mpsc::channel();
    let machine = Arc::new(build(options, &pool, tell.clone())?);

    let (watched, handle) = (machine.clone(), signals.handle());
    let runner = thread::Builder::new().name("machine".into()).spawn(move || {
        let outcome = watched.run();
        let _ = tell.send(Said::Ended);
        drop(handle);
        outcome
    });
    let runner = runner.context("cannot start a thread")?;
    let stopped = machine.clone();
    let wait_for_signals = move || {
        if signals.wait().is_some() {
            stopped.stop();
            // Storage or a console that takes nothing would keep it for ever.
            thread::sleep(DRAIN_MAX);
            let _ = writeln!(io::stderr(), "error: not at rest within {} s", DRAIN_MAX.as_secs());
            std::process::exit(EXIT_RUNTIME.into());
        }
    };
    thread::Builder::new().name("signals".into()).spawn(wait_for_signals).context("cannot start a thread")?;
    if options.kernel.is_some() {
        console::type_from_stdin(&machine)?;
    }

    let mut report = follow(&machine, &said, options);
    let outcome = runner.join().map_err(|_| anyhow!("the machine's thread panicked"))?;
    let outcome = outcome.context("the machine cannot go on")?;
    report.end(outcome, machine.snapshot());
    crate::print(report.text(options.json).as_bytes())?;
    pool.stop().context("cannot stop the I/O threads")?;
    verdict(outcome, &report)
}

/// The machine with its disks, ready to run.
fn build(options: &RunOptions, pool: &Arc<Pool>, tell: mpsc::Sender<Said>) -> Result<Machine, Failure> {
    let mut disks = Vec::new();
    for (index, disk) in disks_of(options)?.into_iter().enumerate() {
        disks.push(PciDevice::new(Arc::new(disk), format!("disk{index}"), options.poll));
    }
    let mut config = match &options.kernel {
        Some(kernel) => Config::new(Kernel::Path(kernel.clone()), console::sink(options.json)),
        None => Config::new(Kernel::Embedded(crate::guest::ELF), Box::new(console::Lines::new(tell))),
    };
    config.initrd.clone_from(&options.initrd);
    config.command_line = match &options.kernel {
        Some(_) => options.append.clone().unwrap_or_default(),
        None => options.job.command_line(),
    };
    config.memory_bytes = options.mem.0.get();
    config.huge_pages = options.huge;
    config.cpus = options.vcpus().into();
    let pins = options.vcpu_cpus.as_ref().map_or(&[][..], |cpus| cpus.as_slice());
    config.pin = pins.iter().copied().cycle().take(config.cpus).collect();
    config.doorbells = options.doorbell;
    Machine::new(config, disks, pool.clone()).context("cannot build the machine").map_err(Failure::Usage)
}

/// The disks asked for; for the embedded guest's tour, those that need no file if there are none.
fn disks_of(options: &RunOptions) -> Result<Vec<Blk>, Failure> {
    const TOUR: [&str; 2] = ["null:8G", "mem:64M"];
    let mut disks = options.disk.clone();
    if disks.is_empty() && options.kernel.is_none() {
        let parsed = TOUR.map(str::parse).into_iter().collect::<Result<_, String>>();
        disks = parsed.map_err(|error| Failure::Runtime(anyhow!(error)))?;
    }
    let vcpus = NonZeroU16::new(options.vcpus()).unwrap_or(NonZeroU16::MIN);
    disks.into_iter().map(|disk| open(disk, vcpus).map_err(Failure::Usage)).collect()
}

fn open(disk: DiskOption, queues: NonZeroU16) -> anyhow::Result<Blk> {
    let backend = disk.backend.open(disk.read_only)?;
    let presented = blk::Options {
        queues: disk.queues.unwrap_or(queues).get(),
        serial: disk.serial,
        read_only: disk.read_only,
        ..blk::Options::default()
    };
    Ok(Blk::new(backend, presented)?)
}

/// What reaches the thread that reports.
enum Said {
    /// A line of the embedded guest's.
    Line(Line),
    /// The machine has ended.
    Ended,
}

/// Collects what the embedded guest says, each result with what the machine counted meanwhile.
fn follow(machine: &Machine, said: &mpsc::Receiver<Said>, options: &RunOptions) -> Report {
    let mut report = Report::new(options);
    let mut progress = Progress::new();
    loop {
        match said.recv_timeout(PROGRESS) {
            Ok(Said::Line(Line::Ready { .. })) => {}
            Ok(Said::Line(Line::Result(result))) => report.results.push(measured(*result, machine)),
            Ok(Said::Line(Line::Error(error))) => report.errors.push(error),
            Err(RecvTimeoutError::Timeout) => progress.show(&machine.snapshot()),
            Ok(Said::Ended) | Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    progress.clear();
    report
}

fn measured(result: JobResult, machine: &Machine) -> Measured {
    Measured { result, counted: machine.measured() }
}

fn verdict(outcome: Outcome, report: &Report) -> Result<(), Failure> {
    if let Some(error) = report.errors.first() {
        return Err(Failure::Runtime(anyhow!("the guest failed: {error}")));
    }
    match outcome {
        Outcome::PowerOff | Outcome::Exit(0) | Outcome::Stopped | Outcome::Reset => Ok(()),
        Outcome::Exit(status) => Err(Failure::Runtime(anyhow!("the guest ended with status {status}"))),
    }
}

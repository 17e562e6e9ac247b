//! `exitless run`: a virtual machine of our own, with disks, and what came of it.

mod console;
mod console_tail;
mod disk;
mod end;
mod follow;
mod guest;
mod keyboard;
mod machine;
mod options;
mod progress;
mod report;
mod silence;
mod table;
mod terminal;
#[cfg(test)]
mod tests;
mod verdict;

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use anyhow::{Context, anyhow};
use reactor::placement::Wish;
use reactor::{Pool, interrupts};
use vmm::{Machine, Outcome};

pub(crate) use options::RunOptions;
use options::Switch;

use crate::descriptors::{self, Need};
use crate::failure::Failure;
use crate::metrics::{self, MetricsSocket, MetricsThread};
use crate::stop::StopSignals;
use console_tail::ConsoleTail;
use follow::{Said, follow};
use report::Report;
use silence::{PATIENCE, Silence};
use terminal::Loan;
use verdict::verdict;

/// What a queue opens when it starts, at most: its ring of the kernel's, and events.
const QUEUE_DESCRIPTORS_MAX: u64 = 8;

/// Runs the machine until its guest ends it, or somebody else does, and prints what was measured.
pub(crate) fn run(options: &RunOptions) -> Result<(), Failure> {
    if let Some(path) = &options.save_guest {
        std::fs::write(path, crate::guest::ELF)
            .with_context(|| format!("cannot write {}", path.display()))?;
        return Ok(());
    }
    let mut signals = StopSignals::install().context("cannot catch signals")?;
    vmm::check().map_err(Failure::usage)?;
    options.check().map_err(Failure::Usage)?;
    descriptors::allow();
    // Before the machine takes long to build.
    let metrics = options.metrics.as_ref().map(MetricsSocket::listen).transpose()?;
    let disks = machine::disks(options)?;
    let first = interrupts::cpus_of_disks(disks.iter().filter_map(|disk| disk.backend.path()));
    let wish = Wish { cpus: options.io_cpus.clone(), first, threads: options.io_threads };
    let pin = options.io_pin == Switch::On;
    let pool = Pool::start(reactor::Options { wish, pin, ..reactor::Options::default() });
    let pool = pool.map_err(Failure::usage)?;
    let pool = Arc::new(pool);
    let (tell, said) = mpsc::channel();
    let tail = Arc::new(ConsoleTail::default());
    let (machine, opened) = machine::build(options, &disks, &pool, (tell.clone(), tail.clone()))?;
    let machine = Arc::new(machine);
    let queues = machine.snapshot().queues.len() as u64;
    descriptors::expect([Need { queues, per_queue: QUEUE_DESCRIPTORS_MAX, besides: 0 }])?;
    let metrics = metrics.map(|socket| serve_metrics(socket, &machine, options.quiet)).transpose()?;
    let Some(at_once) = signals.hold_second().context("cannot catch signals")? else {
        return Err(Failure::Runtime(anyhow!("stopped by a signal before the guest began")));
    };
    let loan = if options.kernel.is_some() { Loan::take(at_once.clone())? } else { None };
    let terminal = loan.as_ref().map(|loan| loan.terminal().clone());
    if terminal.is_some() && !options.quiet {
        let _ = writeln!(io::stderr(), "{}", keyboard::NOTICE);
    }

    let (watched, handle) = (machine.clone(), signals.handle());
    let runner = thread::Builder::new().name("machine".into()).spawn(move || {
        let outcome = watched.run();
        let _ = tell.send(Said::Ended);
        drop(handle);
        outcome
    });
    let runner = runner.context("cannot start a thread")?;
    let asked = Arc::new(AtomicBool::new(false));
    let signalled = end::Signalled {
        machine: Arc::downgrade(&machine),
        terminal: terminal.clone(),
        at_once,
        quiet: options.quiet,
        asked: asked.clone(),
    };
    signalled.listen(signals)?;
    if options.kernel.is_some() {
        keyboard::start(&machine, terminal)?;
    }

    let job = Duration::from_millis(options.job.seconds.0.get().into());
    let silence = options.kernel.is_none().then(|| Silence::new(job, PATIENCE));
    let mut report = Report::new(options, disks.into_iter().map(|disk| disk.name).collect());
    let ended = follow(&machine, &said, options, silence, &mut report);
    if !ended {
        // Its threads end with this process.
        crate::print(report.text(options.json).as_bytes())?;
        return verdict(Outcome::Stopped, &report);
    }
    let outcome = runner.join().map_err(|_| anyhow!("the machine's thread panicked"))?;
    drop((loan, metrics));
    let outcome = outcome.context("the machine cannot go on")?;
    report.was_asked = asked.load(Ordering::Acquire);
    report.console_panicked = tail.tells_of_panic();
    report.failed = opened.iter().map(|disk| disk.counters().errors).sum();
    drop(opened);
    report.end(outcome, machine.snapshot());
    crate::print(report.text(options.json).as_bytes())?;
    let finished = end::finish(machine, pool);
    verdict(outcome, &report)?;
    finished
}

fn serve_metrics(
    socket: MetricsSocket,
    machine: &Arc<Machine>,
    quiet: bool,
) -> anyhow::Result<MetricsThread> {
    if !quiet {
        let _ = writeln!(io::stderr(), "metrics: {}", socket.place());
    }
    let machine = machine.clone();
    socket.answer(Box::new(move || metrics::of_machine(&machine.snapshot())))
}

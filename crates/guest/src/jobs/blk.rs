//! Load on one disk: a queue, a processor and a histogram for each job.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use super::JobError;
use super::load::{Load, Target};
use super::verify::Verify;
use crate::disk::{Disk, DiskQueue};
use crate::histogram::Histogram;
use crate::machine::console::{self, Mark, mark};
use crate::machine::interrupts::Listening;
use crate::machine::patience::{PROCESSOR_SECONDS, Patience};
use crate::machine::service::ticks;
use crate::machine::smp::SmpError;
use crate::machine::sync::{Barrier, Spin};
use crate::machine::{self, Machine, MachineError};
use crate::options::Options;
use crate::pci::Function;
use crate::report;

/// Before it is measured, a load runs for a tenth of its time, at most this long: threads on the other side wake up.
const WARM_UP_MS_MAX: u64 = 50;

/// Runs the job and prints its result.
///
/// # Errors
/// See [`JobError`].
pub fn run(machine: &Machine, disks: &[Function], options: &Options) -> Result<(), JobError> {
    let disk = open(machine, disks, options.disk)?;
    load(machine, &disk, options, "blk")
}

/// Disk `index` of this machine.
///
/// # Errors
/// There are fewer, or it does not work.
pub(super) fn open(machine: &Machine, disks: &[Function], index: usize) -> Result<Disk, JobError> {
    let function = disks.get(index).ok_or(JobError::NoDisk { wanted: index, have: disks.len() })?;
    Disk::new(*function, machine.clock).map_err(|source| JobError::Disk { disk: index, source })
}

/// What a job has to say in the end.
#[derive(Default)]
struct Outcome {
    latency: Histogram,
    kicks: u64,
    interrupts: u64,
    lost_interrupts: u64,
    returned: u64,
    failed: u64,
    verified_bytes: u64,
    ticks: u64,
}

/// Puts a load on a disk and prints the result in the name of `job`.
pub(super) fn load(machine: &Machine, disk: &Disk, options: &Options, job: &str) -> Result<(), JobError> {
    let of_disk = |source| JobError::Disk { disk: options.disk, source };
    let queues = disk.open(machine, options).map_err(of_disk)?;
    let queues: Vec<_> = queues.into_iter().map(|queue| Spin::new((queue, None))).collect();
    let round = Round {
        machine,
        options,
        blocks: disk.blocks(options.block_bytes),
        start: Barrier::new(queues.len()),
        end: AtomicU64::new(0),
        pulse: AtomicU64::new(0),
    };
    machine.processors.run(queues.len(), &|job| {
        let (queue, outcome) = &mut *queues[job].lock();
        *outcome = Some(round.worker(job, queue));
    })?;

    let mut sum = Outcome::default();
    for (job, queue) in queues.into_iter().enumerate() {
        let outcome = queue.into_inner().1.ok_or(JobError::NoOutcome(job))??;
        sum.latency.merge(&outcome.latency);
        sum.kicks += outcome.kicks;
        sum.interrupts += outcome.interrupts;
        sum.lost_interrupts += outcome.lost_interrupts;
        sum.returned += outcome.returned;
        sum.failed += outcome.failed;
        sum.verified_bytes += outcome.verified_bytes;
        sum.ticks = sum.ticks.max(outcome.ticks);
    }
    // Last: a device that is stuck may be stuck here too, and what is wrong with it would not be said.
    disk.close().map_err(of_disk)?;
    console::print(&report::Load {
        options,
        job,
        clock: machine.clock,
        ticks: sum.ticks,
        requests: sum.latency.total(),
        latency: &sum.latency,
        kicks: sum.kicks,
        interrupts: sum.interrupts,
        lost_interrupts: sum.lost_interrupts,
        returned: sum.returned,
        failed: sum.failed,
        verified_bytes: sum.verified_bytes,
    });
    Ok(())
}

/// What the jobs of a load share.
struct Round<'a> {
    machine: &'a Machine,
    options: &'a Options,
    blocks: u64,
    start: Barrier,
    /// The tick at which the load ends.
    end: AtomicU64,
    /// Counts on while jobs that are waited for get on.
    pulse: AtomicU64,
}

impl Round<'_> {
    /// One job, from verification to the end. All pass the barriers, whatever happened to them.
    fn worker(&self, job: usize, queue: &mut DiskQueue) -> Result<Outcome, JobError> {
        let listening = self.options.interrupts.then(Listening::start).transpose();
        let mut outcome = Outcome::default();
        let mut state = match &listening {
            Ok(_) => Ok(()),
            Err(error) => Err(MachineError::from(*error).into()),
        };
        if state.is_ok() && self.options.verify {
            let (options, blocks, clock, pulse) =
                (self.options, self.blocks, self.machine.clock, &self.pulse);
            let pass = Verify { queue, options, blocks, job, clock, pulse };
            state = pass.run().map(|bytes| outcome.verified_bytes = bytes);
        }
        let target = Target::new(self.options, self.blocks, job);
        let mut load = Load::new(queue, self.machine.clock, self.options, target);
        let named = |source| JobError::Disk { disk: self.options.disk, source };

        let warm_up_ms = (self.options.ms / 10).min(WARM_UP_MS_MAX);
        self.start(job, warm_up_ms, None);
        if state.is_ok() {
            state = load.run(self.end.load(Ordering::Acquire), &self.pulse).map(drop).map_err(named);
        }
        load.latency.clear();
        let before = counts(load.queue);
        self.start(job, self.options.ms, Some(Mark::Begin));
        if state.is_ok() {
            let began = ticks();
            let ended = load.run(self.end.load(Ordering::Acquire), &self.pulse).map_err(named);
            state = ended.map(|ended| outcome.ticks = ended.saturating_sub(began));
        }
        self.start(job, 0, Some(Mark::End));

        let after = counts(load.queue);
        outcome.kicks = after.0 - before.0;
        outcome.interrupts = after.1 - before.1;
        outcome.lost_interrupts = load.queue.lost_interrupts();
        outcome.returned = load.returned;
        outcome.failed = load.failed;
        outcome.latency = load.latency;
        state.map(|()| outcome)
    }

    /// Waits for all jobs, and sets the end of what they are about to do.
    fn start(&self, job: usize, ms: u64, at: Option<Mark>) {
        self.meet();
        if job == 0 {
            at.into_iter().for_each(mark);
            self.end.store(self.machine.clock.deadline_ms(ms), Ordering::Release);
        }
        self.meet();
    }

    /// Waits for all jobs. Without one of them there is no going on.
    fn meet(&self) {
        let ms = self.options.ms + PROCESSOR_SECONDS * 1000;
        let mut patience = Patience::of_ms(self.machine.clock, ms);
        let mut seen = self.pulse.load(Ordering::Relaxed);
        let gives_up = || {
            let pulse = self.pulse.load(Ordering::Relaxed);
            if core::mem::replace(&mut seen, pulse) != pulse {
                patience.renew(ticks());
            }
            patience.is_over(ticks())
        };
        if !self.start.wait(gives_up) {
            machine::fail(&SmpError::Away(ms / 1000));
        }
    }
}

/// Kicks and interrupts so far.
fn counts(queue: &DiskQueue) -> (u64, u64) {
    (queue.kicks(), queue.interrupt().map_or(0, |interrupt| interrupt.count()))
}

//! Entropy from each device that has it, as fast as one request at a time gets it.

use core::fmt::{self, Display, Formatter};

use super::JobError;
use crate::entropy::{EntropyError, EntropySource};
use crate::histogram::Histogram;
use crate::machine::Machine;
use crate::machine::clock::Clock;
use crate::machine::console::{self, Mark, mark};
use crate::machine::service::{self, ticks};
use crate::options::Options;
use crate::pci::Function;
use crate::report::{Object, cut_short};

/// Runs the job on all of `devices` and prints a result for each.
///
/// # Errors
/// See [`JobError`].
pub fn run(machine: &Machine, devices: &[Function], options: &Options) -> Result<(), JobError> {
    if devices.is_empty() {
        return Err(JobError::NoEntropy);
    }
    devices.iter().try_for_each(|&device| one(machine, device, options, "rng")).map_err(JobError::Entropy)
}

/// Runs it on one of them and prints the result in the name of `job`.
pub(super) fn one(
    machine: &Machine,
    device: Function,
    options: &Options,
    job: &str,
) -> Result<(), EntropyError> {
    let mut source = EntropySource::open(machine, device)?;
    let clock = machine.clock;
    let (mut latency, mut bytes) = (Histogram::default(), 0);
    mark(Mark::Begin);
    let start = ticks();
    let end = clock.deadline_ms(options.ms);
    let mut now = start;
    while now < end && !service::asked_to_end() {
        bytes += u64::from(source.fill()?);
        let done = ticks();
        latency.record(done - now);
        now = done;
    }
    mark(Mark::End);
    let kicks = source.kicks();
    source.close()?;
    console::print(&Report { options, job, clock, ticks: now - start, latency: &latency, bytes, kicks });
    Ok(())
}

struct Report<'a> {
    options: &'a Options,
    job: &'a str,
    clock: Clock,
    ticks: u64,
    latency: &'a Histogram,
    bytes: u64,
    kicks: u64,
}

impl Display for Report<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let seconds = self.ticks as f64 / self.clock.hz() as f64;
        let us = |permille| self.clock.us(self.latency.quantile(permille));
        let mut object = Object::new(f, "result")?;
        object.text("job", self.job)?.text("id", &self.options.id)?.text("device", "entropy")?;
        object.number("jobs", 1)?.number("qd", 1)?.decimal("seconds", seconds)?;
        object.number("requests", self.latency.total())?;
        object.decimal("iops", self.latency.total() as f64 / seconds)?;
        object.decimal("bytes_per_s", self.bytes as f64 / seconds)?;
        object.decimal("p50_us", us(500))?.decimal("p99_us", us(990))?.decimal("p999_us", us(999))?;
        object.number("kicks", self.kicks)?.number("interrupts", 0)?;
        cut_short(&mut object)?;
        object.end()
    }
}

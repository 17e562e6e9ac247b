//! What `exitless run` can be told.

use std::num::{NonZeroU16, NonZeroU32, NonZeroUsize};
use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, ValueEnum};
use reactor::placement::{Wish, layout};
use reactor::{CpuList, Machine, Mode};
use vmm::DoorbellMode;

use super::disk::DiskOption;
use crate::metrics::Address;
use crate::options::{LogLevel, mode_parser, parse_count};
use crate::size::Size;

/// A virtual machine and what it does.
#[derive(Args, Clone, Debug)]
pub struct RunOptions {
    /// A kernel to boot: an ELF file with a PVH entry, or a bzImage. Without it, the embedded guest runs.
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,

    /// An initial file system for the kernel.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,

    /// What to add to the kernel's command line.
    #[arg(long, value_name = "TEXT", requires = "kernel")]
    pub append: Option<String>,

    /// Virtual CPUs [default: one per job, else 1].
    #[arg(long, value_name = "COUNT", value_parser = parse_count::<NonZeroU16>)]
    pub cpus: Option<NonZeroU16>,

    /// Memory of the virtual machine.
    #[arg(long, value_name = "SIZE", default_value = "256M")]
    pub mem: Size,

    /// Back the memory with huge pages, which the administrator has to set aside.
    #[arg(long)]
    pub huge: bool,

    /// A disk: a backend as for `exitless blk`, and `queues=COUNT`, `serial=ID`, `read-only` after commas. May be given
    /// several times.
    #[arg(long, value_name = "SPEC")]
    pub disk: Vec<DiskOption>,

    /// How queues notice requests.
    #[arg(long, value_name = "MODE", value_parser = mode_parser(), default_value_t = Mode::Hybrid)]
    pub poll: Mode,

    /// CPUs to run I/O threads on, one thread each, like `2-5,7` [default: as needed, beginning with those that take
    /// the interrupts of the disks].
    #[arg(long, value_name = "LIST")]
    pub io_cpus: Option<CpuList>,

    /// Whether I/O threads are bound to their CPUs.
    #[arg(long, value_enum, value_name = "ON", default_value_t = Switch::On)]
    pub io_pin: Switch,

    /// CPUs to run the virtual CPUs on, in their order; more virtual CPUs than that take turns on them.
    #[arg(long, value_name = "LIST")]
    pub vcpu_cpus: Option<CpuList>,

    /// What a queue's notification page is while its I/O thread polls.
    ///
    /// `map`: ordinary memory, so that writes to it cause no exit. `trap`: every write is an exit, as in other monitors.
    /// `adaptive`: memory once a driver has made exits that nobody needed. A thread that sleeps often changes it only as
    /// far as that takes a fortieth of its time.
    #[arg(long, value_name = "MODE", value_parser = doorbell_parser(), default_value_t = DoorbellMode::Adaptive)]
    pub doorbell: DoorbellMode,

    /// How many I/O threads to spread the queues over [default: as needed].
    #[arg(long, value_name = "COUNT", conflicts_with = "io_cpus", value_parser = parse_count::<NonZeroUsize>)]
    pub io_threads: Option<NonZeroUsize>,

    /// Print the result as one line of JSON.
    #[arg(long)]
    pub json: bool,

    /// Serve metrics in Prometheus' format at `unix:PATH` or `IP:PORT`, path /metrics, while the machine runs.
    #[arg(long, value_name = "ADDR")]
    pub metrics: Option<Address>,

    /// Say nothing on stderr about progress, keys and where metrics are.
    #[arg(long, short)]
    pub quiet: bool,

    /// Run nothing, but write the embedded guest to a file, an ELF image for other monitors.
    #[arg(long, value_name = "FILE", conflicts_with = "kernel")]
    pub save_guest: Option<PathBuf>,

    /// Log to stderr what is at least this important [default: warn].
    #[arg(long, value_name = "LEVEL", ignore_case = true)]
    pub log: Option<LogLevel>,

    // Last, for what follows in the help would be under its heading.
    #[command(flatten)]
    #[allow(missing_docs)]
    pub job: JobOptions,
}

/// What the embedded guest does.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Embedded guest")]
pub struct JobOptions {
    /// The job of the embedded guest [default: tour].
    #[arg(long, value_enum, value_name = "JOB", conflicts_with = "kernel")]
    pub guest_job: Option<Job>,

    /// How many virtual CPUs drive a queue each.
    #[arg(long, value_name = "COUNT", default_value = "1", value_parser = parse_count::<NonZeroU16>)]
    pub jobs: NonZeroU16,

    /// Requests in flight in each queue.
    #[arg(long, value_name = "COUNT", default_value = "32", value_parser = parse_count::<NonZeroU16>)]
    pub qd: NonZeroU16,

    /// Size of a request.
    #[arg(long, value_name = "BYTES", default_value = "4K")]
    pub bs: Size,

    /// What requests do.
    #[arg(long, value_enum, value_name = "ACCESS", default_value_t = Access::Randread)]
    pub rw: Access,

    /// How long to measure.
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = parse_ms)]
    pub seconds: Milliseconds,

    /// Which of the disks, from 0 in the order given.
    #[arg(long, value_name = "INDEX", default_value = "0")]
    pub on: u16,

    /// The layout of the rings.
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = Ring::Split)]
    pub ring: Ring,

    /// How the guest learns of completions.
    #[arg(long, value_enum, value_name = "WAY", default_value_t = Completion::Polled)]
    pub completion: Completion,

    /// Kick after every burst, whether or not the device wants that.
    #[arg(long)]
    pub always_kick: bool,

    /// Write a pattern first, read it back and compare.
    #[arg(long)]
    pub verify: bool,
}

/// Jobs of the embedded guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Job {
    /// A short load on every device.
    Tour,
    /// Load on one disk.
    Blk,
    /// Entropy, 4 KiB at a time.
    Rng,
    /// What memory shared between virtual CPUs, and the clock, cost.
    Ring,
    /// Round trips of single requests by kick and interrupt.
    Events,
}

/// What requests do, as in fio.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs, reason = "the names are fio's")]
pub enum Access {
    Randread,
    Randwrite,
    Read,
    Write,
}

/// The layout of rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs, reason = "the names are the specification's")]
pub enum Ring {
    Split,
    Packed,
}

/// How the guest learns of completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Completion {
    /// It looks at the ring all the time.
    Polled,
    /// It halts until an interrupt.
    Interrupt,
}

/// On or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Switch {
    On,
    Off,
}

/// A duration on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Milliseconds(pub NonZeroU32);

/// The longest job, in seconds.
const SECONDS_MAX: f64 = 3600.0;

fn doorbell_parser() -> impl TypedValueParser<Value = DoorbellMode> {
    PossibleValuesParser::new(["trap", "adaptive", "map"]).try_map(|mode| mode.parse::<DoorbellMode>())
}

fn parse_ms(text: &str) -> Result<Milliseconds, String> {
    let seconds = text.parse::<f64>().ok().filter(|s| (0.001..=SECONDS_MAX).contains(s));
    let ms = seconds.and_then(|seconds| NonZeroU32::new((seconds * 1e3).round() as u32));
    ms.map(Milliseconds).ok_or_else(|| format!("it must be 0.001 to {SECONDS_MAX} seconds, like 2 or 0.5"))
}

impl RunOptions {
    /// How many virtual CPUs there are.
    #[must_use]
    pub fn vcpus(&self) -> u16 {
        self.cpus.unwrap_or(self.job.jobs).get()
    }

    /// Whether this host and the embedded guest can do it.
    ///
    /// # Errors
    /// What cannot be done, and what can.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        if let Some(cpus) = &self.vcpu_cpus {
            let wish = Wish { cpus: Some(cpus.clone()), ..Wish::default() };
            layout(&Machine::read(), &wish).context("--vcpu-cpus")?;
        }
        let buffers = self.job.buffer_bytes();
        let memory = self.mem.0.get();
        ensure!(
            self.kernel.is_some() || buffers < memory,
            "{} requests of {} in each of {} queues take {} MiB, which the machine's memory must hold: `--mem` is {}",
            self.job.qd,
            self.job.bs,
            self.job.jobs,
            buffers >> 20,
            self.mem
        );
        Ok(())
    }
}

impl JobOptions {
    /// Memory for the data of all requests of a load.
    fn buffer_bytes(&self) -> u64 {
        let requests = u64::from(self.jobs.get()) * u64::from(self.qd.get());
        self.bs.0.get().saturating_mul(requests)
    }

    /// The embedded guest's command line.
    #[must_use]
    pub fn command_line(&self) -> String {
        let name = |value: &dyn Fn() -> Option<clap::builder::PossibleValue>| {
            value().map_or(String::new(), |value| value.get_name().to_owned())
        };
        let job = self.guest_job.unwrap_or(Job::Tour);
        let flag = u8::from;
        format!(
            "job={} jobs={} qd={} bs={} rw={} ms={} disk={} ring={} irq={} kick={} verify={}",
            name(&|| job.to_possible_value()),
            self.jobs,
            self.qd,
            self.bs.0,
            name(&|| self.rw.to_possible_value()),
            self.seconds.0,
            self.on,
            name(&|| self.ring.to_possible_value()),
            flag(self.completion == Completion::Interrupt),
            if self.always_kick { "always" } else { "auto" },
            flag(self.verify),
        )
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        run: RunOptions,
    }

    fn parse(line: &str) -> Result<RunOptions, clap::Error> {
        Cli::try_parse_from(["x"].into_iter().chain(line.split_whitespace())).map(|cli| cli.run)
    }

    #[test]
    fn a_job_becomes_the_guests_command_line() {
        let run =
            parse("--guest-job blk --jobs 2 --qd 8 --bs 64K --rw write --seconds 0.5 --completion interrupt");
        assert_eq!(
            run.unwrap().job.command_line(),
            "job=blk jobs=2 qd=8 bs=65536 rw=write ms=500 disk=0 ring=split irq=1 kick=auto verify=0"
        );
    }

    #[test]
    fn there_is_a_virtual_cpu_for_each_job_unless_said_otherwise() {
        assert_eq!(parse("--jobs 3").unwrap().vcpus(), 3);
        assert_eq!(parse("--jobs 3 --cpus 4").unwrap().vcpus(), 4);
        assert_eq!(parse("").unwrap().vcpus(), 1);
    }

    #[test]
    fn what_cannot_be_is_refused_before_anything_starts() {
        let refused = |line| parse(line).unwrap().check().unwrap_err();
        let error = refused("--qd 256 --bs 1M").to_string();
        assert!(error.contains("256 MiB") && error.contains("`--mem` is 256M"), "{error}");
        assert!(parse("--qd 256 --bs 1M --mem 300M").unwrap().check().is_ok());
        assert!(parse("--kernel k --qd 256 --bs 1M").unwrap().check().is_ok(), "no job of the guest's");
        let error = format!("{:#}", refused("--vcpu-cpus 1023"));
        assert!(error.contains("--vcpu-cpus: ") && error.contains("may not run on CPU 1023"), "{error}");
    }

    #[test]
    fn what_belongs_to_a_kernel_needs_one() {
        for line in ["--initrd i", "--append x", "--kernel k --guest-job blk", "--seconds 0", "--seconds x"] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}

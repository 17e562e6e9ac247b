//! What a turn of an I/O thread costs besides its pollers' own work.
//!
//! `cargo run --release -p exitless-reactor --example turn_cost`
//!
//! Prints the median over several runs of: a clock read, an empty turn with 1, 2 and 8 pollers, a turn in which the
//! only poller did one request, and the last as a multiple of the clock read (which is what a turn cannot avoid).
//! The pollers do nothing, behind a virtual call. Turns are measured in CPU time; the figures are for comparison within one run.

use std::error::Error;
use std::os::fd::RawFd;
use std::time::Duration;

use reactor::{Budget, Clock, Mode, Options, Poller, Pool, Ticks, Work};

const RUNS: usize = 9;
const RUN: Duration = Duration::from_millis(100);
const CLOCK_READS: u32 = 10_000_000;

struct Nothing {
    done: u32,
}

impl Poller for Nothing {
    fn poll(&mut self, _now: Ticks, _budget: Budget) -> Work {
        Work { done: std::hint::black_box(self.done), ..Work::NONE }
    }

    fn arm(&mut self) -> bool {
        false
    }

    fn disarm(&mut self) {}

    fn wake_fds(&self) -> Vec<RawFd> {
        Vec::new()
    }

    fn drain(&mut self, _now: Ticks) -> bool {
        true
    }
}

fn median(mut run: impl FnMut() -> f64) -> f64 {
    let mut runs: Vec<_> = (0..RUNS).map(|_| run()).collect();
    runs.sort_by(f64::total_cmp);
    runs[RUNS / 2]
}

fn clock_ns(clock: Clock) -> f64 {
    median(|| {
        let start = clock.now();
        for _ in 0..CLOCK_READS {
            std::hint::black_box(clock.now());
        }
        clock.now().since_ns(start) as f64 / f64::from(CLOCK_READS)
    })
}

fn turn_ns(pollers: usize, done: u32) -> Result<f64, Box<dyn Error>> {
    let pool = Pool::start(Options::default())?;
    let add = |index| {
        let seat = pool.place("one thread", Mode::Poll)?;
        seat.add(format!("nothing {index}"), move || Box::new(Nothing { done }))
    };
    let _handles = (0..pollers).map(add).collect::<Result<Vec<_>, reactor::Error>>()?;
    let cost = || {
        let (turns, cpu_ns) = (pool.report()[0].stats.turns, cpu_ns("io-0")?);
        std::thread::sleep(RUN);
        let (turns, cpu_ns) = (pool.report()[0].stats.turns - turns, self::cpu_ns("io-0")? - cpu_ns);
        Ok(cpu_ns as f64 / turns as f64)
    };
    let mut failed = None;
    let median = median(|| {
        cost().unwrap_or_else(|error: std::io::Error| {
            failed = Some(error);
            0.0
        })
    });
    failed.map_or(Ok(median), |error| Err(error.into()))
}

/// CPU time of this process's thread `name`, in ns (kernel, sched-stats.rst). Unlike wall-clock time it does not count
/// what other processes take from the CPU.
fn cpu_ns(name: &str) -> std::io::Result<u64> {
    for task in std::fs::read_dir("/proc/self/task")? {
        let task = task?.path();
        if std::fs::read_to_string(task.join("comm"))?.trim() == name {
            let stat = std::fs::read_to_string(task.join("schedstat"))?;
            return Ok(stat.split(' ').next().and_then(|ns| ns.parse().ok()).unwrap_or(0));
        }
    }
    Err(std::io::ErrorKind::NotFound.into())
}

fn main() -> Result<(), Box<dyn Error>> {
    let clock = Clock::get();
    let read = clock_ns(clock);
    println!(
        "clock read, {:24} {read:6.1} ns",
        if clock.is_tsc() { "time-stamp counter" } else { "CLOCK_MONOTONIC" }
    );
    println!("clock read, {:24} {:6.1} ns", "CLOCK_MONOTONIC", clock_ns(Clock::monotonic()));
    for (pollers, done) in [(1, 0), (2, 0), (8, 0), (1, 1), (2, 1)] {
        let turn = turn_ns(pollers, done)?;
        let kind = if done > 0 { "busy" } else { "empty" };
        println!(
            "{kind:5} turn, {pollers} poller(s)          {turn:6.1} ns = {:.1} clock reads",
            turn / read
        );
    }
    Ok(())
}

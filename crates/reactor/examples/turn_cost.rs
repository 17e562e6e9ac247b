//! What a turn of an I/O thread costs besides its pollers' own work.
//!
//! `cargo run --release -p exitless-reactor --example turn_cost`
//!
//! A turn cannot cost less than the clock read in it, which is therefore measured too. The pollers do nothing, behind
//! a virtual call: `empty` ones report no work, `busy` ones one request each time. All figures are CPU time, so that
//! other processes count as little as possible; a busy hyper-thread sibling still shows, and moves every row.

use std::error::Error;
use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use reactor::{Budget, Clock, Mode, Options, Poller, PollerHandle, Pool, Ticks, Work};

const RUNS: usize = 9;
const RUN: Duration = Duration::from_millis(100);
const IDLE_RUN: Duration = Duration::from_secs(2);
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

    fn awaits_completion(&self) -> bool {
        false
    }

    fn drain(&mut self, _now: Ticks) -> bool {
        true
    }

    fn abandon(&mut self) -> bool {
        true
    }
}

/// The least disturbed of several runs, and the middle one, in ns.
struct Cost {
    best: f64,
    median: f64,
}

fn measure(mut run: impl FnMut() -> io::Result<f64>) -> io::Result<Cost> {
    let mut runs = (0..RUNS).map(|_| run()).collect::<io::Result<Vec<_>>>()?;
    runs.sort_by(f64::total_cmp);
    Ok(Cost { best: runs[0], median: runs[RUNS / 2] })
}

fn clock_read(clock: Clock) -> io::Result<Cost> {
    measure(|| {
        let start = cpu_ns("turn_cost")?;
        for _ in 0..CLOCK_READS {
            std::hint::black_box(clock.now());
        }
        Ok((cpu_ns("turn_cost")? - start) as f64 / f64::from(CLOCK_READS))
    })
}

fn pool_of(pollers: usize, mode: Mode, done: u32) -> Result<(Pool, Vec<PollerHandle>), reactor::Error> {
    let pool = Pool::start(Options::default())?;
    let add = |index| {
        let seat = pool.place("one thread", mode)?;
        seat.add(format!("nothing {index}"), move || Box::new(Nothing { done }))
    };
    let handles = (0..pollers).map(add).collect::<Result<Vec<_>, _>>()?;
    Ok((pool, handles))
}

fn turn(pollers: usize, done: u32) -> Result<Cost, Box<dyn Error>> {
    let (pool, _handles) = pool_of(pollers, Mode::Poll, done)?;
    let sample = || io::Result::Ok((pool.report()[0].stats.turns, cpu_ns("io-0")?));
    Ok(measure(|| {
        let before = sample()?;
        std::thread::sleep(RUN);
        let after = sample()?;
        Ok((after.1 - before.1) as f64 / (after.0 - before.0) as f64)
    })?)
}

/// CPU time of a thread with `pollers` idle hybrid pollers, as a fraction of a CPU.
fn idle(pollers: usize) -> Result<f64, Box<dyn Error>> {
    let (_pool, _handles) = pool_of(pollers, Mode::Hybrid, 0)?;
    std::thread::sleep(RUN);
    let before = cpu_ns("io-0")?;
    std::thread::sleep(IDLE_RUN);
    Ok((cpu_ns("io-0")? - before) as f64 / IDLE_RUN.as_nanos() as f64)
}

/// CPU time of this process's thread `name`, in ns (kernel, sched-stats.rst). Unlike wall-clock time it does not
/// count what other processes take from the CPU.
fn cpu_ns(name: &str) -> io::Result<u64> {
    for task in std::fs::read_dir("/proc/self/task")? {
        let task = task?.path();
        if std::fs::read_to_string(task.join("comm"))?.trim() == name {
            let stat = std::fs::read_to_string(task.join("schedstat"))?;
            return Ok(stat.split(' ').next().and_then(|ns| ns.parse().ok()).unwrap_or(0));
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

fn main() -> Result<(), Box<dyn Error>> {
    println!("{:40} {:>8} {:>8}", "ns of CPU time", "best", "median");
    let row = |name: &str, cost: &Cost| println!("{name:40} {:8.1} {:8.1}", cost.best, cost.median);
    let read = clock_read(Clock::get())?;
    row(if Clock::get().is_tsc() { "clock read (TSC)" } else { "clock read" }, &read);
    row("clock read (CLOCK_MONOTONIC)", &clock_read(Clock::monotonic())?);
    for (pollers, done) in [(1, 0), (1, 1), (2, 0), (2, 1), (8, 0)] {
        let kind = if done > 0 { "busy" } else { "empty" };
        row(&format!("{kind} turn, {pollers} poller(s)"), &turn(pollers, done)?);
    }
    println!("idle hybrid thread, 8 pollers: {:.4} % of a CPU", 100.0 * idle(8)?);
    Ok(())
}

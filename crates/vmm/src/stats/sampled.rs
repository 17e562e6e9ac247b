//! Processor time of a thread: how much of it there was, and how much of that the guest had.
//!
//! All of it is the scheduler's own sum, which is exact. What the guest had is sampled by the host's clock tick: handling
//! an exit in the kernel happens inside `KVM_RUN`, and nothing else tells the two apart without a trace. So what is left
//! for the host, the exit-handling time, is as good as the number of ticks: see [`error_percent`].

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// The slowest tick that Linux has, in ns.
const TICK_NS: u64 = 10_000_000;
/// Fewer samples say nothing.
const SAMPLES_MIN: u64 = 100;

/// Processor time of one thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CpuTime {
    /// In all, in ns, exactly.
    pub(crate) run_ns: u64,
    /// In the guest, in ns, sampled.
    pub(crate) guest_ns: u64,
    /// What is left for the host, in ns. The difference of the two as of now may be less than it was; this only grows.
    pub(crate) host_ns: u64,
}

/// The time of a thread as it was last read. It only grows, and stays when the thread has gone.
#[derive(Default)]
pub(crate) struct Kept {
    run_ns: AtomicU64,
    guest_ns: AtomicU64,
    host_ns: AtomicU64,
}

impl Kept {
    /// Reads the time of thread `tid` of this process, if the system says it.
    pub(crate) fn read(&self, tid: i32) -> CpuTime {
        let file = |name: &str| std::fs::read_to_string(format!("/proc/self/task/{tid}/{name}")).ok();
        let run_ns = file("schedstat").and_then(|text| run_ns(&text));
        let guest_ns = file("stat").and_then(|text| guest_ns(&text, ns_per_unit()));
        match (run_ns, guest_ns) {
            (Some(run_ns), Some(guest_ns)) => self.grow(run_ns, guest_ns),
            _ => self.get(),
        }
    }

    /// As it was last read.
    pub(crate) fn get(&self) -> CpuTime {
        CpuTime {
            run_ns: self.run_ns.load(Ordering::Relaxed),
            guest_ns: self.guest_ns.load(Ordering::Relaxed),
            host_ns: self.host_ns.load(Ordering::Relaxed),
        }
    }

    fn grow(&self, run_ns: u64, guest_ns: u64) -> CpuTime {
        let host_ns = run_ns.saturating_sub(guest_ns);
        CpuTime {
            run_ns: self.run_ns.fetch_max(run_ns, Ordering::Relaxed).max(run_ns),
            guest_ns: self.guest_ns.fetch_max(guest_ns, Ordering::Relaxed).max(guest_ns),
            host_ns: self.host_ns.fetch_max(host_ns, Ordering::Relaxed).max(host_ns),
        }
    }
}

/// The host's share of processor time as a percentage. None if there were too few ticks.
pub(crate) fn host_percent(run_ns: u64, guest_ns: u64) -> Option<f64> {
    let enough = run_ns / TICK_NS >= SAMPLES_MIN;
    enough.then(|| run_ns.saturating_sub(guest_ns) as f64 * 100.0 / run_ns as f64)
}

/// By how many percentage points that may be wrong, either way: two standard deviations of a share that was sampled, at
/// the share where they are largest.
pub(crate) fn error_percent(run_ns: u64) -> Option<f64> {
    let samples = run_ns / TICK_NS;
    (samples >= SAMPLES_MIN).then(|| 100.0 / (samples as f64).sqrt())
}

fn ns_per_unit() -> u64 {
    static NS: OnceLock<u64> = OnceLock::new();
    *NS.get_or_init(|| 1_000_000_000 / rustix::param::clock_ticks_per_second().max(1))
}

/// The first field of `/proc/PID/task/TID/schedstat`: time on a processor, in ns.
fn run_ns(schedstat: &str) -> Option<u64> {
    schedstat.split_ascii_whitespace().next()?.parse().ok()
}

/// `guest_time` in `/proc/PID/task/TID/stat`, field 43 counted from 1 (proc_pid_stat(5)).
fn guest_ns(stat: &str, ns_per_unit: u64) -> Option<u64> {
    const GUEST_TIME: usize = 43;
    // The name, field 2, is in parentheses and may contain anything, parentheses too.
    let (_, fields) = stat.rsplit_once(')')?;
    let value = fields.split_ascii_whitespace().nth(GUEST_TIME - 3)?;
    Some(value.parse::<u64>().ok()?.saturating_mul(ns_per_unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_found_in_their_files() {
        let fields: Vec<String> = (3..=52).map(|field| field.to_string()).collect();
        let stat = format!("12 (v ) (cpu) {}", fields.join(" "));
        assert_eq!(guest_ns(&stat, 10), Some(430));
        assert_eq!(guest_ns("12 (vcpu) S 1 2", 10), None);
        assert_eq!(guest_ns("", 10), None);
        assert_eq!(
            (run_ns("522745723 366414194 18271\n"), run_ns(""), run_ns("x")),
            (Some(522_745_723), None, None)
        );
    }

    #[test]
    fn what_is_left_for_the_host_never_shrinks() {
        let kept = Kept::default();
        let host = |run_ns, guest_ns| kept.grow(run_ns, guest_ns).host_ns;
        // Ticks of the guest's come in lumps, and may be ahead of the time that passed.
        let seen = [host(10, 0), host(20, 10), host(25, 20), host(26, 30), host(40, 30), host(60, 30)];
        assert_eq!(seen, [10, 10, 10, 10, 10, 30]);
        assert_eq!(kept.get(), CpuTime { run_ns: 60, guest_ns: 30, host_ns: 30 });
        assert_eq!(kept.read(i32::MAX), kept.get(), "what has gone keeps its time");
    }

    #[test]
    fn a_share_is_told_from_a_number_of_samples_on_with_how_wrong_it_may_be() {
        let second = 1_000_000_000;
        assert_eq!(host_percent(second, second * 3 / 4), Some(25.0));
        assert_eq!(host_percent(second, second + 1), Some(0.0), "one tick too many");
        assert_eq!(host_percent(second - TICK_NS, 0), None);
        assert_eq!(host_percent(0, 0), None);
        assert_eq!(
            (error_percent(second), error_percent(4 * second), error_percent(0)),
            (Some(10.0), Some(5.0), None)
        );
    }

    #[test]
    fn this_thread_has_a_time() {
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        let time = Kept::default().read(tid);
        assert_eq!((time.guest_ns, time.host_ns), (0, time.run_ns));
    }
}

//! Processor time of a thread, in the guest and in the host, as the host's clock tick samples it.
//!
//! Nothing else tells the two apart without a trace: handling an exit in the kernel happens inside `KVM_RUN`. The
//! resolution is a tick, 1 to 10 ms, so it takes a second or more to say anything.

use std::sync::OnceLock;

/// Processor time of one thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CpuTime {
    /// In the guest, in ns.
    pub(crate) guest_ns: u64,
    /// In the host, in ns.
    pub(crate) host_ns: u64,
}

/// Fields of `/proc/PID/task/TID/stat` (proc_pid_stat(5)), counted from 1.
const UTIME: usize = 14;
const STIME: usize = 15;
const GUEST_TIME: usize = 43;

/// The time of thread `tid` of this process; none where the system does not say.
pub(crate) fn cpu_time(tid: i32) -> CpuTime {
    let text = std::fs::read_to_string(format!("/proc/self/task/{tid}/stat")).unwrap_or_default();
    parse(&text, ns_per_tick()).unwrap_or_default()
}

fn ns_per_tick() -> u64 {
    static NS: OnceLock<u64> = OnceLock::new();
    *NS.get_or_init(|| 1_000_000_000 / rustix::param::clock_ticks_per_second().max(1))
}

fn parse(stat: &str, ns_per_tick: u64) -> Option<CpuTime> {
    // The name, field 2, is in parentheses and may contain anything, parentheses too.
    let (_, fields) = stat.rsplit_once(')')?;
    let fields: Vec<_> = fields.split_ascii_whitespace().collect();
    let ns = |field: usize| Some(fields.get(field - 3)?.parse::<u64>().ok()?.saturating_mul(ns_per_tick));
    let guest_ns = ns(GUEST_TIME)?;
    // User time includes the guest's.
    Some(CpuTime { guest_ns, host_ns: ns(UTIME)?.saturating_add(ns(STIME)?).saturating_sub(guest_ns) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_and_host_time_are_told_apart() {
        let mut fields: Vec<String> = (3..=52).map(|field| field.to_string()).collect();
        fields[UTIME - 3] = "900".into();
        fields[STIME - 3] = "30".into();
        fields[GUEST_TIME - 3] = "800".into();
        let stat = format!("12 (v ) (cpu) {}", fields.join(" "));
        assert_eq!(parse(&stat, 10), Some(CpuTime { guest_ns: 8000, host_ns: 1300 }));
        assert_eq!(parse("12 (vcpu) S 1 2", 10), None);
        assert_eq!(parse("", 10), None);
    }

    #[test]
    fn this_thread_has_a_time() {
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        assert_eq!(cpu_time(tid).guest_ns, 0);
        assert_eq!(cpu_time(i32::MAX), CpuTime::default());
    }
}

//! What a server uses: CPU time and memory, as the kernel accounts them.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

/// A server whose use of the machine is read.
#[derive(Clone, Debug)]
pub(crate) enum Usage {
    /// All threads of a process, io_uring's workers included.
    Process(u32),
    /// One thread of this process.
    Thread(u32),
}

/// CPU time of all threads of a server, in ns.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct CpuTime {
    /// On a CPU.
    pub(crate) ran_ns: u64,
    /// Runnable, while something else had the CPU.
    pub(crate) waited_ns: u64,
}

impl Usage {
    /// The calling thread.
    pub(crate) fn this_thread() -> Self {
        Self::Thread(rustix::thread::gettid().as_raw_nonzero().get() as u32)
    }

    /// CPU time so far of the threads that exist now. `schedstat` counts in ns what `stat` counts in ticks of 10 ms,
    /// but of a thread that is running only what it had used at the last tick.
    pub(crate) fn cpu_time(&self) -> Result<CpuTime> {
        let mut sum = CpuTime::default();
        for file in self.schedstat_files()? {
            // A thread may end between being listed and being read.
            if let Ok(text) = fs::read_to_string(file) {
                let time = parse_schedstat(&text).context("cannot read a thread's schedstat")?;
                sum.ran_ns += time.ran_ns;
                sum.waited_ns += time.waited_ns;
            }
        }
        Ok(sum)
    }

    fn schedstat_files(&self) -> Result<Vec<PathBuf>> {
        match self {
            Self::Thread(tid) => Ok(vec![format!("/proc/self/task/{tid}/schedstat").into()]),
            Self::Process(pid) => {
                let folder = format!("/proc/{pid}/task");
                let threads = fs::read_dir(&folder).with_context(|| format!("cannot list {folder}"))?;
                Ok(threads.filter_map(Result::ok).map(|thread| thread.path().join("schedstat")).collect())
            }
        }
    }

    /// Resident memory of its own, in KiB: without shared memory, which is the guest's. `None` for a thread.
    pub(crate) fn own_memory_kib(&self) -> Option<u64> {
        let Self::Process(pid) = self else { return None };
        parse_own_memory(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?)
    }
}

/// The first two numbers of `schedstat` (kernel, sched-stats.rst).
fn parse_schedstat(text: &str) -> Option<CpuTime> {
    let mut numbers = text.split_ascii_whitespace().map_while(|word| word.parse().ok());
    Some(CpuTime { ran_ns: numbers.next()?, waited_ns: numbers.next()? })
}

/// `RssAnon` and `RssFile` of `/proc/PID/status`.
fn parse_own_memory(status: &str) -> Option<u64> {
    let field = |name: &str| -> Option<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix(" kB")?.trim().parse().ok()
    };
    Some(field("RssAnon:")? + field("RssFile:")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedstat_begins_with_the_times_on_and_waiting_for_a_cpu() {
        let time = parse_schedstat("123456789 42 7\n").unwrap();
        assert_eq!((time.ran_ns, time.waited_ns), (123_456_789, 42));
        assert!(parse_schedstat("").is_none());
    }

    #[test]
    fn shared_memory_is_not_counted() {
        let status = "VmRSS:\t  9000 kB\nRssAnon:\t  1000 kB\nRssFile:\t  500 kB\nRssShmem:\t  7500 kB\n";
        assert_eq!(parse_own_memory(status), Some(1500));
    }

    #[test]
    fn this_process_uses_something() {
        let usage = Usage::Process(std::process::id());
        let before = usage.cpu_time().unwrap().ran_ns;
        while usage.cpu_time().unwrap().ran_ns == before {
            std::hint::spin_loop();
        }
        assert!(usage.own_memory_kib().unwrap() > 0);
        assert!(Usage::Thread(1).own_memory_kib().is_none());
    }
}

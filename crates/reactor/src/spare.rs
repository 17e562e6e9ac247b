//! CPUs for threads that help I/O threads: the kernel's that wait for storage, and this process's own.
//!
//! A thread inherits the CPUs of the one that starts it. That of an I/O thread is taken: a helper there waits for a
//! thread that never sleeps to be preempted. So helpers get what the process may use but the CPUs of I/O threads, those
//! included that are still to start: the kernel's helpers stay where they were put. Where that would leave none they get all
//! but the CPUs to which I/O threads are bound by then, and where that would leave none either, all.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::cpulist::CPUS_MAX;

/// By CPU, how many I/O threads there are.
struct Counts([AtomicU32; CPUS_MAX as usize]);

impl Counts {
    const fn new() -> Self {
        Self([const { AtomicU32::new(0) }; CPUS_MAX as usize])
    }

    fn has(&self, cpu: u32) -> bool {
        self.0[cpu as usize].load(Ordering::SeqCst) > 0
    }
}

/// Bound to each CPU.
static BOUND: Counts = Counts::new();
/// Bound to each CPU, or to be once they start.
static PLANNED: Counts = Counts::new();

/// A CPU is an I/O thread's for as long as this lives.
pub(crate) struct TakenCpu {
    cpu: u32,
    counts: &'static Counts,
}

impl TakenCpu {
    /// A thread is bound to it.
    pub(crate) fn bound(cpu: u32) -> Self {
        Self::new(cpu, &BOUND)
    }

    /// A thread will be if it starts.
    pub(crate) fn planned(cpu: u32) -> Self {
        Self::new(cpu, &PLANNED)
    }

    fn new(cpu: u32, counts: &'static Counts) -> Self {
        counts.0[cpu as usize].fetch_add(1, Ordering::SeqCst);
        Self { cpu, counts }
    }
}

impl Drop for TakenCpu {
    fn drop(&mut self) {
        self.counts.0[self.cpu as usize].fetch_sub(1, Ordering::SeqCst);
    }
}

impl fmt::Debug for TakenCpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("TakenCpu").field(&self.cpu).finish()
    }
}

/// The CPUs on which a thread that helps I/O threads may run now, ascending; none if they cannot be told. What the
/// process may use is what its first thread may.
#[must_use]
pub fn helper_cpus() -> Vec<u32> {
    let Ok(allowed) = sched_getaffinity(Some(rustix::process::getpid())) else { return Vec::new() };
    let allowed: Vec<u32> = (0..CPUS_MAX).filter(|&cpu| allowed.is_set(cpu as usize)).collect();
    left(&allowed, |cpu| PLANNED.has(cpu) || BOUND.has(cpu), |cpu| BOUND.has(cpu))
}

/// Moves the calling thread to the CPUs of helpers.
pub fn run_as_helper() {
    let mut mask = CpuSet::new();
    let cpus = helper_cpus();
    cpus.iter().for_each(|&cpu| mask.set(cpu as usize));
    if !cpus.is_empty()
        && let Err(error) = sched_setaffinity(None, &mask)
    {
        tracing::debug!(%error, ?cpus, "a helper runs where the thread that started it does");
    }
}

fn left(allowed: &[u32], planned: impl Fn(u32) -> bool, bound: impl Fn(u32) -> bool) -> Vec<u32> {
    let without = |taken: &dyn Fn(u32) -> bool| -> Vec<u32> {
        allowed.iter().copied().filter(|&cpu| !taken(cpu)).collect()
    };
    let choices = [without(&planned), without(&bound)];
    choices.into_iter().find(|left| !left.is_empty()).unwrap_or_else(|| allowed.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn helpers_stay_off_the_cpus_of_io_threads_while_others_are_left() {
        assert_eq!(left(&[0, 2, 3], |cpu| cpu >= 2, |cpu| cpu == 2), [0], "also off those to come");
        assert_eq!(left(&[0, 2, 3], |_| true, |cpu| cpu == 2), [0, 3], "at least off those that there are");
        assert_eq!(left(&[0, 1], |_| true, |_| true), [0, 1]);
        assert_eq!(left(&[], |_| true, |_| true), [0; 0]);
    }

    #[test]
    fn a_cpu_is_free_again_when_no_thread_is_bound_to_it_or_planned_there() {
        let all = helper_cpus();
        let &[cpu, _, ..] = all.as_slice() else { return };
        let (first, second) = (TakenCpu::bound(cpu), TakenCpu::planned(cpu));
        drop(first);
        assert_eq!(helper_cpus(), all[1..]);
        drop(second);
        assert_eq!(helper_cpus(), all);
    }
}

//! CPUs for threads that help I/O threads: the kernel's that wait for storage, and this process's own.
//!
//! A thread inherits the CPUs of the one that starts it. That of an I/O thread is taken: a helper there waits for a
//! thread that never sleeps to be preempted. So helpers get what the process may use but the CPUs to which I/O threads
//! are bound, or all of it where that would leave none.

use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::cpulist::CPUS_MAX;

/// How many I/O threads are bound to each CPU.
static BOUND: [AtomicU32; CPUS_MAX as usize] = [const { AtomicU32::new(0) }; CPUS_MAX as usize];

/// An I/O thread is bound to a CPU.
pub(crate) struct BoundCpu(u32);

impl BoundCpu {
    pub(crate) fn new(cpu: u32) -> Self {
        BOUND[cpu as usize].fetch_add(1, Ordering::SeqCst);
        Self(cpu)
    }
}

impl Drop for BoundCpu {
    fn drop(&mut self) {
        BOUND[self.0 as usize].fetch_sub(1, Ordering::SeqCst);
    }
}

/// The CPUs on which a thread that helps I/O threads may run now, ascending; none if they cannot be told. What the
/// process may use is what its first thread may.
#[must_use]
pub fn helper_cpus() -> Vec<u32> {
    let Ok(allowed) = sched_getaffinity(Some(rustix::process::getpid())) else { return Vec::new() };
    let allowed: Vec<u32> = (0..CPUS_MAX).filter(|&cpu| allowed.is_set(cpu as usize)).collect();
    left(&allowed, |cpu| BOUND[cpu as usize].load(Ordering::SeqCst) > 0)
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

fn left(allowed: &[u32], taken: impl Fn(u32) -> bool) -> Vec<u32> {
    let left: Vec<u32> = allowed.iter().copied().filter(|&cpu| !taken(cpu)).collect();
    if left.is_empty() { allowed.to_vec() } else { left }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn helpers_stay_off_the_cpus_of_io_threads_while_others_are_left() {
        assert_eq!(left(&[0, 2, 3], |cpu| cpu == 2), [0, 3]);
        assert_eq!(left(&[0, 1], |_| true), [0, 1]);
        assert_eq!(left(&[], |_| true), [0; 0]);
    }

    #[test]
    fn a_cpu_is_free_again_when_the_last_thread_that_is_bound_to_it_ends() {
        let all = helper_cpus();
        let &[cpu, _, ..] = all.as_slice() else { return };
        let (first, second) = (BoundCpu::new(cpu), BoundCpu::new(cpu));
        drop(first);
        assert_eq!(helper_cpus(), all[1..]);
        drop(second);
        assert_eq!(helper_cpus(), all);
    }
}

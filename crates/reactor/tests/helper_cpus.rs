//! Helpers are kept off the CPUs of I/O threads that have not started yet.
#![allow(clippy::unwrap_used, reason = "tests")]

use reactor::placement::Wish;
use reactor::{CpuList, Machine, Mode, Options, Pool, helper_cpus};

fn pool_on(cpu: u32, pin: bool) -> Pool {
    let cpus: CpuList = cpu.to_string().parse().unwrap();
    Pool::start(Options { wish: Wish { cpus: Some(cpus), ..Wish::default() }, pin, ..Options::default() })
        .unwrap()
}

#[test]
fn a_thread_that_starts_later_finds_no_helper_on_its_cpu() {
    let all: Vec<u32> = Machine::read().allowed.iter().map(|cpu| cpu.id).collect();
    let &[first, .., last] = all.as_slice() else {
        needs::skip("one CPU only");
        return;
    };
    assert_eq!(helper_cpus(), all);
    let pool = pool_on(first, true);
    assert_eq!(helper_cpus(), all[1..], "before its thread starts");
    drop(pool.place("queue", Mode::Hybrid).unwrap());
    assert_eq!(helper_cpus(), all[1..]);
    let free = pool_on(last, false);
    assert_eq!(helper_cpus(), all[1..], "its threads are bound nowhere");
    drop((pool, free));
    assert_eq!(helper_cpus(), all);
}

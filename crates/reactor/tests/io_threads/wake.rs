//! A thread that sleeps wakes up for everything it should.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use reactor::{Mode, Work};
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::fake::{Call, Queue, Script, pool, wait_until};

/// Each round is one chance to fall asleep between the last look at the queue and the kick.
const ROUNDS: u64 = 100_000;
/// Rounds that wait for the hybrid window to run out take as long as the window.
const EDGE_ROUNDS: u64 = 10_000;

#[test]
fn no_kick_is_lost_by_a_thread_that_sleeps_whenever_it_can() {
    let (pool, queue) = (pool(), Queue::new());
    let handle = queue.serve(&pool, Mode::Notify);
    for round in 1..=ROUNDS {
        queue.submit();
        queue.wait_served(round);
    }
    assert_eq!(handle.stats().done, ROUNDS);
    handle.remove().unwrap();
}

#[test]
fn no_kick_is_lost_at_the_end_of_the_hybrid_window() {
    let (pool, queue) = (pool(), Queue::new());
    let handle = queue.serve(&pool, Mode::Hybrid);
    for round in 1..=EDGE_ROUNDS {
        let served = Instant::now();
        let edge = Duration::from_nanos(handle.stats().window_ns + (round * 37 % 2000));
        while served.elapsed() < edge {
            std::hint::spin_loop();
        }
        queue.submit();
        queue.wait_served(round);
    }
    assert!(handle.stats().arms > 0, "some of the rounds were at the edge");
    handle.remove().unwrap();
}

#[test]
fn no_in_band_kick_is_lost() {
    let (pool, queue) = (pool(), Queue::new());
    let handle = queue.serve(&pool, Mode::Notify);
    for round in 1..=ROUNDS {
        queue.offer(1);
        handle.wake();
        queue.wait_served(round);
    }
    handle.remove().unwrap();
}

#[test]
fn kicks_from_two_sides_at_once_are_all_served() {
    let (pool, queue) = (pool(), Queue::new());
    let handle = queue.serve(&pool, Mode::Notify);
    std::thread::scope(|scope| {
        scope.spawn(|| (0..ROUNDS).for_each(|_| queue.submit()));
        scope.spawn(|| {
            for _ in 0..ROUNDS {
                queue.offer(1);
                handle.wake();
            }
        });
    });
    queue.wait_served(2 * ROUNDS);
    handle.remove().unwrap();
}

#[test]
fn a_deadline_ends_the_sleep() {
    const STEPS: u64 = 5;
    let pool = pool();
    let polls = Arc::new(AtomicU64::new(0));
    let script = {
        let polls = polls.clone();
        let mut due = None;
        move |call| {
            let Call::Poll(now) = call else { return Work::NONE };
            if *due.get_or_insert(now) <= now {
                polls.fetch_add(1, Ordering::AcqRel);
                due = Some(now.plus_ns(2_000_000));
            }
            let wake_at = due.filter(|_| polls.load(Ordering::Acquire) < STEPS);
            Work { wake_at, ..Work::NONE }
        }
    };
    let seat = pool.place("timer", Mode::Notify).unwrap();
    let handle = seat.add("timer", move || Box::new(Script(script))).unwrap();
    wait_until("every deadline passed", || polls.load(Ordering::Acquire) == STEPS);
    assert!(pool.report()[0].stats.wakes_by_timer > 0);
    handle.remove().unwrap();
}

#[test]
fn a_thread_with_nothing_to_do_sleeps_in_every_mode_but_poll() {
    for mode in [Mode::Notify, Mode::Hybrid] {
        let (pool, queue) = (pool(), Queue::new());
        let _handle = queue.serve(&pool, mode);
        wait_until("it sleeps", || pool.report()[0].stats.sleeps > 0);
    }
    let (pool, queue) = (pool(), Queue::new());
    let handle = queue.serve(&pool, Mode::Poll);
    let sleeps = pool.report()[0].stats.sleeps;
    wait_until("it polls", || handle.stats().empty_polls > 10_000);
    assert_eq!(pool.report()[0].stats.sleeps, sleeps);
    assert_eq!(handle.stats().arms, 0);
}

#[test]
fn a_change_of_mode_takes_effect_while_it_runs() {
    let (pool, queue) = (pool(), Queue::new());
    let handle = queue.serve(&pool, Mode::Poll);
    let sleeps = pool.report()[0].stats.sleeps;
    assert_eq!(handle.set_mode(Mode::Notify), Mode::Notify);
    wait_until("it sleeps", || pool.report()[0].stats.sleeps > sleeps);
    assert_eq!(handle.set_mode(Mode::Poll), Mode::Poll);
    let polls = handle.stats().empty_polls;
    wait_until("it polls again", || handle.stats().empty_polls > polls + 10_000);
}

/// Driver and I/O thread on one CPU: the driver runs when the thread sleeps, so there is nothing for polling to catch.
#[test]
fn a_hybrid_thread_hardly_polls_in_vain_for_a_driver_on_its_own_cpu() {
    const REQUESTS: u64 = 2_000;
    let (pool, queue) = (pool(), Queue::new());
    let handle = queue.serve(&pool, Mode::Hybrid);
    let cpu = handle.cpu();
    let driver = queue.clone();
    let run = move || {
        let mut set = CpuSet::new();
        set.set(cpu as usize);
        sched_setaffinity(None, &set).unwrap();
        for request in 1..=REQUESTS {
            driver.submit();
            driver.wait_served(request);
        }
    };
    std::thread::spawn(run).join().unwrap();
    let stats = handle.stats();
    assert!(stats.vain_windows * 10 < stats.done, "{stats:?}");
    handle.remove().unwrap();
}

//! Pollers come and go while their neighbours run.

use std::sync::atomic::Ordering;

use reactor::{BUDGET_DEFAULT, Error, Machine, Mode, Options, Poller, PollerState, Pool};

use crate::fake::{Queue, Server, pool, wait_until};

#[test]
fn remove_returns_after_requests_in_flight_are_done_and_the_poller_is_dropped() {
    for mode in [Mode::Notify, Mode::Hybrid, Mode::Poll] {
        let (pool, queue) = (pool(), Queue::new());
        queue.in_flight.store(true, Ordering::Release);
        let handle = queue.serve(&pool, mode);
        let remover = std::thread::spawn(move || handle.remove());
        wait_until("it drains", || queue.drains.load(Ordering::Acquire) >= 3);
        assert!(!queue.dropped.load(Ordering::Acquire) && !remover.is_finished());
        queue.in_flight.store(false, Ordering::Release);
        remover.join().unwrap().unwrap();
        assert!(queue.dropped.load(Ordering::Acquire));
        assert!(pool.report()[0].pollers.is_empty());
    }
}

#[test]
fn a_poller_that_drains_takes_no_new_requests_and_does_not_hold_up_the_others() {
    let (pool, slow, other) = (pool(), Queue::new(), Queue::new());
    slow.in_flight.store(true, Ordering::Release);
    let (leaving, staying) = (slow.serve(&pool, Mode::Hybrid), other.serve(&pool, Mode::Hybrid));
    let remover = std::thread::spawn(move || leaving.remove());
    wait_until("it drains", || slow.drains.load(Ordering::Acquire) > 0);
    slow.submit();
    for round in 1..=1000 {
        other.submit();
        other.wait_served(round);
    }
    assert_eq!(slow.served(), 0);
    slow.in_flight.store(false, Ordering::Release);
    remover.join().unwrap().unwrap();
    assert_eq!(staying.state(), PollerState::Serving);
}

#[test]
fn dropping_the_handle_removes_the_poller_too() {
    let (pool, queue) = (pool(), Queue::new());
    drop(queue.serve(&pool, Mode::Hybrid));
    assert!(queue.dropped.load(Ordering::Acquire));
    assert_eq!(queue.drains.load(Ordering::Acquire), 1);
}

#[test]
fn a_removed_pollers_descriptor_wakes_nobody() {
    let (pool, gone, here) = (pool(), Queue::new(), Queue::new());
    let staying = here.serve(&pool, Mode::Notify);
    gone.serve(&pool, Mode::Notify).remove().unwrap();
    let stats = || pool.report()[0].stats;
    // Until the thread has slept twice since, an edge from before the removal may still be pending.
    let sleeps = stats().sleeps;
    wait_until("it sleeps", || {
        staying.wake();
        stats().sleeps > sleeps + 1
    });
    let before = stats();
    gone.kick();
    wait_until("it slept again", || {
        staying.wake();
        stats().sleeps > before.sleeps + 1
    });
    assert_eq!(stats().wakes_by_fd, before.wakes_by_fd);
}

#[test]
fn stopping_the_pool_drains_and_drops_every_poller() {
    let (pool, queues) = (pool(), [Queue::new(), Queue::new()]);
    let handles = queues.each_ref().map(|queue| queue.serve(&pool, Mode::Hybrid));
    pool.stop().unwrap();
    for queue in &queues {
        assert!(queue.dropped.load(Ordering::Acquire));
        assert!(queue.drains.load(Ordering::Acquire) > 0);
    }
    assert!(handles.iter().all(|handle| handle.state() == PollerState::Removed));
    for handle in handles {
        handle.wake();
        handle.remove().unwrap();
    }
    assert!(matches!(pool.place("late", Mode::Hybrid), Err(Error::Stopped { .. })));
    pool.stop().unwrap();
}

#[test]
fn a_seat_taken_before_the_stop_is_of_no_use_after_it() {
    let (pool, queue) = (pool(), Queue::new());
    let seat = pool.place("queue", Mode::Hybrid).unwrap();
    pool.stop().unwrap();
    let late = queue.clone();
    let error = seat.add("late", move || Box::new(Server(late))).unwrap_err();
    assert_eq!(error.to_string(), "I/O thread `io-0` has stopped");
}

#[test]
fn pollers_may_come_and_go_while_the_pool_stops() {
    for _ in 0..200 {
        let pool = pool();
        let seats: Vec<_> = (0..4).map(|_| pool.place("queue", Mode::Hybrid).unwrap()).collect();
        std::thread::scope(|scope| {
            for seat in seats {
                let queue = Queue::new();
                scope.spawn(move || match seat.add("queue", move || Box::new(Server(queue))) {
                    Ok(handle) => handle.remove().unwrap(),
                    Err(error) => assert!(matches!(error, Error::Stopped { .. }), "{error}"),
                });
            }
            pool.stop().unwrap();
        });
    }
}

#[test]
fn two_queues_with_endless_backlog_share_the_thread_evenly() {
    let (pool, queues) = (pool(), [Queue::new(), Queue::new()]);
    let handles = queues.each_ref().map(|queue| {
        queue.offer(u64::MAX / 2);
        queue.serve(&pool, Mode::Hybrid)
    });
    let quota = u64::from(BUDGET_DEFAULT.requests);
    // In this order: what both gain between the two readings counts for the second queue.
    let second = queues[1].served();
    let first = queues[0].served();
    wait_until("both got far", || {
        queues[0].served() > first + 100 * quota && queues[1].served() > second + 100 * quota
    });
    let full: Vec<_> = handles.iter().map(|handle| handle.stats().full_polls).collect();
    assert!(full.iter().all(|&full| full > 0), "{full:?}");
    pool.stop().unwrap();
    assert!(queues[0].served() - first <= queues[1].served() - second + 2 * quota);
}

#[test]
fn every_thread_of_a_pool_serves_its_own_queue() {
    let pool = reactor::Pool::start(reactor::Options::default()).unwrap();
    let queues: Vec<_> = pool.cpus().iter().map(|_| Queue::new()).collect();
    let handles: Vec<_> = queues
        .iter()
        .enumerate()
        .map(|(index, queue)| {
            let queue = queue.clone();
            let seat = pool.place(&format!("disk0/{index}"), Mode::Hybrid).unwrap();
            seat.add(format!("disk0/{index}"), move || Box::new(Server(queue))).unwrap()
        })
        .collect();
    for queue in &queues {
        queue.submit();
        queue.wait_served(1);
    }
    let mut names: Vec<_> = handles.iter().map(|handle| handle.thread_name()).collect();
    names.dedup();
    assert_eq!(names.len(), queues.len());
    assert!(pool.report().iter().all(|thread| thread.pollers.len() == 1));
}

#[test]
fn a_thread_that_is_not_to_be_pinned_may_run_wherever_its_process_may() {
    let allowed = |pin| {
        let (tell, told) = std::sync::mpsc::channel();
        let queue = Queue::new();
        let pool = Pool::start(Options { pin, ..Options::default() }).unwrap();
        let look = move || -> Box<dyn Poller> {
            tell.send(Machine::read().allowed).unwrap();
            Box::new(Server(queue))
        };
        let handle = pool.place("queue", Mode::Notify).unwrap().add("queue", look).unwrap();
        let (allowed, cpu) = (told.recv().unwrap(), handle.cpu());
        (allowed, cpu)
    };
    let (free, _) = allowed(false);
    assert_eq!(free, Machine::read().allowed);
    let (pinned, cpu) = allowed(true);
    assert_eq!(pinned.iter().map(|cpu| cpu.id).collect::<Vec<_>>(), [cpu]);
}

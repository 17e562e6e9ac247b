//! One poller's misfortune is not its neighbours'.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use reactor::{Budget, Error, Mode, Poller, PollerState, Pool, Ticks, WatchError, Work};

use crate::fake::{Call, Queue, Script, pool, wait_until};

#[track_caller]
fn still_serves(queue: &Arc<Queue>) {
    let served = queue.served();
    queue.submit();
    queue.wait_served(served + 1);
}

#[test]
fn a_panic_in_any_call_removes_only_the_poller_that_panicked() {
    for panics_in in [
        |call| matches!(call, Call::Poll(_)),
        |call| call == Call::Arm,
        |call| matches!(call, Call::Poll(_) | Call::Drain),
        |call| matches!(call, Call::Poll(_) | Call::Drain | Call::Drop),
    ] as [fn(Call) -> bool; 4]
    {
        let (pool, neighbour) = (pool(), Queue::new());
        let _other = neighbour.serve(&pool, Mode::Hybrid);
        let dropped = Arc::new(AtomicBool::new(false));
        let script = {
            let dropped = dropped.clone();
            move |call| {
                dropped.fetch_or(call == Call::Drop, Ordering::AcqRel);
                assert!(!panics_in(call), "on purpose");
                Work::NONE
            }
        };
        let seat = pool.place("rogue", Mode::Hybrid).unwrap();
        let handle = seat.add("rogue", move || Box::new(Script(script))).unwrap();
        wait_until("it was dropped", || dropped.load(Ordering::Acquire));
        assert_eq!(handle.state(), PollerState::Failed);
        handle.remove().unwrap();
        still_serves(&neighbour);
    }
}

#[test]
fn a_panic_while_draining_or_dropping_does_not_keep_anybody_waiting() {
    for panics_in in [Call::Drain, Call::Drop] {
        let (pool, neighbour) = (pool(), Queue::new());
        let _other = neighbour.serve(&pool, Mode::Hybrid);
        let script = move |call| {
            assert!(call != panics_in, "on purpose");
            Work::NONE
        };
        let seat = pool.place("rogue", Mode::Hybrid).unwrap();
        seat.add("rogue", move || Box::new(Script(script))).unwrap().remove().unwrap();
        still_serves(&neighbour);
    }
}

/// What still works on its memory must have ended before it is dropped.
#[test]
fn a_poller_that_panics_while_draining_is_abandoned_before_it_is_dropped() {
    for panics_twice in [false, true] {
        let (pool, calls) = (pool(), Arc::new(Mutex::new(Vec::new())));
        let script = {
            let calls = calls.clone();
            move |call| {
                let mut calls = calls.lock().unwrap();
                if matches!(call, Call::Drain | Call::Abandon | Call::Drop) {
                    calls.push(call);
                }
                let waits = call == Call::Abandon && calls.len() < 4;
                drop(calls);
                assert!(call != Call::Drain && !(panics_twice && call == Call::Abandon), "on purpose");
                Work { done: waits.into(), ..Work::NONE }
            }
        };
        let seat = pool.place("rogue", Mode::Notify).unwrap();
        seat.add("rogue", move || Box::new(Script(script))).unwrap().remove().unwrap();
        let expected: &[Call] = match panics_twice {
            false => &[Call::Drain, Call::Abandon, Call::Abandon, Call::Abandon, Call::Drop],
            true => &[Call::Drain, Call::Abandon, Call::Drop],
        };
        assert_eq!(*calls.lock().unwrap(), expected);
    }
}

/// A panic takes with it what was in flight: a drain would wait for it for ever.
#[test]
fn a_poller_that_lost_what_it_had_in_flight_is_removed_and_its_place_taken_anew() {
    let (pool, neighbour) = (pool(), Queue::new());
    let _other = neighbour.serve(&pool, Mode::Hybrid);
    for _ in 0..2 {
        let script = |call| {
            assert!(!matches!(call, Call::Poll(_)), "on purpose");
            let never_drained = u32::from(call == Call::Drain);
            Work { done: never_drained, ..Work::NONE }
        };
        let seat = pool.place("rogue", Mode::Hybrid).unwrap();
        let handle = seat.add("rogue", move || Box::new(Script(script))).unwrap();
        // Told to go before its first poll, it would drain as one that never panicked.
        wait_until("it panicked", || handle.state() == PollerState::Failed);
        handle.remove().unwrap();
        still_serves(&neighbour);
    }
}

#[test]
fn a_panic_while_building_is_the_callers_error() {
    let (pool, neighbour) = (pool(), Queue::new());
    let _other = neighbour.serve(&pool, Mode::Hybrid);
    let seat = pool.place("rogue", Mode::Hybrid).unwrap();
    let error = seat.add("rogue", || panic!("on purpose")).unwrap_err();
    assert_eq!(error.to_string(), "`rogue` panicked while it was built on I/O thread `io-0`");
    still_serves(&neighbour);
}

/// A poller whose wake descriptor somebody else chose.
struct Watched(RawFd);

impl Poller for Watched {
    fn poll(&mut self, _now: Ticks, _budget: Budget) -> Work {
        Work::NONE
    }

    fn arm(&mut self) -> bool {
        false
    }

    fn disarm(&mut self) {}

    fn wake_fds(&self) -> Vec<RawFd> {
        vec![self.0, self.0]
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

fn watch(pool: &Pool, fd: RawFd) -> Result<(), Error> {
    pool.place("watched", Mode::Notify)?.add("watched", move || Box::new(Watched(fd)))?.remove()
}

#[test]
fn a_descriptor_that_cannot_wake_the_thread_is_the_callers_error() {
    let (pool, neighbour) = (pool(), Queue::new());
    let _other = neighbour.serve(&pool, Mode::Notify);
    let regular = std::fs::File::open("/proc/self/exe").unwrap();
    let refused = |fd| match watch(&pool, fd) {
        Err(Error::Watch { source, .. }) => source,
        other => panic!("{other:?}"),
    };
    assert!(matches!(refused(regular.as_raw_fd()), WatchError::Kind { .. }));
    assert!(matches!(refused(i32::MAX), WatchError::Duplicate { .. }));
    assert!(matches!(refused(-1), WatchError::Duplicate { .. }));
    let (socket, peer) = std::os::unix::net::UnixStream::pair().unwrap();
    drop(peer);
    watch(&pool, socket.as_raw_fd()).unwrap();
    still_serves(&neighbour);
}

#[test]
fn an_io_thread_is_never_made_to_wait_for_one() {
    let (pool, victim, neighbour) = (Arc::new(pool()), Queue::new(), Queue::new());
    let _other = neighbour.serve(&pool, Mode::Hybrid);
    let refused = Arc::new(AtomicBool::new(false));
    let mut prey = Some(victim.serve(&pool, Mode::Hybrid));
    let script = {
        let (pool, refused) = (pool.clone(), refused.clone());
        move |_| {
            if let Some(prey) = prey.take() {
                let seat = pool.place("nested", Mode::Hybrid).unwrap();
                let added = seat.add("nested", || unreachable!());
                let removed = prey.remove();
                let both = matches!(
                    (added, removed),
                    (Err(Error::OnIoThread { .. }), Err(Error::OnIoThread { .. }))
                );
                refused.store(both, Ordering::Release);
            }
            Work::NONE
        }
    };
    let seat = pool.place("hunter", Mode::Hybrid).unwrap();
    let hunter = seat.add("hunter", move || Box::new(Script(script))).unwrap();
    wait_until("the victim is gone", || victim.dropped.load(Ordering::Acquire));
    assert!(refused.load(Ordering::Acquire));
    hunter.remove().unwrap();
    still_serves(&neighbour);
}

//! From nothing to answers, and back.

use std::sync::atomic::Ordering;

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use virtio::RingFormat;
use vmm_sys_util::eventfd::EventFd;

use crate::guest::Driver;
use crate::host::{Host, Vm, eventually, wait_readable};

#[test]
fn split_rings_carry_data() {
    let host = Host::new(2);
    let mut vm = Vm::new(&host, RingFormat::Split, 2);
    for i in 0..300u32 {
        vm.echo((i % 2) as usize, format!("request {i}").as_bytes());
    }
    let status = host.handle.status();
    assert_eq!(status.features, vm.features);
    assert_eq!(status.queues.len(), 2);
    for queue in status.queues {
        assert!(queue.started && queue.enabled && !queue.failed);
        assert_eq!(queue.counters.unwrap().requests, 150);
    }
}

#[test]
fn packed_rings_carry_data() {
    let host = Host::new(1);
    let mut vm = Vm::new(&host, RingFormat::Packed, 1);
    for i in 0..300u32 {
        vm.echo(0, format!("request {i}").as_bytes());
    }
}

#[test]
fn a_ring_goes_on_where_it_was_stopped() {
    for (format, expected) in [(RingFormat::Split, 100), (RingFormat::Packed, 0)] {
        let host = Host::new(1);
        let mut vm = Vm::new(&host, format, 1);
        for i in 0..100u32 {
            vm.echo(0, &i.to_le_bytes());
        }
        let base = vm.frontend.get_vring_base(0).unwrap();
        if format == RingFormat::Split {
            assert_eq!(base, expected);
        } else {
            // 100 chains of 2 descriptors in a ring of 64: 3 laps and 8.
            assert_eq!(base, 0x0008_0008);
        }
        assert!(!host.handle.status().queues[0].started);
        // Without a base: where it was.
        vm.frontend.set_vring_kick(0, &vm.lines[0].kick).unwrap();
        for i in 0..100u32 {
            vm.echo(0, &i.to_le_bytes());
        }
    }
}

/// What a panic has lost is never answered. That concerns the queue, and ends with the ring.
#[test]
fn a_device_whose_code_panicked_serves_whoever_begins_anew() {
    let connect_anew = |host: &Host, vm: Vm| {
        drop(vm);
        eventually("the session ends", || host.handle.status().peer.is_none());
        Vm::new(host, RingFormat::Split, 2)
    };
    let begin_anew = |mut vm: Vm| {
        vm.lines.clear();
        for index in 0..2 {
            let driver = Driver::new(&mut vm.guest, RingFormat::Split, 64, true);
            vm.add(index, driver, 0);
        }
        vm
    };
    for way in ["connection", "reset", "rings"] {
        let mut host = Host::new(2);
        let mut vm = Vm::new(&host, RingFormat::Split, 2);
        (0..2).for_each(|index| vm.echo(index, b"before"));
        host.device.switches.panic.store(true, Ordering::SeqCst);
        vm.offer(0, b"fatal");
        eventually("the queue fails", || host.handle.status().queues[0].failed);
        vm.echo(1, b"the other one is served");
        let mut vm = match way {
            "connection" => connect_anew(&host, vm),
            "reset" => {
                vm.frontend.reset_device().unwrap();
                begin_anew(vm)
            }
            _ => {
                (0..2).for_each(|index| assert!(vm.frontend.get_vring_base(index).is_ok()));
                begin_anew(vm)
            }
        };
        for i in 0..100u32 {
            (0..2).for_each(|index| vm.echo(index, &i.to_le_bytes()));
        }
        assert!(!host.handle.status().queues[0].failed, "{way}");
        drop(vm);
        host.stop();
    }
}

#[test]
fn a_new_call_descriptor_gets_what_is_due_from_then_on_and_the_old_one_nothing() {
    for format in [RingFormat::Split, RingFormat::Packed] {
        let host = Host::new(1);
        let mut vm = Vm::new(&host, format, 1);
        vm.echo(0, b"before");
        let _ = vm.lines[0].call.read();
        host.device.switches.hold.store(true, Ordering::SeqCst);
        let taken = host.device.switches.taken.load(Ordering::SeqCst);
        let at = vm.offer(0, b"under way");
        eventually("it is taken", || host.device.switches.taken.load(Ordering::SeqCst) > taken);
        let new = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
        vm.frontend.set_vring_call(0, &new).unwrap();
        assert_eq!(new.read().unwrap(), 1, "a call may have been missed");
        let line = &mut vm.lines[0];
        assert!(!line.driver.ring.arm_calls(), "no answer yet");
        host.device.switches.hold.store(false, Ordering::SeqCst);
        line.kick.write(1).unwrap();
        wait_readable(&new);
        assert_eq!(new.read().unwrap(), 1);
        assert!(line.driver.ring.reap().unwrap().is_some());
        assert_eq!(vm.guest.read(at, 9), b"under way");
        assert!(new.read().is_err() && vm.lines[0].call.read().is_err(), "nothing else was due");
    }
}

/// Another host may have the storage next, and must find everything there.
#[test]
fn a_device_is_told_of_each_end_of_service_after_it() {
    for stop in [false, true] {
        let mut host = Host::new(2);
        let mut vm = Vm::new(&host, RingFormat::Split, 2);
        let settled = |host: &Host| host.device.settled.lock().unwrap().clone();
        (0..2).for_each(|index| vm.echo(index, b"served"));
        assert!(settled(&host).is_empty());
        vm.frontend.get_vring_base(0).unwrap();
        assert_eq!(settled(&host), [1], "before the answer, with the other queue in service");
        vm.frontend.get_vring_base(0).unwrap();
        assert_eq!(settled(&host), [1], "it was stopped already");
        if stop {
            host.stop();
            assert_eq!(settled(&host), [1, 0]);
        } else {
            drop(vm);
            eventually("the end of the session", || settled(&host) == [1, 0]);
        }
    }
}

#[test]
fn a_disabled_ring_is_not_served_and_loses_nothing() {
    let host = Host::new(1);
    let mut vm = Vm::new(&host, RingFormat::Split, 1);
    vm.frontend.set_vring_enable(0, false).unwrap();
    let taken = host.device.switches.taken.load(Ordering::SeqCst);
    let at = vm.offer(0, b"waiting");
    vm.lines[0].kick.write(1).unwrap();
    // Answered by the control thread, so the message before has been carried out.
    assert_eq!(vm.frontend.get_queue_num().unwrap(), 1);
    assert_eq!(host.device.switches.taken.load(Ordering::SeqCst), taken);
    vm.frontend.set_vring_enable(0, true).unwrap();
    vm.wait(0, 1);
    assert_eq!(vm.guest.read(at, 7), b"waiting");
}

#[test]
fn a_front_end_that_has_gone_makes_room_for_the_next() {
    let host = Host::new(1);
    for round in 1..=3 {
        let mut vm = Vm::new(&host, RingFormat::Split, 1);
        vm.echo(0, b"hello");
        // It may come back at once, without being taken for a second one.
        assert_eq!(host.handle.status().sessions, round);
    }
    eventually("the session ends", || host.handle.status().peer.is_none());
    assert_eq!(host.handle.status().last_error, None);
    assert_eq!(host.handle.status().refused, 0);
}

#[test]
fn requests_that_waited_while_the_front_end_was_away_are_answered() {
    let host = Host::new(1);
    let mut vm = Vm::new(&host, RingFormat::Split, 1);
    for _ in 0..5 {
        vm.echo(0, b"before");
    }
    let Vm { frontend, guest, mut lines, .. } = vm;
    drop(frontend);
    eventually("the session ends", || host.handle.status().peer.is_none());
    // The guest lives on, and so does its ring.
    let mut again = Vm::negotiated(&host, RingFormat::Split);
    again.guest = guest;
    let driver = lines.pop().unwrap().driver;
    again.frontend.set_mem_table(&again.guest.table()).unwrap();
    let mut driver: Driver = driver;
    let at = driver.offer(&mut again.guest, b"while away");
    again.add(0, driver, 5);
    again.wait(0, 1);
    assert_eq!(again.guest.read(at, 10), b"while away");
}

#[test]
fn shutdown_completes_what_is_in_flight() {
    let mut host = Host::new(1);
    let mut vm = Vm::new(&host, RingFormat::Split, 1);
    host.device.switches.hold.store(true, Ordering::SeqCst);
    let at = vm.offer(0, b"held");
    eventually("the request is taken", || host.device.switches.taken.load(Ordering::SeqCst) == 1);
    host.stop();
    vm.wait(0, 1);
    assert_eq!(vm.guest.read(at, 4), b"held");
    assert!(!host.path.exists());
}

#[test]
fn what_needs_a_device_without_front_end_is_done_only_then() {
    let host = Host::new(1);
    assert_eq!(host.handle.unless_connected(|| 7), Some(7));
    let mut vm = Vm::new(&host, RingFormat::Split, 1);
    assert!(host.handle.status().connected);
    assert_eq!(host.handle.unless_connected(|| 7), None);
    // It has the device whether or not a ring runs.
    vm.frontend.reset_device().unwrap();
    assert_eq!(host.handle.unless_connected(|| 7), None);
    drop(vm);
    eventually("the session ends", || host.handle.unless_connected(|| 7).is_some());
    // One that connects while it is done has to wait.
    let begun = host.handle.unless_connected(|| {
        let frontend = host.frontend();
        let sessions = host.handle.clone();
        (frontend, sessions)
    });
    let (frontend, handle) = begun.unwrap();
    frontend.set_owner().unwrap();
    eventually("it is served", || handle.status().connected);
}

//! The lease on guest memory: one service at a time works on it, and what a killed one has left is waited for.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use vhost::VhostBackend;
use vhost::vhost_user::message::VhostUserInflight;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use virtio::RingFormat;

use crate::guest::Driver;
use crate::host::{Host, Vm, eventually};

/// Another open file of the same record, as another service has it.
fn reopen(record: &File) -> OwnedFd {
    File::open(format!("/proc/self/fd/{}", record.as_raw_fd())).unwrap().into()
}

fn is_leased(record: &File) -> bool {
    flock(reopen(record), FlockOperation::NonBlockingLockExclusive).is_err()
}

fn record(frontend: &mut Frontend) -> (VhostUserInflight, File) {
    frontend.get_inflight_fd(&VhostUserInflight::new(0, 0, 1, 64)).unwrap()
}

#[test]
fn a_session_has_the_lease_and_its_queues_know_it() {
    let host = Host::new(1);
    let mut vm = Vm::negotiated(&host, RingFormat::Split);
    vm.frontend.set_mem_table(&vm.guest.table()).unwrap();
    let (info, file) = record(&mut vm.frontend);
    assert!(!is_leased(&file), "nobody needs it yet");
    vm.frontend.set_inflight_fd(&info, file.as_raw_fd()).unwrap();
    assert!(is_leased(&file));
    let driver = Driver::new(&mut vm.guest, RingFormat::Split, 64, true);
    vm.add(0, driver, 0);
    vm.echo(0, b"leased");
    assert_eq!(host.device.switches.leased.load(Ordering::SeqCst), 1);
    // The front end's own open file is not the one that has the lock.
    flock(&file, FlockOperation::Unlock).unwrap();
    assert!(is_leased(&file));

    // The same once more, as front ends do whenever the device starts, and then another.
    vm.frontend.set_inflight_fd(&info, file.as_raw_fd()).unwrap();
    vm.echo(0, b"still leased");
    let (other_info, other) = record(&mut vm.frontend);
    vm.frontend.get_vring_base(0).unwrap();
    vm.frontend.set_inflight_fd(&other_info, other.as_raw_fd()).unwrap();
    assert!(is_leased(&other) && !is_leased(&file));

    drop(vm);
    eventually("the session ends", || host.handle.status().peer.is_none());
    assert!(!is_leased(&other), "given back in an orderly end");
}

#[test]
fn a_session_waits_for_what_a_predecessor_has_left() {
    let host = Host::new(1);
    let mut vm = Vm::negotiated(&host, RingFormat::Split);
    let (info, file) = record(&mut vm.frontend);
    let left = reopen(&file);
    flock(&left, FlockOperation::NonBlockingLockExclusive).unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Long enough that a session which does not wait is seen.
            std::thread::sleep(Duration::from_millis(300));
            over.store(true, Ordering::SeqCst);
            drop(left);
        });
        vm.frontend.set_inflight_fd(&info, file.as_raw_fd()).unwrap();
        assert!(over.load(Ordering::SeqCst), "it did not wait");
    });
    assert!(is_leased(&file));
}

#[test]
fn a_front_end_that_keeps_the_lock_loses_its_connection() {
    let host = Host::new(1);
    let mut vm = Vm::negotiated(&host, RingFormat::Split);
    let (info, file) = record(&mut vm.frontend);
    flock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
    vm.frontend.set_inflight_fd(&info, file.as_raw_fd()).expect_err("refused");
    eventually("the session ends", || host.handle.status().peer.is_none());
    let reason = host.handle.status().last_error.unwrap();
    assert!(reason.contains("it is locked"), "{reason}");
    flock(&file, FlockOperation::Unlock).unwrap();
    let mut vm = Vm::negotiated(&host, RingFormat::Split);
    vm.frontend.set_inflight_fd(&info, file.as_raw_fd()).unwrap();
}

#[test]
fn a_record_that_cannot_be_locked_does_without() {
    let host = Host::new(1);
    let mut vm = Vm::negotiated(&host, RingFormat::Split);
    vm.frontend.set_mem_table(&vm.guest.table()).unwrap();
    let (info, file) = record(&mut vm.frontend);
    let path =
        std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("record-{}", std::process::id()));
    let on_disk = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    on_disk.set_len(file.metadata().unwrap().len()).unwrap();
    let is_memory =
        rustix::fs::fstatfs(&on_disk).unwrap().f_type == rustix::fs::fstatfs(&file).unwrap().f_type;
    vm.frontend.set_inflight_fd(&info, on_disk.as_raw_fd()).unwrap();
    let driver = Driver::new(&mut vm.guest, RingFormat::Split, 64, true);
    vm.add(0, driver, 0);
    vm.echo(0, b"served all the same");
    assert_eq!(host.device.switches.leased.load(Ordering::SeqCst), usize::from(is_memory));
}

#[test]
fn a_device_that_is_not_ready_ends_the_connection() {
    let host = Host::new(1);
    let vm = Vm::new(&host, RingFormat::Split, 1);
    vm.frontend.get_vring_base(0).unwrap();
    host.device.switches.not_ready.store(true, Ordering::SeqCst);
    vm.frontend.set_vring_kick(0, &vm.lines[0].kick).expect_err("refused");
    eventually("the session ends", || host.handle.status().peer.is_none());
    let reason = host.handle.status().last_error.unwrap();
    assert!(reason.contains("its storage is gone"), "{reason}");
    host.device.switches.not_ready.store(false, Ordering::SeqCst);
    Vm::new(&host, RingFormat::Split, 1).echo(0, b"ready again");
}

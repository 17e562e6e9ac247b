//! Front ends whose descriptors block whoever writes to them. They hold up nobody but themselves.

use std::io::{ErrorKind, Read};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reactor::placement::Wish;
use reactor::{Mode, Pool};
use rustix::fs::{OFlags, fcntl_setfl};
use vhost::VhostBackend;
use vhost::vhost_user::message::FrontendReq;
use virtio::RingFormat;
use vmm_sys_util::eventfd::EventFd;

use crate::device::Echo;
use crate::host::{Host, Vm, eventually};
use crate::negotiation::new_eventfd;
use crate::raw::{Raw, message};

/// Two devices of different owners, whose queues one I/O thread serves.
pub(crate) fn neighbours() -> (Arc<Pool>, Host, Host) {
    let wish = Wish { threads: NonZeroUsize::new(1), ..Wish::default() };
    let pool = Arc::new(Pool::start(reactor::Options { wish, ..reactor::Options::default() }).unwrap());
    let host = |label| Host::on(pool.clone(), label, Echo::new(2), |_| {}, Mode::Hybrid);
    let (good, bad) = (host("good"), host("bad"));
    (pool, good, bad)
}

/// Fills it up, and makes it wait for room from now on.
fn block(fd: impl AsFd) {
    fcntl_setfl(&fd, OFlags::NONBLOCK).unwrap();
    // An empty eventfd is full after one such write; a pipe or socket takes them as any bytes.
    let _ = rustix::io::read(&fd, &mut [0; 8]);
    while rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).is_ok() {}
    fcntl_setfl(&fd, OFlags::empty()).unwrap();
}

/// Has the device call on a descriptor of any kind.
#[allow(unsafe_code, reason = "the front end takes eventfds only, and tests send others too")]
pub(crate) fn set_call(vm: &mut Vm, fd: OwnedFd) {
    // SAFETY: whatever kind of descriptor it is, it is open and ours to give; it is only closed and sent on.
    let call = unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) };
    vm.frontend.set_vring_call(0, &call).unwrap();
}

/// Has the device call on `fd`, which is blocked by then.
fn call_on(vm: &mut Vm, fd: OwnedFd) -> OwnedFd {
    set_call(vm, fd.try_clone().unwrap());
    block(&fd);
    vm.offer(0, b"and call me");
    fd
}

fn is_seen_off(host: &Host) -> bool {
    let status = host.handle.status();
    status.peer.is_none() && status.last_error.is_some_and(|error| error.contains("made blocking"))
}

#[test]
fn a_call_that_blocks_costs_its_front_end_the_device_and_nobody_else_anything() {
    let (pool, mut good, mut bad) = neighbours();
    let mut neighbour = Vm::new(&good, RingFormat::Split, 1);
    let mut hostile = Vm::new(&bad, RingFormat::Split, 2);
    let _fd = call_on(&mut hostile, new_eventfd());
    for _ in 0..100 {
        neighbour.echo(0, b"still there");
    }
    assert_eq!(pool.report().len(), 1, "they do share a thread");
    eventually("the hostile front end is seen off", || is_seen_off(&bad));
    neighbour.echo(0, b"and ever after");

    // It may not try again at once.
    let mut raw = Raw::connect(&bad.path);
    raw.send_bytes(&message(FrontendReq::GET_FEATURES.into(), 1, &[]), &[]);
    raw.0.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert_eq!(raw.0.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    assert_eq!(bad.handle.status().sessions, 1);
    bad.stop();
    good.stop();
}

/// User-Mode Linux listens on pipes.
#[test]
fn a_full_pipe_is_a_pending_call() {
    let (_pool, good, bad) = neighbours();
    let mut neighbour = Vm::new(&good, RingFormat::Split, 1);
    let mut lazy = Vm::new(&bad, RingFormat::Split, 2);
    let (_reader, writer) = rustix::pipe::pipe().unwrap();
    let _writer = call_on(&mut lazy, writer);
    for _ in 0..100 {
        neighbour.echo(0, b"still there");
        lazy.echo(1, b"as is the other queue");
    }
    assert!(bad.handle.status().peer.is_some());
}

#[test]
fn a_device_whose_call_blocks_can_be_stopped() {
    let (_pool, good, mut bad) = neighbours();
    let mut hostile = Vm::new(&bad, RingFormat::Packed, 2);
    let _fd = call_on(&mut hostile, new_eventfd());
    // The answer is shown, and then called for.
    eventually("an answer comes", || hostile.lines[0].driver.ring.reap().unwrap().is_some());
    bad.stop();
    Vm::new(&good, RingFormat::Split, 1).echo(0, b"still there");
}

#[test]
fn the_control_thread_does_not_block_either() {
    let mut host = Host::new(1);
    let fd = new_eventfd();
    block(&fd);
    let (shared, over) = (fd.try_clone().unwrap(), Arc::new(AtomicBool::new(false)));
    let until = over.clone();
    let clearing = std::thread::spawn(move || {
        while !until.load(Ordering::Relaxed) {
            fcntl_setfl(&shared, OFlags::empty()).unwrap();
        }
    });
    let mut raw = Raw::connect(&host.path);
    raw.negotiate(0);
    // It makes the descriptor non-blocking and then writes to it: sooner or later the flag is cleared in between.
    eventually("the front end is seen off", || {
        raw.vring_fd(FrontendReq::SET_VRING_CALL, 0, &fd);
        is_seen_off(&host)
    });
    over.store(true, Ordering::Relaxed);
    clearing.join().unwrap();
    host.stop();
}

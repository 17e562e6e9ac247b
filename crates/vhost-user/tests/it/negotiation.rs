//! Features, replies, configuration, status.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use reactor::{Mode, Pool};
use rustix::event::{EventfdFlags, eventfd};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{FrontendReq, VhostUserConfigFlags, VhostUserProtocolFeatures as Protocol};
use virtio::RingFormat;
use virtio::features::{RING_FEATURES, RING_PACKED};

use crate::device::{Echo, FEATURE, WRITABLE_AT};
use crate::guest::{Driver, Guest, USER};
use crate::host::{Host, LOG_ALL, PROTOCOL_FEATURES, Vm, eventually};
use crate::raw::{NEED_REPLY, Raw, longs, words};

#[test]
fn what_is_offered() {
    let host = Host::new(3);
    let mut raw = Raw::connect(&host.path);
    let features = raw.ask(FrontendReq::GET_FEATURES).unwrap();
    assert_eq!(features, FEATURE | RING_FEATURES | PROTOCOL_FEATURES | LOG_ALL);
    let protocol = Protocol::from_bits(raw.ask(FrontendReq::GET_PROTOCOL_FEATURES).unwrap()).unwrap();
    assert!(!protocol.contains(Protocol::HOST_NOTIFIER));
    assert!(!protocol.contains(Protocol::PAGEFAULT));
    assert!(protocol.contains(Protocol::DEVICE_STATE | Protocol::CONFIGURE_MEM_SLOTS));
    assert_eq!(raw.ask(FrontendReq::GET_QUEUE_NUM), Some(3));

    let host = Host::with(Echo::new(1), |o| o.without = RING_PACKED | FEATURE, Mode::Hybrid);
    let mut raw = Raw::connect(&host.path);
    let without = raw.ask(FrontendReq::GET_FEATURES).unwrap();
    assert_eq!(without, features & !RING_PACKED & !FEATURE);
    // What was withheld cannot be had.
    raw.set(FrontendReq::SET_FEATURES, features);
    raw.wait_for_end();
    eventually("the reason is noted", || host.handle.status().last_error.is_some());
    assert!(host.handle.status().last_error.unwrap().contains("not offered"));
}

#[test]
fn acknowledgements_come_when_they_were_negotiated_and_asked_for() {
    let host = Host::new(1);
    let mut raw = Raw::connect(&host.path);
    let ack = Protocol::REPLY_ACK.bits();
    // Not negotiated: no acknowledgement. The next reply is the one to the next question.
    raw.send(FrontendReq::SET_OWNER, NEED_REPLY, &[], &[]);
    assert_eq!(raw.ask(FrontendReq::GET_QUEUE_NUM), Some(1));
    // The message that negotiates it is itself acknowledged.
    raw.send(FrontendReq::SET_PROTOCOL_FEATURES, NEED_REPLY, &longs(&[ack]), &[]);
    assert_eq!(raw.reply(), Some((FrontendReq::SET_PROTOCOL_FEATURES.into(), longs(&[0]))));
    raw.send(FrontendReq::SET_OWNER, NEED_REPLY, &[], &[]);
    assert_eq!(raw.reply_u64(), Some(0));
    // Not asked for.
    raw.send(FrontendReq::SET_OWNER, 0, &[], &[]);
    // A request with a reply of its own has no other.
    raw.send(FrontendReq::GET_QUEUE_NUM, NEED_REPLY, &[], &[]);
    assert_eq!(raw.reply_u64(), Some(1));
    // A refusal is told, and the connection goes on.
    raw.send(FrontendReq::SET_VRING_NUM, NEED_REPLY, &words(&[7, 64]), &[]);
    assert_eq!(raw.reply_u64(), Some(1));
    raw.send(FrontendReq::NET_SET_MTU, NEED_REPLY, &longs(&[1500]), &[]);
    assert_eq!(raw.reply_u64(), Some(1));
    // Of rings that are too large, too.
    raw.send(FrontendReq::SET_VRING_NUM, NEED_REPLY, &words(&[0, 2048]), &[]);
    assert_eq!(raw.reply_u64(), Some(1));
    raw.send(FrontendReq::SET_VRING_NUM, NEED_REPLY, &words(&[0, 1024]), &[]);
    assert_eq!(raw.reply_u64(), Some(0));
    // Without being asked for it ends the connection instead.
    raw.vring(FrontendReq::SET_VRING_NUM, 7, 64);
    raw.wait_for_end();
}

#[test]
fn what_was_not_negotiated_is_refused() {
    let host = Host::new(1);
    for (request, body) in [
        (FrontendReq::GET_CONFIG, words(&[0, 4, 0, 0])),
        (FrontendReq::GET_MAX_MEM_SLOTS, vec![]),
        (FrontendReq::GET_STATUS, vec![]),
        (FrontendReq::RESET_DEVICE, vec![]),
        (FrontendReq::VRING_KICK, words(&[0, 0])),
        (FrontendReq::CHECK_DEVICE_STATE, vec![]),
    ] {
        let mut raw = Raw::connect(&host.path);
        raw.send(request, 0, &body, &[]);
        raw.wait_for_end();
        eventually("the session ends", || host.handle.status().peer.is_none());
        assert!(host.handle.status().last_error.unwrap().contains("not negotiated"), "{request:?}");
    }
}

/// What User-Mode Linux does: features are set twice, the second time without protocol features, and no ring is ever
/// enabled; packed rings begin at a base of 0.
#[test]
fn a_front_end_without_protocol_features_has_its_rings_enabled() {
    let host = Host::new(1);
    for format in [RingFormat::Split, RingFormat::Packed] {
        let mut guest = Guest::new(1, 1 << 20);
        let mut driver = Driver::new(&mut guest, format, 16, false);
        let raw = Raw::connect(&host.path);
        let packed = if format == RingFormat::Packed { RING_PACKED } else { 0 };
        let features = virtio::features::VERSION_1 | packed;
        raw.set(FrontendReq::SET_FEATURES, features | PROTOCOL_FEATURES);
        raw.set(FrontendReq::SET_FEATURES, features);
        let region = guest.raw_table()[0];
        let body = longs(&[1, region.guest_phys_addr, region.memory_size, region.user_addr, 0, 0, 0, 0, 0]);
        raw.send(FrontendReq::SET_MEM_TABLE, 0, &body, &[guest.files[0].as_fd()]);
        let (kick, call) = (new_eventfd(), new_eventfd());
        for round in 0..2 {
            raw.vring_fd(FrontendReq::SET_VRING_CALL, 0, &call);
            raw.vring(FrontendReq::SET_VRING_NUM, 0, 16);
            raw.vring(FrontendReq::SET_VRING_BASE, 0, 0);
            let (desc, used, avail) =
                (driver.config.desc.0 + USER, driver.config.device.0 + USER, driver.config.driver.0 + USER);
            let body = [longs(&[0]), longs(&[desc, used, avail, u64::MAX])].concat();
            raw.send(FrontendReq::SET_VRING_ADDR, 0, &body, &[]);
            raw.vring_fd(FrontendReq::SET_VRING_KICK, 0, &kick);
            for i in 0..20u32 {
                let at = driver.offer(&mut guest, &i.to_le_bytes());
                rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
                let mut reaped = None;
                eventually("an answer comes", || {
                    reaped = driver.ring.reap().unwrap();
                    reaped.is_some()
                });
                assert_eq!(guest.read(at, 4), i.to_le_bytes(), "round {round}");
            }
            // The driver is bound anew: another ring, of which the old one is not told to be gone.
            driver = Driver::new(&mut guest, format, 16, false);
        }
        drop(raw);
        eventually("the session ends", || host.handle.status().peer.is_none());
        assert_eq!(host.handle.status().last_error, None);
    }
}

/// The other meaning of a base of 0: one lap done, both wrap counters at 0.
#[test]
fn a_packed_ring_at_the_end_of_a_lap_goes_on_there() {
    let host = Host::new(1);
    let mut vm = Vm::new(&host, RingFormat::Packed, 1);
    // 32 chains of 2 descriptors: exactly one lap.
    for i in 0..32u32 {
        vm.echo(0, &i.to_le_bytes());
    }
    assert_eq!(vm.frontend.get_vring_base(0).unwrap(), 0);
    vm.frontend.set_vring_base(0, 0).unwrap();
    vm.frontend.set_vring_kick(0, &vm.lines[0].kick).unwrap();
    for i in 0..100u32 {
        vm.echo(0, &i.to_le_bytes());
    }
}

#[test]
fn configuration_is_read_and_written_where_it_may_be() {
    let host = Host::new(1);
    let mut vm = Vm::negotiated(&host, RingFormat::Split);
    let writable = VhostUserConfigFlags::empty();
    let (_, config) = vm.frontend.get_config(2, 4, writable, &[0; 4]).unwrap();
    assert_eq!(config, [2, 3, 4, 5]);
    // Beyond its end it is zeros.
    let (_, config) = vm.frontend.get_config(12, 8, writable, &[0; 8]).unwrap();
    assert_eq!(config, [12, 13, 14, 15, 0, 0, 0, 0]);
    vm.frontend.set_config(WRITABLE_AT, writable, &[99]).unwrap();
    let (_, config) = vm.frontend.get_config(WRITABLE_AT, 1, writable, &[0]).unwrap();
    assert_eq!(config, [99]);
    vm.frontend.set_config(0, writable, &[0]).expect_err("a read-only field");
    // A migration may set it to what it is.
    vm.frontend.set_config(0, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
    vm.frontend.set_config(0, VhostUserConfigFlags::WRITABLE, &[1]).expect_err("another value");
}

#[test]
fn status_and_reset() {
    let host = Host::new(1);
    let mut vm = Vm::new(&host, RingFormat::Split, 1);
    vm.echo(0, b"data");
    vm.frontend.reset_device().unwrap();
    let queue = host.handle.status().queues[0];
    assert!(!queue.started && !queue.enabled && queue.counters.is_none());
    // Ready to be set up again.
    let driver = Driver::new(&mut vm.guest, RingFormat::Split, 32, true);
    vm.lines.clear();
    vm.add(0, driver, 0);
    vm.echo(0, b"data");
}

#[test]
fn a_broken_ring_is_reported_in_every_way() {
    let host = Host::new(2);
    let mut raw = Raw::connect(&host.path);
    raw.negotiate(LOG_ALL | RING_PACKED | virtio::features::IN_ORDER);
    let mut guest = Guest::new(1, 1 << 20);
    let driver = Driver::new(&mut guest, RingFormat::Split, 16, false);
    let region = guest.raw_table()[0];
    let body = longs(&[1, region.guest_phys_addr, region.memory_size, region.user_addr, 0]);
    raw.send(FrontendReq::SET_MEM_TABLE, 0, &body, &[guest.files[0].as_fd()]);
    raw.set(FrontendReq::SET_STATUS, 15);
    assert_eq!(raw.ask(FrontendReq::GET_STATUS), Some(15));
    raw.vring(FrontendReq::SET_VRING_NUM, 0, 16);
    let (desc, used, avail) =
        (driver.config.desc.0 + USER, driver.config.device.0 + USER, driver.config.driver.0 + USER);
    raw.send(FrontendReq::SET_VRING_ADDR, 0, &[longs(&[0]), longs(&[desc, used, avail, 0])].concat(), &[]);
    let (kick, err) = (new_eventfd(), new_eventfd());
    raw.vring_fd(FrontendReq::SET_VRING_ERR, 0, &err);
    // More requests than descriptors.
    guest.write(driver.config.driver, &[0, 0, 0xff, 0xff]);
    raw.vring_fd(FrontendReq::SET_VRING_KICK, 0, &kick);
    raw.vring(FrontendReq::SET_VRING_ENABLE, 0, 1);
    assert_eq!(read_eventfd(&err), 1);
    assert_eq!(raw.ask(FrontendReq::GET_STATUS), Some(15 | 64));
    assert!(host.handle.status().queues[0].failed);
    // A reset by the driver mends it.
    raw.set(FrontendReq::SET_STATUS, 0);
    assert_eq!(raw.ask(FrontendReq::GET_STATUS), Some(0));
}

#[test]
fn a_front_end_may_poll_and_be_polled() {
    [Mode::Poll, Mode::Hybrid, Mode::Notify].into_iter().for_each(poll_and_be_polled);
}

fn poll_and_be_polled(mode: Mode) {
    const NO_FD: u64 = 0x100;
    let pool = Arc::new(Pool::start(reactor::Options::default()).unwrap());
    let host = Host::on(pool.clone(), "test", Echo::new(1), |_| {}, mode);
    let mut raw = Raw::connect(&host.path);
    raw.negotiate(LOG_ALL | RING_PACKED | virtio::features::IN_ORDER);
    let mut guest = Guest::new(1, 1 << 20);
    let mut driver = Driver::new(&mut guest, RingFormat::Split, 16, true);
    let region = guest.raw_table()[0];
    let body = longs(&[1, region.guest_phys_addr, region.memory_size, region.user_addr, 0]);
    raw.send(FrontendReq::SET_MEM_TABLE, 0, &body, &[guest.files[0].as_fd()]);
    // Kicked before it is described, enabled before it is kicked: any order will do.
    raw.vring(FrontendReq::SET_VRING_ENABLE, 0, 1);
    raw.set(FrontendReq::SET_VRING_CALL, NO_FD);
    raw.set(FrontendReq::SET_VRING_ERR, NO_FD);
    raw.vring(FrontendReq::SET_VRING_NUM, 0, 16);
    raw.set(FrontendReq::SET_VRING_KICK, NO_FD);
    raw.vring(FrontendReq::SET_VRING_BASE, 0, 0);
    let (desc, used, avail) =
        (driver.config.desc.0 + USER, driver.config.device.0 + USER, driver.config.driver.0 + USER);
    raw.send(FrontendReq::SET_VRING_ADDR, 0, &[longs(&[0]), longs(&[desc, used, avail, 0])].concat(), &[]);
    for i in 0..100u32 {
        let at = driver.offer(&mut guest, &i.to_le_bytes());
        eventually("an answer comes", || driver.ring.reap().unwrap().is_some());
        assert_eq!(guest.read(at, 4), i.to_le_bytes());
    }
    assert_eq!(raw.ask(FrontendReq::GET_QUEUE_NUM), Some(1));
    if mode != Mode::Poll {
        // A front end that does not kick has no thread of ours spin.
        let sleeps = || pool.report().iter().map(|thread| thread.stats.sleeps).sum::<u64>();
        let before = sleeps();
        eventually("the thread sleeps between two looks", || sleeps() > before + 2);
    }
}

#[test]
fn what_is_said_twice_does_not_disturb_a_running_ring() {
    let host = Host::new(1);
    let mut vm = Vm::new(&host, RingFormat::Split, 1);
    vm.echo(0, b"data");
    vm.frontend.set_features(vm.features).unwrap();
    vm.frontend.set_vring_enable(0, true).unwrap();
    vm.frontend.set_vring_addr(0, &vm.lines[0].driver.addresses()).unwrap();
    // A queue that had been started again would have counted from 0.
    assert_eq!(host.handle.status().queues[0].counters.unwrap().requests, 1);
    vm.echo(0, b"data");
}

#[test]
fn in_band_notifications_need_their_means() {
    let host = Host::new(1);
    for means in [Protocol::empty(), Protocol::BACKEND_REQ, Protocol::REPLY_ACK] {
        let mut raw = Raw::connect(&host.path);
        raw.set(FrontendReq::SET_PROTOCOL_FEATURES, (means | Protocol::INBAND_NOTIFICATIONS).bits());
        raw.wait_for_end();
    }
}

/// Waits for an eventfd to be signalled, and says how often it was.
pub(crate) fn read_eventfd(fd: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    eventually("it is signalled", || rustix::io::read(fd, &mut count).is_ok());
    u64::from_ne_bytes(count)
}

pub(crate) fn new_eventfd() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

//! Front ends that try everything at once, and a neighbour on the same I/O thread that must not notice.
//!
//! Ten seconds by default; `EXITLESS_SOAK_SECONDS` says how long else. Alone in its process, because it counts what the
//! process has.

#![allow(clippy::unwrap_used)]
#![allow(dead_code, reason = "shared with the other tests")]

#[path = "it/device.rs"]
mod device;
#[path = "it/fuse.rs"]
mod fuse;
#[path = "it/guest.rs"]
mod guest;
#[path = "it/host.rs"]
mod host;
#[path = "it/process.rs"]
mod process;
#[path = "it/raw.rs"]
mod raw;

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use reactor::placement::Wish;
use reactor::{Mode, Pool};
use rustix::event::{EventfdFlags, eventfd};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::FrontendReq;
use virtio::features::{IN_ORDER, RING_PACKED};
use virtio::ring::Buffer;
use virtio::{GuestAddr, RingFormat};

use device::Echo;
use fuse::Fuse;
use guest::{Driver, Guest, START, USER};
use host::{Host, LOG_ALL, Vm, eventually};
use raw::{NEED_REPLY, Raw, longs, message, words};

/// What memory may have grown by: freed memory stays with the allocator.
const GROWTH_KIB_MAX: usize = 32 << 10;
const PAGE: u64 = 4096;

type Round = fn(&Host);

/// What front ends try, each on a device of its own.
const ATTACKS: [(&str, Round); 8] = [
    ("connections", connections),
    ("descriptors", descriptors),
    ("descriptors that nobody asked for", stowaways),
    ("files of user programs", user_files),
    ("exploding chains", exploding_chain),
    ("memory tables", memory_tables),
    ("ring restarts", ring_restarts),
    ("refused requests", refused_requests),
];

fn idle(host: &Host) {
    eventually("the session ends", || host.handle.status().peer.is_none());
}

fn negotiated(host: &Host) -> Raw {
    idle(host);
    let mut raw = Raw::connect(&host.path);
    raw.negotiate(LOG_ALL | RING_PACKED | IN_ORDER);
    raw
}

fn new_eventfd() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

/// Health checks, front ends that are turned away, messages that are none or half.
fn connections(host: &Host) {
    for i in 0..40 {
        let raw = Raw::connect(&host.path);
        match i % 4 {
            0 => drop(raw),
            1 => drop(Raw::connect(&host.path)),
            2 => drop(raw.send_bytes(&[0xff; 40], &[])),
            _ => drop(raw.send_bytes(&message(FrontendReq::SET_FEATURES.into(), 1, &[0; 8])[..15], &[])),
        }
    }
    idle(host);
}

/// A connection whose last close waits for its peer, which never reads, for a second.
fn lingering() -> (TcpStream, TcpListener, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (theirs, _) = listener.accept().unwrap();
    ours.set_nonblocking(true).unwrap();
    while ours.write(&[0; 1 << 16]).is_ok() {}
    rustix::net::sockopt::set_socket_linger(&ours, Some(Duration::from_secs(1))).unwrap();
    (ours, listener, theirs)
}

/// Sends such a connection along with `bytes` and lets go of it. What is returned has it linger.
fn send_lingering(raw: &Raw, bytes: &[u8]) -> (TcpListener, TcpStream) {
    let (fd, listener, theirs) = lingering();
    raw.send_bytes(bytes, &[fd.as_fd()]);
    // If the service has closed its own already this one lingers, and is not waited for.
    std::thread::spawn(move || drop(fd));
    (listener, theirs)
}

/// Sockets that linger: beside the device's state, in messages of front ends that are turned away, and in what comes
/// after a message that is none.
fn stowaways(host: &Host) {
    const LOAD: u32 = 1;
    let mut raw = negotiated(host);
    let (state, ours) = UnixStream::pair().unwrap();
    raw.send(FrontendReq::SET_DEVICE_STATE_FD, 0, &words(&[LOAD, 0]), &[state.as_fd()]);
    assert!(raw.reply_u64().is_some());
    let owner = message(FrontendReq::SET_OWNER.into(), 1, &[]);
    let _turned_away: Vec<_> = (0..3).map(|_| send_lingering(&Raw::connect(&host.path), &owner)).collect();
    let _state = send_lingering(&Raw(ours), b"state");
    raw.send(FrontendReq::CHECK_DEVICE_STATE, 0, &[], &[]);
    raw.send_bytes(&[0xff; 12], &[]);
    let _after = send_lingering(&raw, &owner);
    raw.wait_for_end();
}

/// Sockets that linger, pipes and channels that are full, more descriptors than there should be.
fn descriptors(host: &Host) {
    let (lingering, _listener, _theirs) = lingering();
    let (_reader, pipe) = rustix::pipe::pipe().unwrap();
    rustix::fs::fcntl_setfl(&pipe, rustix::fs::OFlags::NONBLOCK).unwrap();
    while rustix::io::write(&pipe, &[0; 8]).is_ok() {}
    let (channel, _other) = UnixStream::pair().unwrap();
    let mut raw = negotiated(host);
    let decent = new_eventfd();
    let mut ask = |request, fds: &[BorrowedFd<'_>]| {
        raw.send(request, NEED_REPLY, &longs(&[0]), fds);
        assert!(raw.reply_u64().is_some(), "{request:?}");
    };
    for request in [FrontendReq::SET_VRING_CALL, FrontendReq::SET_VRING_ERR, FrontendReq::SET_VRING_KICK] {
        ask(request, &[pipe.as_fd()]);
        ask(request, &[channel.as_fd()]);
        ask(request, &[decent.as_fd()]);
        ask(request, &[lingering.as_fd()]);
    }
    ask(FrontendReq::SET_BACKEND_REQ_FD, &[pipe.as_fd()]);
    ask(FrontendReq::SET_BACKEND_REQ_FD, &[channel.as_fd()]);
    ask(FrontendReq::SET_OWNER, &[pipe.as_fd(); 60]);
    drop(lingering);
}

/// Files that are closed only when a program pleases. Where such cannot be had, the other attacks go on.
fn user_files(host: &Host) {
    let Some(fuse) = Fuse::new() else {
        return std::thread::sleep(Duration::from_millis(100));
    };
    let file = fuse.open();
    for request in [FrontendReq::SET_VRING_CALL, FrontendReq::SET_LOG_FD, FrontendReq::SET_OWNER] {
        let mut raw = negotiated(host);
        raw.send(request, NEED_REPLY, &longs(&[0]), &[file.as_fd()]);
        assert!(raw.reply_u64().is_some(), "{request:?}");
    }
    // It gives up: before, whoever closes it waits.
    drop(fuse);
}

/// As many regions as there may be, in pages of the same file, and a chain whose every buffer spans them all.
fn exploding_chain(host: &Host) {
    const REGIONS: u64 = 500;
    const DESCRIPTORS: usize = 1000;
    let ring_bytes = 1 << 20;
    let mut guest = Guest::new(1, ring_bytes + REGIONS * PAGE);
    let mut driver = Driver::new(&mut guest, RingFormat::Split, 1024, false);
    let mut raw = negotiated(host);
    add_region(&mut raw, &guest, 0, ring_bytes);
    for i in 0..REGIONS {
        add_region(&mut raw, &guest, ring_bytes + i * PAGE, PAGE);
    }
    let [desc, avail, used] = [driver.config.desc, driver.config.driver, driver.config.device];
    raw.vring(FrontendReq::SET_VRING_NUM, 0, 1024);
    let addresses = longs(&[0, USER + desc.0, USER + used.0, USER + avail.0, 0]);
    raw.send(FrontendReq::SET_VRING_ADDR, 0, &addresses, &[]);
    raw.vring_fd(FrontendReq::SET_VRING_KICK, 0, &new_eventfd());
    let all = Buffer { addr: GuestAddr(START + ring_bytes), len: (REGIONS * PAGE) as u32, writable: true };
    driver.ring.add(&[all; DESCRIPTORS]).unwrap();
    driver.ring.publish();
    raw.vring(FrontendReq::SET_VRING_ENABLE, 0, 1);
    // Answered or refused: both will do.
    eventually("the chain is dealt with", || {
        let queue = host.handle.status().queues[0];
        driver.ring.reap().unwrap().is_some() || queue.failed || host.handle.status().peer.is_none()
    });
}

fn add_region(raw: &mut Raw, guest: &Guest, at: u64, len: u64) {
    let region = longs(&[0, START + at, len, USER + START + at, at]);
    raw.send(FrontendReq::ADD_MEM_REG, NEED_REPLY, &region, &[guest.files[0].as_fd()]);
    assert!(raw.reply_u64().is_some());
}

/// Tables that are full, that come and go, and that are left behind.
fn memory_tables(host: &Host) {
    let guest = Guest::new(1, 509 * PAGE);
    let mut raw = negotiated(host);
    for i in 0..509 {
        add_region(&mut raw, &guest, i * PAGE, PAGE);
    }
    for _ in 0..10 {
        let table = longs(&[1, START, 509 * PAGE, USER + START, 0]);
        raw.send(FrontendReq::SET_MEM_TABLE, NEED_REPLY, &table, &[guest.files[0].as_fd()]);
        assert_eq!(raw.reply_u64(), Some(0));
    }
}

fn ring_restarts(host: &Host) {
    idle(host);
    let mut vm = Vm::new(host, RingFormat::Packed, 1);
    for i in 0..100 {
        if i % 10 == 0 {
            vm.echo(0, b"and on");
        }
        vm.frontend.set_vring_enable(0, false).unwrap();
        vm.frontend.set_vring_enable(0, true).unwrap();
    }
}

fn refused_requests(host: &Host) {
    let mut raw = negotiated(host);
    for _ in 0..500 {
        raw.send(FrontendReq::SET_VRING_NUM, NEED_REPLY, &words(&[99, 1]), &[]);
        assert_eq!(raw.reply_u64(), Some(1));
    }
}

/// The neighbour's requests, one after the other: how long each took, in ns, until `over`.
fn serve_neighbour(vm: &mut Vm, over: &AtomicBool) -> Vec<u64> {
    let mut took_ns = Vec::new();
    let mark = vm.guest.mark();
    while !over.load(Ordering::Relaxed) {
        let begin = Instant::now();
        vm.echo(0, b"still there");
        took_ns.push(begin.elapsed().as_nanos() as u64);
        vm.guest.rewind(mark);
        // Not the whole CPU: the attacks are to have their share.
        std::thread::sleep(Duration::from_micros(200));
    }
    took_ns
}

/// Says how it went, for the record.
fn report(when: &str, mut took_ns: Vec<u64>) -> usize {
    took_ns.sort_unstable();
    let at = |permille: usize| took_ns.get(took_ns.len() * permille / 1000).map_or(0, |ns| ns / 1000);
    println!("{when}: {} requests, p50 {} µs, p99 {} µs", took_ns.len(), at(500), at(990));
    took_ns.len()
}

/// Runs every attack for `duration`, but once at least, beside the neighbour. Returns how many rounds each had.
fn attack(hosts: &[Host], duration: Duration) -> Vec<usize> {
    let until = Instant::now() + duration;
    std::thread::scope(|scope| {
        let attackers: Vec<_> = ATTACKS
            .iter()
            .zip(hosts)
            .map(|((_, round), host)| {
                scope.spawn(move || {
                    let mut rounds = 0;
                    while rounds == 0 || Instant::now() < until {
                        round(host);
                        rounds += 1;
                    }
                    rounds
                })
            })
            .collect();
        attackers.into_iter().map(|attacker| attacker.join().unwrap()).collect()
    })
}

/// The neighbour beside `during`.
fn beside(vm: &mut Vm, when: &str, during: impl FnOnce()) {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let neighbour = scope.spawn(|| serve_neighbour(vm, &over));
        during();
        over.store(true, Ordering::Relaxed);
        // It panics if a request is not answered.
        assert!(report(when, neighbour.join().unwrap()) > 0);
    });
}

/// Waits until all front ends are gone and their threads with them.
fn settle(hosts: &[Host]) {
    hosts.iter().for_each(idle);
    eventually("the threads of all connections end", || process::intakes() == 2);
}

#[test]
fn a_neighbour_and_the_process_are_where_they_were() {
    let seconds = std::env::var("EXITLESS_SOAK_SECONDS").map_or(10, |value| value.parse().unwrap());
    let wish = Wish { threads: NonZeroUsize::new(1), ..Wish::default() };
    let pool = Arc::new(Pool::start(reactor::Options { wish, ..reactor::Options::default() }).unwrap());
    let host = |label: &str| Host::on(pool.clone(), label, Echo::new(1), |_| {}, Mode::Hybrid);
    let good = host("neighbour");
    let hosts: Vec<Host> = ATTACKS.iter().map(|(label, _)| host(label)).collect();
    let mut neighbour = Vm::new(&good, RingFormat::Split, 1);

    // Once, for what is made once.
    attack(&hosts, Duration::ZERO);
    settle(&hosts);
    let before = process::Counts::now();
    beside(&mut neighbour, "before", || std::thread::sleep(Duration::from_secs(1)));

    beside(&mut neighbour, "during", || {
        for ((name, _), rounds) in ATTACKS.iter().zip(attack(&hosts, Duration::from_secs(seconds))) {
            println!("{name}: {rounds} rounds");
        }
    });
    let front_ends: u64 = hosts.iter().map(|host| host.handle.status()).map(|s| s.sessions + s.refused).sum();
    println!("{front_ends} front ends");
    settle(&hosts);
    beside(&mut neighbour, "after", || std::thread::sleep(Duration::from_secs(1)));

    eventually("descriptors, mappings and threads are where they were", || {
        let now = process::Counts::now();
        now.descriptors <= before.descriptors
            && now.mappings == before.mappings
            && now.threads <= before.threads
    });
    let grown = process::Counts::now().resident_kib.saturating_sub(before.resident_kib);
    println!("{before:?}, then {:?}", process::Counts::now());
    assert!(grown < GROWTH_KIB_MAX, "{grown} KiB more than before");
    assert_eq!(pool.report().len(), 1, "they do share a thread");
    drop(neighbour);
}

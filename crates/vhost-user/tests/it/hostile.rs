//! Front ends that say anything. They may lose their connection; the server serves the next one.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use proptest::collection::vec;
use proptest::prelude::*;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::vhost_user::message::FrontendReq;
use virtio::RingFormat;

use crate::guest::{START, USER};
use crate::host::{Host, Vm, eventually};
use crate::negotiation::new_eventfd;
use crate::raw::{Raw, longs, message, words};

thread_local! {
    /// The server a property is tried on, one front end at a time. It goes with the test's thread.
    static HOST: Host = Host::new(2);
}

fn with_host(test: impl FnOnce(&Host)) {
    HOST.with(|host| {
        test(host);
        eventually("the session ends", || host.handle.status().peer.is_none());
    });
}

/// The server is sound: it brings up a device for a decent front end.
fn check(host: &Host) {
    eventually("the session ends", || host.handle.status().peer.is_none());
    let mut vm = Vm::new(host, RingFormat::Split, 1);
    vm.echo(0, b"sound");
}

/// Descriptors of every kind.
fn descriptors() -> Vec<OwnedFd> {
    let memfd = memfd_create("small", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&memfd, 1 << 16).unwrap();
    let (read, write) = rustix::pipe::pipe().unwrap();
    let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    let directory = std::fs::File::open("/").unwrap();
    vec![memfd, read, write, socket.into(), null.into(), directory.into(), new_eventfd()]
}

#[test]
fn half_a_message_holds_nobody_up() {
    let mut host = Host::new(1);
    let other = Host::new(1);
    let mut raw = Raw::connect(&host.path);
    raw.write_half(&message(FrontendReq::SET_FEATURES.into(), 1, &[0; 8])[..15]);
    check(&other);
    // Shutdown does not wait for the rest.
    host.stop();
    raw.wait_for_end();
}

#[test]
fn a_front_end_that_never_reads_holds_nobody_up() {
    let mut host = Host::new(1);
    let other = Host::new(1);
    let raw = Raw::connect(&host.path);
    raw.0.set_nonblocking(true).unwrap();
    let question = message(FrontendReq::GET_FEATURES.into(), 1, &[]);
    // Until both directions are full.
    eventually("the server stops reading", || !raw.send_bytes(&question, &[]));
    check(&other);
    drop(raw);
    host.stop();
}

#[test]
fn malformed_messages_end_their_connection_only() {
    let host = Host::new(1);
    let good = message(FrontendReq::SET_FEATURES.into(), 1, &[0; 8]);
    let mut cases: Vec<(Vec<u8>, usize)> = vec![
        // Versions and flags.
        (message(1, 0, &[]), 0),
        (message(1, 2, &[]), 0),
        (message(1, 1 | 4, &[]), 0),
        // Requests that do not exist, or not here.
        (message(0, 1, &[]), 0),
        (message(45, 1, &[]), 0),
        (message(u32::MAX, 1, &[]), 0),
        (message(FrontendReq::POSTCOPY_ADVISE.into(), 1, &[]), 0),
        // Sizes.
        (words(&[2, 1, u32::MAX]), 0),
        (words(&[2, 1, 5000]), 0),
        (message(FrontendReq::SET_FEATURES.into(), 1, &[0; 4]), 0),
        // Descriptors where none belong, and too many.
        (good.clone(), 1),
        (good, 253),
        (message(FrontendReq::SET_MEM_TABLE.into(), 1, &longs(&[64])), 64),
        (message(FrontendReq::SET_MEM_TABLE.into(), 1, &longs(&[u64::MAX])), 1),
        // Rings that do not exist.
        (message(FrontendReq::SET_VRING_NUM.into(), 1, &words(&[1, 16])), 0),
        (message(FrontendReq::SET_VRING_NUM.into(), 1, &words(&[u32::MAX, 16])), 0),
        (message(FrontendReq::GET_VRING_BASE.into(), 1, &words(&[255, 0])), 0),
        (message(FrontendReq::SET_VRING_KICK.into(), 1, &longs(&[0xff])), 1),
        (message(FrontendReq::SET_VRING_CALL.into(), 1, &longs(&[u64::MAX])), 1),
        // Sizes a ring cannot have.
        (message(FrontendReq::SET_VRING_NUM.into(), 1, &words(&[0, 0])), 0),
        (message(FrontendReq::SET_VRING_NUM.into(), 1, &words(&[0, 2048])), 0),
        // Features that were not offered.
        (message(FrontendReq::SET_FEATURES.into(), 1, &longs(&[u64::MAX])), 0),
        (message(FrontendReq::SET_PROTOCOL_FEATURES.into(), 1, &longs(&[u64::MAX])), 0),
    ];
    cases.push((message(FrontendReq::SET_FEATURES.into(), 1, &[0; 8])[..15].to_vec(), 0));
    let fd = new_eventfd();
    let sessions = cases.len() as u64;
    for (bytes, fds) in cases {
        let mut raw = Raw::connect(&host.path);
        raw.send_bytes(&bytes, &vec![fd.as_fd(); fds]);
        raw.0.shutdown(std::net::Shutdown::Write).unwrap();
        raw.wait_for_end();
        eventually("the session ends", || host.handle.status().peer.is_none());
        assert!(host.handle.status().last_error.is_some(), "{bytes:?}");
    }
    assert_eq!(host.handle.status().sessions, sessions);
    check(&host);
}

#[test]
fn descriptors_of_the_wrong_kind_are_refused() {
    let host = Host::new(1);
    let kinds = descriptors();
    let [memfd, _, _, _, null, directory, _] = &kinds[..] else { panic!("seven kinds") };
    for request in [FrontendReq::SET_VRING_KICK, FrontendReq::SET_VRING_CALL, FrontendReq::SET_VRING_ERR] {
        for fd in [memfd, null, directory] {
            let mut raw = Raw::connect(&host.path);
            raw.vring_fd(request, 0, fd);
            raw.wait_for_end();
            eventually("the session ends", || host.handle.status().peer.is_none());
            assert!(host.handle.status().last_error.unwrap().contains("descriptor"), "{request:?}");
        }
    }
    check(&host);
}

/// A message that may well be right.
#[derive(Clone, Debug)]
struct Likely {
    request: u32,
    flags: u32,
    body: Vec<u8>,
    fds: Vec<usize>,
}

fn likely() -> impl Strategy<Value = Likely> {
    let small = prop_oneof![0u32..3, Just(16), Just(256), any::<u32>()];
    let address = prop_oneof![
        (0u64..0x200).prop_map(|i| USER + START + i * 64),
        (0u64..0x200).prop_map(|i| START + i * 64),
        0u64..4,
        any::<u64>(),
    ];
    let region = prop_oneof![
        8 => Just(longs(&[START, 1 << 16, USER + START, 0])),
        1 => vec(address.clone(), 4).prop_map(|l| longs(&l)),
    ];
    let body = prop_oneof![
        Just(vec![]),
        (small.clone(), small.clone()).prop_map(|(a, b)| words(&[a, b])),
        any::<u64>().prop_map(|v| longs(&[v])),
        (0u64..0x200).prop_map(|v| longs(&[v])),
        (0u64..41).prop_map(|bit| longs(&[1 << 32 | 1 << bit])),
        (small.clone(), 0u32..2, vec(address, 4)).prop_map(|(i, f, l)| [words(&[i, f]), longs(&l)].concat()),
        region.clone().prop_map(|r| [longs(&[1]), r].concat()),
        region.prop_map(|r| [longs(&[0]), r].concat()),
        (small.clone(), small.clone(), 0u32..3)
            .prop_map(|(o, s, f)| [words(&[o, s, f]), vec![7; 64]].concat()),
        (0u64..0x20000, 0u64..0x20000, 0u32..3, 0u32..300).prop_map(|(s, o, q, n)| [
            longs(&[s, o]),
            words(&[q | n << 16, 0])
        ]
        .concat()),
    ];
    let fds = prop_oneof![3 => vec(0usize..7, 0..1), 4 => vec(0usize..7, 1), 1 => vec(0usize..7, 2..5)];
    let flags = prop_oneof![8 => Just(1u32), 80 => Just(9), 1 => any::<u32>()];
    (1u32..46, flags, body, fds).prop_map(|(request, flags, body, fds)| Likely { request, flags, body, fds })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes(bytes in vec(any::<u8>(), 0..400), fds in 0usize..4) {
        with_host(|host| {
            let raw = Raw::connect(&host.path);
            let fd = new_eventfd();
            raw.send_bytes(&bytes, &vec![fd.as_fd(); if bytes.is_empty() { 0 } else { fds }]);
        });
    }

    #[test]
    fn any_sequence_of_likely_messages(messages in vec(likely(), 1..40), negotiate in prop::bool::weighted(0.9)) {
        with_host(|host| {
            let kinds = descriptors();
            let mut raw = Raw::connect(&host.path);
            if negotiate {
                raw.negotiate(0);
            }
            for Likely { request, flags, body, fds } in messages {
                let fds: Vec<BorrowedFd<'_>> = fds.iter().map(|&kind| kinds[kind].as_fd()).collect();
                if !raw.send_bytes(&message(request, flags, &body), &fds) {
                    break;
                }
            }
            drop(raw);
            check(host);
        });
    }
}

//! Every kind of request, on two queues at once, by a guest with two CPUs.

use serde_json::json;

use crate::guest::Results;
use crate::needs::{self, Need};
use crate::qemu::{self, Setup};
use crate::scratch::{Scratch, md5};
use crate::service::{self, Disk, Service};

/// `VIRTIO_F_RING_PACKED` (virtio 1.2, 6).
const RING_PACKED: usize = 34;

#[test]
fn split_rings_carry_verified_io_on_two_queues() {
    let Some(_turn) = turn() else { return };
    let results = run(false, &[]);
    assert!(!negotiated(&results, RING_PACKED));
}

#[test]
fn packed_rings_carry_verified_io_on_two_queues() {
    if !service::is_ours() {
        return needs::skip("the peer has no packed rings");
    }
    let Some(_turn) = turn() else { return };
    let results = run(true, &[]);
    assert!(negotiated(&results, RING_PACKED), "the guest did not get packed rings");
}

#[test]
fn a_service_without_event_idx_and_without_polling_carries_verified_io() {
    if !service::is_ours() {
        return needs::skip("the peer has no such options");
    }
    let Some(_turn) = turn() else { return };
    run(false, &["--without", "packed,event-idx", "--poll", "notify"]);
}

#[test]
fn a_service_that_never_sleeps_takes_kicks_as_writes_to_a_page() {
    if !service::is_ours() {
        return needs::skip("the peer has no such options");
    }
    let Some(_turn) = turn() else { return };
    let scratch = Scratch::new();
    let disk = Disk::Raw(scratch.image("disk", 96));
    // One thread for both queues: the guest needs a CPU too.
    let options = ["--poll", "poll", "--cpus", "0"];
    let mut service = Service::start("service", disk, &scratch.path("blk"), &options);
    let setup = Setup {
        name: "qemu",
        socket: service.socket(),
        job: "migration",
        programs: &[],
        packed: false,
        incoming: None,
    };
    let mut qemu = qemu::boot(&scratch, &setup);
    qemu.guest.wait_beats(2);
    let map = qemu.qmp.run("human-monitor-command", json!({ "command-line": "info mtree" }));
    let pages = map.as_str().expect("a text").matches("vhost-user/host-notifier").count();
    assert!(pages >= 2, "QEMU shows the guest {pages} notification pages of the service, not one a queue");
    qemu.guest.wait_beats(2);
    qemu.guest.type_line("stop");
    qemu.guest.finish().all_ok();
    service.terminate();
}

fn turn() -> Option<needs::Turn> {
    let programs = ["qemu-system-x86_64", "fio", "blkdiscard", "md5sum"].map(Need::Program);
    needs::turn(&programs.into_iter().chain([Need::PcKernel]).collect::<Vec<_>>())
}

fn run(packed: bool, options: &[&str]) -> Results {
    let scratch = Scratch::new();
    let image = scratch.image("disk", 96);
    let mut service = Service::start("service", Disk::Raw(image.clone()), &scratch.path("blk"), options);
    let programs = ["fio", "blkdiscard"];
    let setup = Setup {
        name: "qemu",
        socket: service.socket(),
        job: "multiqueue",
        programs: &programs,
        packed,
        incoming: None,
    };
    let results = qemu::boot(&scratch, &setup).guest.finish();
    results.all_ok();
    service.terminate();

    assert_eq!(results.ok("queues"), "2");
    assert_eq!(results.ok("used-queues"), "2");
    assert_eq!(results.ok("serial"), service::serial());
    assert_eq!(results.ok("write-cache"), "write back");
    assert!(results.ok("flushes").parse::<u32>().expect("a count") >= 50, "fsync sent few flushes");
    assert_eq!(results.ok("discards"), "advertised");
    assert_eq!(results.ok("zero-writes"), "advertised");
    assert_eq!(results.ok("image"), md5(&image), "the guest and the host see different disks");
    results
}

fn negotiated(results: &Results, feature: usize) -> bool {
    results.ok("features").as_bytes().get(feature) == Some(&b'1')
}

//! Every kind of request, on two queues at once, by a guest with two CPUs.

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

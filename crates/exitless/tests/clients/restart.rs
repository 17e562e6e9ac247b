//! The service may die at any moment: a front end that connects again must find every request carried out, none of
//! them over a newer one, and nothing reported as failed to the guest.

use crate::needs::{self, Need};
use crate::qemu::{self, Setup};
use crate::scratch::{Scratch, md5};
use crate::service::{self, Disk, Service};

#[test]
fn verified_io_survives_kills_with_split_rings() {
    let Some(_turn) = turn() else { return };
    survive(false, Service::kill_and_restart);
}

#[test]
fn verified_io_survives_kills_with_packed_rings() {
    if !service::is_ours() {
        return needs::skip("the peer has no packed rings");
    }
    let Some(_turn) = turn() else { return };
    survive(true, Service::kill_and_restart);
}

#[test]
fn verified_io_survives_orderly_restarts() {
    if !service::is_ours() {
        return needs::skip("the peer loses requests when it is told to end");
    }
    let Some(_turn) = turn() else { return };
    survive(false, Service::terminate_and_restart);
}

fn turn() -> Option<needs::Turn> {
    let programs = ["qemu-system-x86_64", "fio"].map(Need::Program);
    needs::turn(&programs.into_iter().chain([Need::PcKernel]).collect::<Vec<_>>())
}

/// How often the service goes away in one run.
fn rounds() -> u32 {
    if std::env::var_os("EXITLESS_FULL").is_some() { 25 } else { 5 }
}

fn survive(packed: bool, restart: fn(&mut Service)) {
    let scratch = Scratch::new();
    let image = scratch.image("disk", 96);
    let mut service = Service::start("service", Disk::Raw(image.clone()), &scratch.path("blk"), &[]);
    let setup = Setup {
        name: "qemu",
        socket: service.socket(),
        job: "restart",
        programs: &["fio"],
        packed,
        incoming: None,
    };
    let mut guest = qemu::boot(&scratch, &setup).guest;
    guest.wait_beats(3);
    for _ in 0..rounds() {
        restart(&mut service);
        guest.wait_beats(2);
    }
    guest.type_line("stop");
    let results = guest.finish();
    results.all_ok();
    results.ok("ledger");
    assert_ne!(results.ok("storm"), "0 rounds");
    service.terminate();
    println!("ledger: {}; storm: {}; image {}", results.ok("ledger"), results.ok("storm"), md5(&image));
}

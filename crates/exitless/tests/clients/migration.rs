//! A guest moves to another QEMU, and to another instance of the service, while its I/O goes on; then to the next ones.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::needs::{self, Need};
use crate::qemu::{self, Qemu, Setup};
use crate::scratch::Scratch;
use crate::service::{self, Disk, Service};

/// Slower than the guest dirties pages through the service, so that no number of passes over its memory suffices.
const SLOW_BYTES_PER_SECOND: u64 = 12 << 20;
const FAST_BYTES_PER_SECOND: u64 = 8 << 30;
const LIMIT: Duration = Duration::from_secs(300);

#[test]
fn io_goes_on_through_live_migration_with_split_rings() {
    let Some(_turn) = turn() else { return };
    migrate(false);
}

#[test]
fn io_goes_on_through_live_migration_with_packed_rings() {
    if !service::is_ours() {
        return needs::skip("the peer has no packed rings");
    }
    let Some(_turn) = turn() else { return };
    migrate(true);
}

fn turn() -> Option<needs::Turn> {
    needs::turn(&[Need::Program("qemu-system-x86_64"), Need::PcKernel])
}

/// How often the guest moves: what is not marked dirty is lost only where a pass over memory comes between two writes.
fn moves(packed: bool) -> usize {
    match (std::env::var_os("EXITLESS_FULL"), packed) {
        (Some(_), _) => 20,
        (None, true) => 3,
        (None, false) => 1,
    }
}

fn migrate(packed: bool) {
    let scratch = Scratch::new();
    let image = scratch.image("disk", 96);
    let mut here = Service::start("service-0", Disk::Raw(image.clone()), &scratch.path("socket-0"), &[]);
    let setup = Setup {
        name: "guest-0",
        socket: here.socket(),
        job: "migration",
        programs: &[],
        packed,
        incoming: None,
    };
    let mut source = qemu::boot(&scratch, &setup);
    source.guest.wait_beats(3);
    for round in 1..=moves(packed) {
        let (service, guest) = (format!("service-{round}"), format!("guest-{round}"));
        let socket = scratch.path(&format!("socket-{round}"));
        let there = Service::start(&service, Disk::LateRaw(image.clone()), &socket, &[]);
        let wire = scratch.path(&format!("wire-{round}"));
        let incoming = Some(wire.clone());
        let mut target = qemu::boot(&scratch, &Setup { name: &guest, socket, incoming, ..setup });
        go(&mut source, &wire);
        // The guest's own ledger ends it at the first byte that is not what it wrote.
        target.guest.wait_beats(2);
        here.assert_running();
        std::mem::replace(&mut source, target).guest.kill();
        std::mem::replace(&mut here, there).terminate();
    }
    source.guest.type_line("stop");
    let results = source.guest.finish();
    results.all_ok();
    println!("ledger: {}", results.ok("ledger"));
    here.terminate();
}

/// Moves a guest that does I/O all the while.
fn go(source: &mut Qemu, wire: &Path) {
    let parameters =
        |bandwidth, downtime_ms| json!({ "max-bandwidth": bandwidth, "downtime-limit": downtime_ms });
    // A few dirty pages are too many for that, so it goes on for as long as the guest does anything.
    source.qmp.run("migrate-set-parameters", parameters(SLOW_BYTES_PER_SECOND, 1));
    source.qmp.run("migrate", json!({ "uri": format!("unix:{}", wire.display()) }));
    source.guest.wait_beats(2);
    assert_eq!(
        source.qmp.migration().0,
        "active",
        "the migration ended before the guest did any I/O during it"
    );
    source.qmp.run("migrate-set-parameters", parameters(FAST_BYTES_PER_SECOND, 2000));
    wait_completed(source);
}

fn wait_completed(source: &mut Qemu) {
    let deadline = Instant::now() + LIMIT;
    loop {
        let (status, report) = source.qmp.migration();
        match status.as_str() {
            "completed" => return println!("migrated: {report}"),
            "failed" | "cancelled" => panic!("migration {status}: {report}"),
            _ => assert!(Instant::now() < deadline, "migration still {status} after {LIMIT:?}: {report}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

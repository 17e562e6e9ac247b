//! A guest moves to another QEMU, and to another instance of the service, while its I/O goes on.

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

fn migrate(packed: bool) {
    let scratch = Scratch::new();
    let image = scratch.image("disk", 96);
    let mut here = Service::start("service-here", Disk::Raw(image.clone()), &scratch.path("here"), &[]);
    let mut there =
        Service::start("service-there", Disk::LateRaw(image.clone()), &scratch.path("there"), &[]);
    let wire = scratch.path("wire");
    let setup = Setup {
        name: "source",
        socket: here.socket(),
        job: "migration",
        programs: &[],
        packed,
        incoming: None,
    };
    let mut source = qemu::boot(&scratch, &setup);
    let setup = Setup { name: "target", socket: there.socket(), incoming: Some(wire.clone()), ..setup };
    let mut target = qemu::boot(&scratch, &setup);

    source.guest.wait_beats(3);
    let parameters =
        |bandwidth, downtime_ms| json!({ "max-bandwidth": bandwidth, "downtime-limit": downtime_ms });
    // A few dirty pages are too many for that, so it goes on for as long as the guest does anything.
    source.qmp.run("migrate-set-parameters", parameters(SLOW_BYTES_PER_SECOND, 1));
    source.qmp.run("migrate", json!({ "uri": format!("unix:{}", wire.display()) }));
    source.guest.wait_beats(3);
    assert_eq!(
        source.qmp.migration().0,
        "active",
        "the migration ended before the guest did any I/O during it"
    );
    source.qmp.run("migrate-set-parameters", parameters(FAST_BYTES_PER_SECOND, 2000));
    wait_completed(&mut source);

    target.guest.wait_beats(3);
    here.assert_running();
    there.assert_running();
    target.guest.type_line("stop");
    let results = target.guest.finish();
    results.all_ok();
    println!("ledger: {}", results.ok("ledger"));
    there.terminate();
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

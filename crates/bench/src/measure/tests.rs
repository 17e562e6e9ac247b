use std::time::Instant;

use super::*;
use crate::backend::Storage;
use crate::{case, data, peer};

const BARE: &str = "name = \"bare\"\nkind = \"bare\"\n[backends]\nnull = \"\"\nmemory = \"\"";

fn cases(matrix: &str) -> Vec<Case> {
    let head = "[[case]]\nname = \"{op}/{ring}/{client}/{queues}/{depth}\"\ngroup = \"g\"\n";
    case::parse(&[("test.toml".into(), format!("{head}{matrix}"))]).unwrap()
}

fn bare() -> Installed {
    peer::parse(&[("bare.toml".into(), BARE.into())]).unwrap()[0].detect().unwrap()
}

/// Short, and on whatever CPUs the tests run: nothing here looks at a rate.
fn run(installed: &Installed, case: &Case) -> Result<Outcome> {
    let stop = AtomicBool::new(false);
    let settings = Settings {
        cpus: Cpus { server: None, client: None },
        warmup_ms: 5,
        measure_ms: 20,
        idle_ms: 20,
        verify_bytes: 1 << 20,
        burst: crate::client::load::BURST,
        stop: &stop,
    };
    let mut storage = Storage::new(None, true);
    let target = storage.target(case.backend)?.map_err(anyhow::Error::msg)?;
    measure(installed, case, &target, &settings, true)
}

/// Again and again until the machine finds time for a request within the 20 ms.
fn measured(installed: &Installed, case: &Case) -> Measurement {
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        match run(installed, case) {
            Ok(Outcome::Measured(figures)) if figures.requests > 0 || figures.idle.is_some() => {
                return figures;
            }
            Ok(Outcome::Measured(_)) => assert!(Instant::now() < deadline, "{case}: not one request"),
            Ok(Outcome::Skipped(reason)) => panic!("{case} was skipped: {reason}"),
            Err(error) => panic!("{case}: {error:#}"),
        }
    }
}

#[test]
fn the_bare_server_answers_every_kind_of_ring_and_client() {
    let matrix = "backend = \"null\"\nop = [\"randread\", \"write\"]\nring = [\"split\", \"packed\"]\n\
                  client = [\"polled\", \"event\"]\nqueues = [1, 2]\ndepth = [1, 64]\n";
    let direct = cases(matrix);
    let indirect = cases(&format!("{matrix}indirect = true"));
    assert_eq!(direct.len(), 32);
    for case in direct.iter().chain(&indirect) {
        let figures = measured(&bare(), case);
        assert!(figures.p50_us.is_some(), "{case}");
        assert_eq!(figures.kicks_per_request, Some(0.0), "{case}: it polls");
        let calls = figures.calls_per_request.unwrap();
        assert!(
            case.client == crate::case::Client::Event || calls == 0.0,
            "{case}: {calls} calls per request"
        );
        assert_eq!(figures.verified, Verified::NothingStored);
    }
}

#[test]
fn a_server_that_stores_nothing_is_found_out() {
    let error = run(&bare(), &cases("backend = \"memory\"\nop = \"randread\"")[0]).err().unwrap();
    assert!(format!("{error:#}").contains("came back different"), "{error:#}");
}

#[test]
fn what_the_bare_server_lacks_is_skipped_with_a_reason() {
    for (matrix, reason) in [
        ("backend = \"null\"\nop = \"idle\"", "polls without end"),
        ("backend = \"null\"\nop = \"read\"\ninflight = true", "does not track requests in flight"),
        ("backend = \"tmpfs\"\nop = \"read\"", "has no backend `tmpfs`"),
    ] {
        match run(&bare(), &cases(matrix)[0]).unwrap() {
            Outcome::Skipped(found) => assert_eq!(found, reason),
            Outcome::Measured(_) => panic!("{matrix} was measured"),
        }
    }
}

#[test]
fn a_real_server_is_driven_and_its_data_verified() {
    let peers = peer::parse(&data::peers(None).unwrap()).unwrap();
    let daemon = peers.iter().find(|peer| peer.name == "qemu-storage-daemon").unwrap();
    let daemon = match daemon.detect() {
        Ok(daemon) => daemon,
        Err(reason) => return needs::skip(reason),
    };
    for case in cases(
        "backend = \"tmpfs\"\nop = [\"randread\", \"write\"]\nqueues = [1, 2]\nclient = [\"polled\", \"event\"]\ndepth = 8",
    ) {
        let figures = measured(&daemon, &case);
        assert_eq!(figures.verified, Verified::Bytes(1 << 20), "{case}");
        assert!(figures.server_cores.is_some(), "{case}");
    }
    let idle = measured(&daemon, &cases("backend = \"null\"\nop = \"idle\"\nclient = \"event\"")[0]);
    assert!(idle.idle.unwrap().own_memory_kib.unwrap() > 0);
    match run(&daemon, &cases("backend = \"null\"\nop = \"read\"\nqueues = 2\nring = \"packed\"")[0]).unwrap()
    {
        Outcome::Skipped(reason) => assert_eq!(reason, "does not offer packed rings"),
        Outcome::Measured(_) => {} // a newer daemon
    }
}

#[test]
fn fio_on_the_same_file_is_read() {
    let peers = peer::parse(&data::peers(None).unwrap()).unwrap();
    let fio = match peers.iter().find(|peer| peer.kind == PeerKind::Fio).unwrap().detect() {
        Ok(fio) => fio,
        Err(reason) => return needs::skip(reason),
    };
    match run(&fio, &cases("backend = \"tmpfs\"\nop = \"randread\"\ndepth = 4")[0]) {
        Ok(Outcome::Measured(figures)) => assert!(figures.requests > 0 && figures.p50_us.is_some()),
        Ok(Outcome::Skipped(reason)) => panic!("skipped: {reason}"),
        // A container may forbid io_uring.
        Err(error) => needs::skip(format!("{error:#}").replace('\n', " ")),
    }
}

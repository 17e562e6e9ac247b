use super::*;
use crate::backend::BackendKind;
use crate::case::Op;

fn sample(row: &str, qd: u16, iops: f64, p50_us: f64) -> Sample {
    let condition = Condition { backend: BackendKind::Null, op: Op::RandRead, qd, jobs: 1 };
    let exits = (row.len() == 1).then_some(if row == "a" { 1.5 } else { 0.0 });
    let figures = Figures {
        requests: 100,
        iops,
        p50_us,
        p99_us: 2.0 * p50_us,
        exits_per_request: exits,
        eht_percent: exits.map(|exits| exits * 40.0),
        ..Figures::default()
    };
    Sample { row: row.into(), condition, figures }
}

/// Two conditions; a peer that is not here, and one that failed once.
pub(crate) fn example() -> Report {
    let samples = [
        sample("a", 1, 20_000.0, 40.0),
        sample("h", 1, 900_000.0, 1.0),
        sample("bare-metal", 1, 1_000_000.0, 0.9),
        sample("qemu-iothread", 1, 10_000.0, 80.0),
        sample("a", 32, 400_000.0, 70.0),
        sample("h", 32, 4_000_000.0, 7.0),
        sample("a", 1, 22_000.0, 38.0),
        sample("a", 1, 18_000.0, 48.0),
    ];
    let about = |row: &str, title: &str, change: &str| About {
        row: row.into(),
        title: title.into(),
        change: change.into(),
    };
    Report {
        machine: "a processor, 2 CPUs, Linux 6".into(),
        date: "2026-01-02".into(),
        method: "100 ms each".into(),
        about: vec![
            about("a", "baseline", "one queue"),
            about("h", "no exits", "doorbells are memory"),
            about("bare-metal", "no VM", "the same without"),
            about("qemu-iothread", "QEMU, one iothread", "its own virtio-blk"),
        ],
        rows: Report::lines(&samples),
        skipped: vec![Missing {
            row: "qemu-iothreads".into(),
            condition: None,
            reason: "not available: this qemu has no iothread-vq-mapping".into(),
        }],
        failed: vec![Missing {
            row: "qemu-iothread".into(),
            condition: Some("null, randread, 32 in flight, 1 job".into()),
            reason: "it did not end".into(),
        }],
        remarks: vec!["2 jobs: 4 threads share 2 CPUs".into()],
        predictions: Vec::new(),
    }
}

#[test]
fn ratios_are_those_of_medians_under_the_same_condition() {
    let report = example();
    let find = |row: &str, qd| report.rows.iter().find(|line| line.row == row && line.qd == qd).unwrap();
    assert_eq!((find("a", 1).iops, find("a", 1).repetitions), (20_000.0, 3));
    assert_eq!(find("a", 1).ratio_to_baseline, Some(1.0));
    assert_eq!(find("h", 1).ratio_to_baseline, Some(45.0));
    assert_eq!(find("h", 1).ratio_to_bare_metal, Some(0.9));
    assert_eq!(find("h", 1).p50_ratio_to_bare_metal, Some(0.9));
    assert_eq!(find("h", 32).ratio_to_baseline, Some(10.0));
    assert_eq!(find("h", 32).ratio_to_bare_metal, None, "it was not measured there");
    assert_eq!(find("bare-metal", 1).ratio_to_bare_metal, Some(1.0));
}

#[test]
fn repetitions_with_the_cpus_farther_apart_count_only_where_there_is_nothing_else() {
    let at = |row: &str, iops, hop_ns| {
        let mut sample = sample(row, 1, iops, 1.0);
        sample.figures.hop_ns = Some(hop_ns);
        sample
    };
    let lines = Report::lines(&[at("a", 100.0, 30.0), at("a", 10.0, 150.0), at("h", 20.0, 150.0)]);
    assert_eq!((lines[0].iops, lines[0].repetitions), (100.0, 1));
    assert_eq!((lines[1].iops, lines[1].hop_ns), (20.0, Some(150.0)));
}

#[test]
fn the_best_ratio_is_one_of_the_ablations_rows() {
    let report = example();
    let best = report.best_over("a").unwrap();
    assert_eq!((best.ratio, best.line.row.as_str(), best.line.qd), (45.0, "h", 1));
    assert_eq!(report.best_over("qemu-iothread").unwrap().ratio, 90.0);
    assert_eq!(report.best_over("nobody"), None);
}

#[test]
fn json_rows_have_the_keys_that_scripts_read() {
    let json = serde_json::to_value(example()).unwrap();
    let row = json["rows"][1].as_object().unwrap();
    for key in [
        "row",
        "backend",
        "rw",
        "qd",
        "jobs",
        "iops",
        "ratio_to_baseline",
        "ratio_to_bare_metal",
        "p50_us",
        "p99_us",
        "exits_per_request",
        "eht_percent",
    ] {
        assert!(row.contains_key(key), "no `{key}`");
    }
    assert_eq!(json["rows"][3]["exits_per_request"], serde_json::Value::Null, "nobody counted QEMU's");
}

//! `exitless bench vbmq` from end to end, in real virtual machines.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::process::Command;
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(120);

/// Two rows, as short as a busy machine allows: it may find no time for a request.
fn measure(csv: &std::path::Path) -> Result<serde_json::Value, String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_exitless"));
    command.args(["bench", "vbmq", "--quick", "--json", "--only", "a", "--only", "h", "--backend", "null"]);
    command.args(["--qd", "4", "--jobs", "1", "--measure-ms", "100", "--csv"]).arg(csv);
    let output = command.output().unwrap();
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    serde_json::from_slice(&output.stdout).map_err(|error| error.to_string())
}

#[test]
fn two_rows_are_measured_and_compared() {
    if !needs::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let csv = dir.path().join("rows.csv");
    let began = Instant::now();
    let report = loop {
        match measure(&csv) {
            Ok(report) => break report,
            Err(error) => assert!(began.elapsed() < DEADLINE, "{error}"),
        }
    };
    let rows = report["rows"].as_array().unwrap();
    let names: Vec<_> = rows.iter().map(|row| row["row"].as_str().unwrap()).collect();
    assert_eq!(names, ["a", "h"]);
    assert_eq!(rows[0]["ratio_to_baseline"], 1.0);
    for row in rows {
        assert!(row["iops"].as_f64().unwrap() > 0.0 && row["exits_per_request"].is_number(), "{row}");
    }
    assert!(report["remarks"].as_array().is_some() && report["failed"].as_array().unwrap().is_empty());
    assert_eq!(std::fs::read_to_string(&csv).unwrap().lines().count(), 3);

    let mut command = Command::new(env!("CARGO_BIN_EXE_exitless"));
    let output = command.args(["bench", "vbmq", "--json", "--from"]).arg(&csv).output().unwrap();
    let again: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    for (kept, row) in again["rows"].as_array().unwrap().iter().zip(rows) {
        let whole = |row: &serde_json::Value| row["iops"].as_f64().unwrap().round();
        assert_eq!(
            (&kept["row"], whole(kept)),
            (&row["row"], whole(row)),
            "what was kept is what was measured"
        );
    }
    assert_eq!(again["rows"].as_array().unwrap().len(), rows.len());
}

#[test]
fn the_guest_can_be_had_as_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("guest.elf");
    let mut command = Command::new(env!("CARGO_BIN_EXE_exitless"));
    let status = command.args(["run", "--save-guest"]).arg(&path).status().unwrap();
    assert!(status.success());
    assert!(std::fs::read(&path).unwrap().starts_with(b"\x7fELF"));
}

//! `fio` as a pseudo-peer: the same file, the same pattern, no virtio. Shows what the storage itself does.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::backend::BackendKind;
use crate::case::{Case, Client, Op};
use crate::measure::{Outcome, Settings};
use crate::row::{Measurement, Verified};
use crate::server::process::Process;

/// Beyond warm-up and measurement, for starting and laying out.
const SLACK: Duration = Duration::from_secs(20);

/// What a fio command may use beside what every peer may.
pub(crate) fn placeholders(case: &Case, warmup_ms: u64, measure_ms: u64) -> Vec<(&'static str, String)> {
    let direct = if case.backend == BackendKind::Disk { "1" } else { "0" };
    vec![
        ("{rw}", case.op.name().into()),
        ("{block}", case.block_bytes.to_string()),
        ("{depth}", case.depth.to_string()),
        ("{direct}", direct.into()),
        ("{warmup_ms}", warmup_ms.to_string()),
        ("{measure_ms}", measure_ms.to_string()),
    ]
}

/// What fio calls the log of its rate if its command says `--write_iops_log={dir}/fio`.
const RATE_LOG: &str = "fio_iops.1.log";

/// Runs fio and reads its figures.
pub(crate) fn measure(
    command: &[String],
    case: &Case,
    dir: &Path,
    settings: &Settings<'_>,
) -> Result<Outcome> {
    if case.op == Op::Idle || case.queues > 1 || case.client == Client::Event {
        return Ok(Outcome::Skipped("has no queues, calls or idle state".into()));
    }
    let mut process = Process::start(command, dir, settings.cpus.server)?;
    let limit = Duration::from_millis(settings.warmup_ms + settings.measure_ms) + SLACK;
    let status = process.wait(limit, settings.stop)?;
    ensure!(!settings.stop.load(Ordering::Relaxed), "interrupted");
    ensure!(status.success(), "fio ended with {status}{}", process.last_output());
    let output = process.output();
    let json = output.find('{').map(|at| &output[at..]).context("fio printed no JSON")?;
    // fio may add lines after its JSON; the first value is what counts.
    let value = serde_json::Deserializer::from_str(json).into_iter().next().context("fio printed no JSON")?;
    let mut figures = figures(&value.context("fio's JSON")?, case.op)?;
    let log = std::fs::read_to_string(dir.join(RATE_LOG)).unwrap_or_default();
    figures.iops_p90 = rate_quantile(&log, 0.9);
    Ok(Outcome::Measured(figures))
}

fn figures(report: &Value, op: Op) -> Result<Measurement> {
    let job = &report["jobs"][0];
    let side = &job[if op.writes() { "write" } else { "read" }];
    let Some(iops) = side["iops"].as_f64() else { bail!("fio's JSON has no rate") };
    let percentile = |key: &str| side["clat_ns"]["percentile"][key].as_f64().map(|ns| ns / 1e3);
    let cpu =
        job["usr_cpu"].as_f64().zip(job["sys_cpu"].as_f64()).map(|(user, system)| (user + system) / 100.0);
    Ok(Measurement {
        requests: side["total_ios"].as_u64().unwrap_or(0),
        iops_mean: Some(iops),
        server_cores: cpu,
        p50_us: percentile("50.000000"),
        p99_us: percentile("99.000000"),
        p999_us: percentile("99.900000"),
        verified: Verified::NotOurs,
        ..Measurement::default()
    })
}

/// The rate that a fraction of the time does not exceed. The log has a line `ms, rate, …` for each window; one that
/// covers several milliseconds counts as many times.
fn rate_quantile(log: &str, fraction: f64) -> Option<f64> {
    let mut windows = Vec::new();
    let mut last_ms = None;
    for line in log.lines() {
        let mut fields = line.split(',').map(str::trim);
        let (ms, rate): (u64, f64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        windows.push((rate, last_ms.map_or(1, |last| ms.saturating_sub(last))));
        last_ms = Some(ms);
    }
    windows.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    let total: u64 = windows.iter().map(|(_, ms)| ms).sum();
    let rank = ((total as f64 * fraction).ceil() as u64).max(1);
    let mut seen = 0;
    windows.into_iter().find_map(|(rate, ms)| {
        seen += ms;
        (seen >= rank).then_some(rate)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read() {
        let report = serde_json::json!({"jobs": [{
            "usr_cpu": 10.0, "sys_cpu": 15.0,
            "read": {"iops": 1234.5, "total_ios": 99,
                "clat_ns": {"percentile": {"50.000000": 60000, "99.000000": 90000, "99.900000": 100000}}},
            "write": {"iops": 0.0}
        }]});
        let read = figures(&report, Op::RandRead).unwrap();
        assert_eq!((read.iops_mean, read.p50_us, read.server_cores), (Some(1234.5), Some(60.0), Some(0.25)));
        assert_eq!(read.iops(), Some(1234.5), "without windows the mean is shown");
        assert!(figures(&serde_json::json!({}), Op::Read).is_err());
    }

    #[test]
    fn long_windows_count_for_as_long_as_they_last() {
        let log = "100, 10, 0, 0, 0\n108, 20, 0, 0, 0\n109, 30, 0, 0, 0\n";
        assert_eq!(rate_quantile(log, 0.5), Some(20.0));
        assert_eq!(rate_quantile(log, 0.9), Some(20.0));
        assert_eq!(rate_quantile(log, 1.0), Some(30.0));
        assert_eq!(rate_quantile("", 0.9), None);
        assert_eq!(rate_quantile("no, log", 0.9), None);
    }
}

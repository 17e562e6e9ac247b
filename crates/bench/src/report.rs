//! What a run found out, and its forms: tables, Markdown, CSV, JSON, a drawing.

pub(crate) mod csv;
pub(crate) mod kept;
pub(crate) mod svg;
pub(crate) mod text;

use serde::Serialize;

use crate::case::Case;
use crate::measure::Settings;
use crate::row::{Row, Summary};

/// Everything about a run. Its JSON is what `--json` prints.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// What it ran on.
    pub(crate) machine: String,
    /// When it began, UTC.
    pub(crate) date: String,
    /// How it was measured, in a sentence.
    pub(crate) method: String,
    pub(crate) repetitions: u32,
    /// Name and version of those that were measured.
    pub(crate) peers: Vec<(String, String)>,
    /// Name and reason of those that are not here.
    pub(crate) absent: Vec<(String, String)>,
    pub(crate) cases: Vec<Case>,
    pub(crate) summaries: Vec<Summary>,
    /// Case, peer and reason.
    pub(crate) skipped: Vec<(String, String, String)>,
    /// Case, peer and error.
    pub(crate) failed: Vec<(String, String, String)>,
    pub(crate) remarks: Vec<String>,
    pub(crate) rows: Vec<Row>,
}

impl Report {
    pub(crate) fn new(cases: Vec<Case>) -> Self {
        Self {
            machine: machine(),
            date: today(),
            method: String::new(),
            repetitions: 0,
            peers: Vec::new(),
            absent: Vec::new(),
            cases,
            summaries: Vec::new(),
            skipped: Vec::new(),
            failed: Vec::new(),
            remarks: Vec::new(),
            rows: Vec::new(),
        }
    }

    /// Fills in how it is measured.
    pub(crate) fn describe(&mut self, settings: &Settings<'_>) {
        let place = match (settings.cpus.server, settings.cpus.client) {
            (Some(server), Some(client)) => format!("servers on CPU {server}, client on CPU {client}"),
            _ => "server and client on the same CPU".into(),
        };
        self.method = format!(
            "{place}; {} ms each after {} ms of warm-up, repetitions interleaved, medians",
            settings.measure_ms, settings.warmup_ms
        );
    }

    /// The groups of cases in order, each with its cases.
    pub(crate) fn groups(&self) -> Vec<(&str, Vec<&Case>)> {
        let mut groups: Vec<(&str, Vec<&Case>)> = Vec::new();
        for case in &self.cases {
            match groups.iter_mut().find(|(title, _)| *title == case.group) {
                Some((_, cases)) => cases.push(case),
                None => groups.push((&case.group, vec![case])),
            }
        }
        groups
    }

    pub(crate) fn summary(&self, case: &str, peer: &str) -> Option<&Summary> {
        self.summaries.iter().find(|summary| summary.case == case && summary.peer == peer)
    }
}

/// Processor, CPUs and kernel.
pub(crate) fn machine() -> String {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let info = read("/proc/cpuinfo");
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": ").map(|(_, m)| m.trim()));
    let kernel = read("/proc/sys/kernel/osrelease");
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{}, {cpus} CPUs, Linux {}", model.unwrap_or("unknown processor"), kernel.trim())
}

/// The date, UTC, by the civil-from-days algorithm (H. Hinnant, "chrono-compatible low-level date algorithms").
pub(crate) fn today() -> String {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    civil(since.map_or(0, |time| time.as_secs() / 86_400))
}

fn civil(days_since_1970: u64) -> String {
    let days = days_since_1970 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    format!("{}-{month:02}-{day:02}", era * 400 + year_of_era + carry)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::row::{Measurement, summarize};

    /// A report with two peers, two groups and a skip.
    pub(crate) fn example() -> Report {
        let text = r#"
[[case]]
name = "null/qd{depth}"
group = "4 KiB, null"
backend = "null"
op = "randread"
depth = [1, 32]
[[case]]
name = "idle"
group = "Idle guest"
backend = "null"
op = "idle"
"#;
        let mut report = Report::new(crate::case::parse(&[("t".into(), text.into())]).unwrap());
        report.peers = vec![("exitless".into(), "0.1".into()), ("other".into(), "other 7".into())];
        for (case, peer, iops) in
            [("null/qd1", "exitless", 1.1e6), ("null/qd1", "other", 2.5e5), ("null/qd32", "exitless", 6.5e6)]
        {
            for repetition in 1..=2 {
                let figures = Measurement {
                    requests: 1000,
                    iops_mean: Some(iops),
                    iops_p90: Some(iops * 1.1),
                    server_cores: Some(1.0),
                    p50_us: Some(0.8),
                    kicks_per_request: Some(0.0),
                    ..Measurement::default()
                };
                report.rows.push(Row { case: case.into(), peer: peer.into(), repetition, figures });
            }
        }
        report.skipped.push(("null/qd32".into(), "other".into(), "takes \"small\" rings".into()));
        report.summaries = summarize(&report.rows);
        report
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(civil(0), "1970-01-01");
        assert_eq!(civil(11_016), "2000-02-29");
        assert_eq!(civil(20_454), "2026-01-01");
    }

    #[test]
    fn json_has_what_its_readers_need() {
        let json = serde_json::to_value(example()).unwrap();
        for key in ["machine", "date", "method", "peers", "cases", "summaries", "skipped", "failed", "rows"] {
            assert!(json.get(key).is_some(), "no `{key}`");
        }
        assert_eq!(json["rows"].as_array().unwrap().len(), 6);
        let summary = &json["summaries"][0];
        assert_eq!((&summary["case"], &summary["peer"]), (&"null/qd1".into(), &"exitless".into()));
        assert_eq!(summary["iops_per_core"], 1.1e6);
        assert_eq!(summary["p99_us"], serde_json::Value::Null);
        assert_eq!(json["cases"][0]["backend"], "null");
    }
}

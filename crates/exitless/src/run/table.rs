//! The report for people: a table of the loads, and a list for each job that is none.

use std::collections::BTreeMap;

use serde_json::Value;
use vmm::Snapshot;

use super::report::{Measured, Report, io_threads, per, reasons};
use super::verdict::flaws;

/// What was not measured, or too little to say.
const NONE: &str = "–";

const HEADER: [&str; 11] = [
    "device",
    "load",
    "IOPS",
    "MB/s",
    "p50 µs",
    "p99 µs",
    "exits/req",
    "kicks",
    "interrupts",
    "EHT %",
    "I/O thread busy %",
];

/// All results, and what was counted while they were measured.
pub(super) fn text(report: &Report) -> String {
    let (loads, others): (Vec<_>, Vec<_>) =
        report.results.iter().partition(|measured| measured.result.number("iops").is_some());
    let mut text = String::new();
    if !loads.is_empty() {
        let cells = loads.iter().map(|measured| cells(measured, &report.disks));
        text += &aligned(&[HEADER.map(str::to_owned).to_vec()].into_iter().chain(cells).collect::<Vec<_>>());
    }
    others.iter().for_each(|measured| text += &list(measured));
    let mut sum = BTreeMap::new();
    let by_reason = report.results.iter().filter_map(|measured| measured.counted.as_ref()).map(reasons);
    by_reason.flatten().for_each(|(reason, count)| *sum.entry(reason).or_insert(0) += count);
    if !sum.is_empty() {
        let list: Vec<_> = sum.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
        text += &format!("\nexits while measuring: {}\n", list.join(", "));
    }
    for measured in &report.results {
        for flaw in flaws(&measured.result) {
            text += &format!("\n{}: {flaw}\n", title(measured, &report.disks));
        }
    }
    let lost = report.results.iter().filter_map(|measured| measured.result.count("lost_interrupts"));
    let lost = lost.sum::<u64>();
    if lost > 0 {
        text += &format!("\ninterrupts lost: {lost}, each of which the guest waited for in vain\n");
    }
    text
}

fn cells(measured: &Measured, disks: &[String]) -> Vec<String> {
    let result = &measured.result;
    let counted = measured.counted.clone().unwrap_or_default();
    let number = |value: Option<f64>, digits: usize| value.map_or(NONE.into(), |v| format!("{v:.digits$}"));
    let busy: Vec<_> =
        io_threads(&counted).iter().map(|thread| format!("{:.0}", thread.busy_percent)).collect();
    let requests = result.count("requests").unwrap_or(0);
    let exits = per(counted.exits(), requests);
    let latency = |name| number(result.number(name).filter(|_| requests > 0), 2);
    vec![
        device(measured, disks),
        load(measured),
        result.number("iops").map_or(NONE.into(), rate),
        number(result.number("bytes_per_s").map(|rate| rate / 1e6), 0),
        latency("p50_us"),
        latency("p99_us"),
        exits.map_or(NONE.into(), |v| if v == 0.0 { "0".into() } else { format!("{v:.6}") }),
        counted.kicks().to_string(),
        counted.interrupts().to_string(),
        eht(&counted),
        if busy.is_empty() { NONE.into() } else { busy.join(" ") },
    ]
}

/// Exit-handling time, with how wrong it may be.
fn eht(counted: &Snapshot) -> String {
    let text = |(percent, error): (f64, f64)| format!("{percent:.1} ±{error:.1}");
    counted.eht_percent().zip(counted.eht_error_percent()).map_or(NONE.into(), text)
}

/// What a job is called below the table.
fn title(measured: &Measured, disks: &[String]) -> String {
    let is_load = measured.result.number("iops").is_some();
    let words =
        [device(measured, disks), if is_load { load(measured) } else { measured.result.text("job").into() }];
    words.into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

/// What the load was on: a disk as the command line calls it, or a device of which there is one.
fn device(measured: &Measured, disks: &[String]) -> String {
    let disk = measured.result.count("disk").and_then(|index| disks.get(usize::try_from(index).ok()?));
    let name = disk.map_or(measured.result.text("device"), String::as_str);
    let id = measured.result.text("id");
    if id.is_empty() { name.into() } else { format!("{id} {name}") }
}

fn load(measured: &Measured) -> String {
    let result = &measured.result;
    let words = ["rw", "ring"].map(|name| result.text(name).to_owned());
    let [access, ring] = words;
    let depth = result.count("qd").map_or(String::new(), |depth| format!("qd{depth}"));
    let jobs =
        result.count("jobs").filter(|&jobs| jobs > 1).map_or(String::new(), |jobs| format!("jobs{jobs}"));
    let completion = if result.count("irq") == Some(1) { "interrupts" } else { "polled" };
    let words = [access, depth, jobs, ring, completion.to_owned()];
    words.into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

/// The figures of a job that is no load, a line each.
fn list(measured: &Measured) -> String {
    let is_figure = |value: &Value| value.is_number();
    let figures = measured.result.0.iter().filter(|(_, value)| is_figure(value));
    let width = measured.result.0.keys().map(|name| name.chars().count()).max().unwrap_or(0);
    let lines = figures.map(|(name, value)| format!("  {name:<width$}  {value}\n"));
    format!("{}\n{}", measured.result.text("job"), lines.collect::<String>())
}

/// Three significant digits with k or M.
fn rate(value: f64) -> String {
    let (value, unit) = match value {
        v if v >= 999_500.0 => (v / 1e6, " M"),
        v if v >= 999.5 => (v / 1e3, " k"),
        v => (v, ""),
    };
    let digits = if value >= 99.95 {
        0
    } else if value >= 9.995 {
        1
    } else {
        2
    };
    format!("{value:.digits$}{unit}")
}

/// Columns: the first two to the left, figures to the right.
fn aligned(rows: &[Vec<String>]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<_> = (0..HEADER.len()).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| match column {
            0 | 1 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::report::tests::report;

    #[test]
    fn a_load_says_on_what_and_how() {
        let result = json!({
            "job": "blk", "disk": 0, "qd": 32, "jobs": 2, "rw": "randread", "ring": "packed", "irq": 1, "requests": 1000,
            "iops": 1.5e6, "bytes_per_s": 6e9, "p50_us": 20.5, "p99_us": 30, "lost_interrupts": 3
        });
        let text = report(result).text(false);
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[1].starts_with("null:8G  randread qd32 jobs2 packed interrupts  1.50 M"), "{text}");
        assert!(lines[1].contains("0.005000"), "{text}");
        assert!(text.contains("exits while measuring: io_exits 2"), "{text}");
        assert!(text.contains("interrupts lost: 3"), "{text}");
    }

    #[test]
    fn what_failed_stands_under_the_table() {
        let result = json!({
            "job": "blk", "disk": 0, "qd": 1, "rw": "randwrite", "iops": 0.0, "p50_us": 0.0, "requests": 0,
            "returned": 62784, "errors": 55055
        });
        let text = report(result).text(false);
        assert!(text.contains("\nnull:8G randwrite qd1 polled: 55055 of 62784 requests failed\n"), "{text}");
        let row = text.lines().nth(1).unwrap();
        assert!(
            row.split_whitespace().filter(|cell| *cell == "–").count() >= 3,
            "a latency of nothing: {row}"
        );
    }

    #[test]
    fn a_device_that_is_no_disk_has_its_own_name() {
        let text =
            report(json!({"job": "rng", "device": "entropy", "qd": 1, "jobs": 1, "iops": 9.0})).text(false);
        assert!(text.lines().nth(1).unwrap().starts_with("entropy  qd1 polled  9.00"), "{text}");
        assert!(!text.contains("lost"), "{text}");
    }

    #[test]
    fn a_job_that_is_no_load_lists_what_it_found() {
        let text = report(json!({"job": "ring", "id": "", "exit_us": 12.5, "line_us": 0.25})).text(false);
        assert!(text.starts_with("ring\n  exit_us  12.5\n  line_us  0.25\n"), "{text}");
    }
}

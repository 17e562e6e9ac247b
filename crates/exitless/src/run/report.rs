//! What came of a run: a table for people, lines of JSON for machines.

use std::collections::BTreeMap;

use serde::Serialize;
use vmm::{Outcome, Snapshot};

use super::guest::JobResult;
use super::options::RunOptions;

/// A job of the embedded guest, and what the machine counted while it was measured.
#[derive(Clone, Debug)]
pub(super) struct Measured {
    pub(super) result: JobResult,
    pub(super) counted: Option<Snapshot>,
}

/// Everything about a run.
#[derive(Debug)]
pub(super) struct Report {
    /// A kernel of the user's ran.
    pub(super) kernel: bool,
    vcpus: u16,
    pub(super) results: Vec<Measured>,
    /// What the embedded guest complained of.
    pub(super) errors: Vec<String>,
    /// How it ended, and all that was counted.
    end: Option<(Outcome, Snapshot)>,
}

/// The figures of a job, as JSON has them.
#[derive(Debug, Serialize)]
struct Row<'a> {
    #[serde(flatten)]
    result: &'a JobResult,
    /// Kicks that caused an exit. The guest's own count is `kicks_sent`.
    kicks: u64,
    kicks_sent: u64,
    /// Interrupts that the devices raised. The guest's own count is `interrupts_taken`.
    interrupts: u64,
    interrupts_taken: u64,
    exits: u64,
    exits_per_request: Option<f64>,
    /// Exit-handling time.
    eht_percent: Option<f64>,
    exits_by_reason: BTreeMap<String, u64>,
    user_exits: u64,
    io_threads: Vec<IoThread>,
    vcpus: u16,
}

#[derive(Debug, Serialize)]
struct IoThread {
    cpu: u32,
    busy_percent: f64,
    asleep_percent: f64,
}

/// What JSON has of a kernel's run.
#[derive(Debug, Serialize)]
struct KernelRow {
    outcome: String,
    seconds: f64,
    requests: u64,
    iops: f64,
    kicks: u64,
    interrupts: u64,
    exits: u64,
    exits_per_request: Option<f64>,
    eht_percent: Option<f64>,
    exits_by_reason: BTreeMap<String, u64>,
    io_threads: Vec<IoThread>,
    vcpus: u16,
}

impl Report {
    pub(super) fn new(options: &RunOptions) -> Self {
        Self {
            kernel: options.kernel.is_some(),
            vcpus: options.vcpus(),
            results: Vec::new(),
            errors: Vec::new(),
            end: None,
        }
    }

    /// It has ended.
    pub(super) fn end(&mut self, outcome: Outcome, counted: Snapshot) {
        self.end = Some((outcome, counted));
    }

    /// The whole report.
    pub(super) fn text(&self, json: bool) -> String {
        match (json, self.kernel) {
            (true, true) => self.end.as_ref().map_or(String::new(), |end| line(&kernel_row(end, self.vcpus))),
            (true, false) => self.results.iter().map(|measured| line(&self.row(measured))).collect(),
            (false, true) => self.end.as_ref().map_or(String::new(), kernel_text),
            (false, false) => self.table(),
        }
    }

    fn row<'a>(&self, measured: &'a Measured) -> Row<'a> {
        let none = Snapshot::default();
        let counted = measured.counted.as_ref().unwrap_or(&none);
        let result = &measured.result;
        Row {
            kicks: counted.kicks(),
            kicks_sent: result.kicks,
            interrupts: counted.interrupts(),
            interrupts_taken: result.interrupts,
            exits: counted.exits(),
            exits_per_request: per(counted.exits(), result.requests),
            eht_percent: counted.eht_percent(),
            exits_by_reason: reasons(counted),
            user_exits: counted.user_exits(),
            io_threads: io_threads(counted),
            vcpus: self.vcpus,
            result,
        }
    }

    fn table(&self) -> String {
        const HEADER: [&str; 11] = [
            "job",
            "disk",
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
        let mut rows = vec![HEADER.map(str::to_owned).to_vec()];
        rows.extend(self.results.iter().map(|measured| cells(&self.row(measured))));
        if rows.len() == 1 {
            return String::new();
        }
        let mut text = aligned(&rows);
        let by_reason = self.results.iter().filter_map(|m| m.counted.as_ref()).map(reasons);
        let mut sum = BTreeMap::new();
        by_reason.flatten().for_each(|(reason, count)| *sum.entry(reason).or_insert(0) += count);
        if !sum.is_empty() {
            let list: Vec<_> = sum.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
            text += &format!("\nexits while measuring: {}\n", list.join(", "));
        }
        let lost: u64 = self.results.iter().map(|measured| measured.result.lost_interrupts).sum();
        if lost > 0 {
            text += &format!("\ninterrupts lost: {lost}, each of which the guest waited for in vain\n");
        }
        text
    }
}

fn line(row: &impl Serialize) -> String {
    serde_json::to_string(row).map_or(String::new(), |line| line + "\n")
}

fn kernel_row((outcome, counted): &(Outcome, Snapshot), vcpus: u16) -> KernelRow {
    let seconds = lifetime_s(counted);
    KernelRow {
        outcome: name(*outcome),
        seconds,
        requests: counted.requests(),
        iops: counted.requests() as f64 / seconds.max(1e-9),
        kicks: counted.kicks(),
        interrupts: counted.interrupts(),
        exits: counted.exits(),
        exits_per_request: per(counted.exits(), counted.requests()),
        eht_percent: counted.eht_percent(),
        exits_by_reason: reasons(counted),
        io_threads: io_threads(counted),
        vcpus,
    }
}

fn kernel_text((outcome, counted): &(Outcome, Snapshot)) -> String {
    let list: Vec<_> = reasons(counted).iter().map(|(reason, count)| format!("{reason} {count}")).collect();
    format!(
        "\n{} after {:.1} s: {} requests, {} kicks, {} interrupts, {} exits ({})\n",
        name(*outcome),
        lifetime_s(counted),
        counted.requests(),
        counted.kicks(),
        counted.interrupts(),
        counted.exits(),
        list.join(", ")
    )
}

/// How long the virtual CPUs lived, by the first of them.
fn lifetime_s(counted: &Snapshot) -> f64 {
    counted.vcpus.first().map_or(0.0, |vcpu| (vcpu.inside_ns + vcpu.outside_ns) as f64 / 1e9)
}

fn name(outcome: Outcome) -> String {
    match outcome {
        Outcome::PowerOff => "power off".into(),
        Outcome::Reset => "reset".into(),
        Outcome::Exit(status) => format!("exit {status}"),
        Outcome::Stopped => "stopped".into(),
    }
}

/// Exits by the kernel's reasons, where there were any.
fn reasons(counted: &Snapshot) -> BTreeMap<String, u64> {
    let is_reason = |name: &str| name.ends_with("_exits");
    counted.kvm().into_iter().filter(|(name, count)| is_reason(name) && *count > 0).collect()
}

fn io_threads(counted: &Snapshot) -> Vec<IoThread> {
    let share = |ns: u64, of: u64| ns as f64 * 100.0 / of.max(1) as f64;
    let threads = counted.threads.iter().filter(|thread| thread.total_ns > 0);
    threads
        .map(|thread| IoThread {
            cpu: thread.cpu,
            busy_percent: share(thread.busy_ns, thread.total_ns),
            asleep_percent: share(thread.asleep_ns, thread.total_ns),
        })
        .collect()
}

fn per(count: u64, requests: u64) -> Option<f64> {
    (requests > 0).then(|| count as f64 / requests as f64)
}

fn cells(row: &Row<'_>) -> Vec<String> {
    let result = row.result;
    let number = |value: Option<f64>, digits: usize| value.map_or("-".into(), |v| format!("{v:.digits$}"));
    let busy: Vec<_> = row.io_threads.iter().map(|thread| format!("{:.0}", thread.busy_percent)).collect();
    let disk =
        if result.id.is_empty() { result.ring.clone() } else { format!("{} {}", result.id, result.ring) };
    vec![
        format!("{} {} qd{} jobs{}", result.job, result.rw, result.qd, result.jobs),
        disk,
        rate(result.iops),
        format!("{:.0}", result.bytes_per_s / 1e6),
        number(Some(result.p50_us), 2),
        number(Some(result.p99_us), 2),
        row.exits_per_request.map_or("-".into(), |v| if v == 0.0 { "0".into() } else { format!("{v:.6}") }),
        row.kicks.to_string(),
        row.interrupts.to_string(),
        number(row.eht_percent, 3),
        if busy.is_empty() { "-".into() } else { busy.join(" ") },
    ]
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
    let widths: Vec<_> = (0..rows[0].len()).map(width).collect();
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
    use super::*;

    fn report() -> Report {
        let result = JobResult {
            job: "blk".into(),
            rw: "randread".into(),
            qd: 32,
            jobs: 1,
            requests: 1000,
            iops: 1.5e6,
            bytes_per_s: 6e9,
            p50_us: 20.5,
            ..JobResult::default()
        };
        let mut counted = Snapshot { at_ns: 1, ..Snapshot::default() };
        counted.vcpus.push(vmm::stats::VcpuSnapshot {
            kvm: [("exits".into(), 5), ("io_exits".into(), 2), ("halt_exits".into(), 0)].into(),
            ..Default::default()
        });
        let results = vec![Measured { result, counted: Some(counted) }];
        Report { kernel: false, vcpus: 1, results, errors: Vec::new(), end: None }
    }

    #[test]
    fn a_line_of_json_has_the_keys_that_scripts_read() {
        let row: serde_json::Value = serde_json::from_str(&report().text(true)).unwrap();
        for key in [
            "iops",
            "bytes_per_s",
            "p50_us",
            "p99_us",
            "exits_per_request",
            "kicks",
            "interrupts",
            "eht_percent",
        ] {
            assert!(row.get(key).is_some(), "no `{key}` in {row}");
        }
        assert_eq!(row["exits_per_request"], 0.005);
        assert_eq!(row["exits_by_reason"], serde_json::json!({ "io_exits": 2 }));
        assert_eq!(row["kicks"], 0);
    }

    #[test]
    fn the_table_is_aligned_and_names_reasons() {
        let text = report().text(false);
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[1].contains("1.50 M") && lines[1].contains("0.005000"), "{text}");
        assert!(text.contains("exits while measuring: io_exits 2"), "{text}");
        assert!(!text.contains("lost"), "{text}");
        let mut report = report();
        report.results[0].result.lost_interrupts = 3;
        assert!(report.text(false).contains("interrupts lost: 3"));
    }
}

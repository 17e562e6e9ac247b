//! What came of a run: a table for people, lines of JSON for machines.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Map, Value};
use vmm::{Outcome, Snapshot};

use super::guest::JobResult;
use super::options::RunOptions;
use super::table;

/// A job of the embedded guest, and what the machine counted while it was measured.
#[derive(Clone, Debug)]
pub(super) struct Measured {
    pub(super) result: JobResult,
    pub(super) counted: Option<Snapshot>,
}

/// Everything about a run.
#[derive(Debug, Default)]
pub(super) struct Report {
    /// A kernel of the user's ran.
    pub(super) kernel: bool,
    vcpus: u16,
    /// What the disks are called, in their order.
    pub(super) disks: Vec<String>,
    pub(super) results: Vec<Measured>,
    /// Requests that failed, of all disks.
    pub(super) failed: u64,
    /// A signal asked the guest to come to its end.
    pub(super) was_asked: bool,
    /// The last that the kernel said on its console is that it panicked.
    pub(super) console_panicked: bool,
    /// What the embedded guest complained of.
    pub(super) errors: Vec<String>,
    /// How it ended, and all that was counted.
    end: Option<(Outcome, Snapshot)>,
}

/// What the machine counted. The guest's own counts are `kicks_sent` and `interrupts_taken`.
#[derive(Debug, Serialize)]
struct Counted {
    /// Kicks that caused an exit.
    kicks: u64,
    /// Times that notification pages became memory, and the guest's page faults from one time to the next.
    doorbell_maps: u64,
    doorbell_faults: u64,
    /// Interrupts that the devices raised.
    interrupts: u64,
    exits: u64,
    exits_per_request: Option<f64>,
    /// Exit-handling time, and by how many points it may be wrong.
    eht_percent: Option<f64>,
    eht_error_percent: Option<f64>,
    exits_by_reason: BTreeMap<String, u64>,
    user_exits: u64,
    io_threads: Vec<IoThread>,
    vcpus: u16,
}

#[derive(Debug, Serialize)]
pub(super) struct IoThread {
    cpu: u32,
    pub(super) busy_percent: f64,
    asleep_percent: f64,
}

/// What JSON has of a kernel's run.
#[derive(Debug, Serialize)]
struct KernelRow {
    outcome: String,
    seconds: f64,
    requests: u64,
    errors: u64,
    iops: f64,
    #[serde(flatten)]
    counted: Counted,
}

impl Report {
    pub(super) fn new(options: &RunOptions, disks: Vec<String>) -> Self {
        Self { kernel: options.kernel.is_some(), vcpus: options.vcpus(), disks, ..Self::default() }
    }

    /// It has ended.
    pub(super) fn end(&mut self, outcome: Outcome, counted: Snapshot) {
        self.end = Some((outcome, counted));
    }

    /// The whole report.
    pub(super) fn text(&self, json: bool) -> String {
        match (json, self.kernel) {
            (true, true) => self.end.as_ref().map_or(String::new(), |end| line(&self.kernel_row(end))),
            (true, false) => self.results.iter().map(|measured| line(&self.row(measured))).collect(),
            (false, true) => self.end.as_ref().map_or(String::new(), |end| self.kernel_text(end)),
            (false, false) => table::text(self),
        }
    }

    /// What the guest measured and what the machine counted, side by side.
    fn row(&self, measured: &Measured) -> Map<String, Value> {
        let mut row = measured.result.0.clone();
        for (theirs, name) in [("kicks", "kicks_sent"), ("interrupts", "interrupts_taken")] {
            let count = row.remove(theirs).unwrap_or(Value::Null);
            row.insert(name.into(), count);
        }
        let counted = measured.counted.clone().unwrap_or_default();
        let requests = measured.result.count("requests").unwrap_or(0);
        if let Ok(Value::Object(counted)) = serde_json::to_value(count(&counted, requests, self.vcpus)) {
            row.extend(counted);
        }
        row
    }

    fn kernel_row(&self, (outcome, counted): &(Outcome, Snapshot)) -> KernelRow {
        let (seconds, requests) = (lifetime_s(counted), counted.requests());
        KernelRow {
            outcome: name(*outcome),
            seconds,
            requests,
            errors: self.failed,
            iops: requests.saturating_sub(self.failed) as f64 / seconds.max(1e-9),
            counted: count(counted, requests, self.vcpus),
        }
    }

    fn kernel_text(&self, (outcome, counted): &(Outcome, Snapshot)) -> String {
        let list = reasons(counted);
        let list: Vec<_> = list.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
        let failed = if self.failed > 0 { format!(" ({} failed)", self.failed) } else { String::new() };
        format!(
            "\n{} after {:.1} s: {} requests{failed}, {} kicks, {} interrupts, {} exits ({})\n",
            name(*outcome),
            lifetime_s(counted),
            counted.requests(),
            counted.kicks(),
            counted.interrupts(),
            counted.exits(),
            list.join(", ")
        )
    }
}

fn count(counted: &Snapshot, requests: u64, vcpus: u16) -> Counted {
    Counted {
        kicks: counted.kicks(),
        doorbell_maps: counted.queues.iter().map(|queue| queue.doorbell.maps).sum(),
        doorbell_faults: counted.queues.iter().map(|queue| queue.doorbell.faults).sum(),
        interrupts: counted.interrupts(),
        exits: counted.exits(),
        exits_per_request: per(counted.exits(), requests),
        eht_percent: counted.eht_percent(),
        eht_error_percent: counted.eht_error_percent(),
        exits_by_reason: reasons(counted),
        user_exits: counted.user_exits(),
        io_threads: io_threads(counted),
        vcpus,
    }
}

fn line(row: &impl Serialize) -> String {
    serde_json::to_string(row).map_or(String::new(), |line| line + "\n")
}

/// How long the virtual CPUs lived, by the first of them.
fn lifetime_s(counted: &Snapshot) -> f64 {
    counted.vcpus.first().map_or(0.0, |vcpu| (vcpu.inside_ns + vcpu.outside_ns) as f64 / 1e9)
}

fn name(outcome: Outcome) -> String {
    match outcome {
        Outcome::PowerOff => "power off".into(),
        Outcome::Reset => "reset".into(),
        Outcome::TripleFault => "triple fault".into(),
        Outcome::Panicked => "panic".into(),
        Outcome::Exit(status) => format!("exit {status}"),
        Outcome::Stopped => "stopped".into(),
    }
}

/// Exits by the kernel's reasons, where there were any.
pub(super) fn reasons(counted: &Snapshot) -> BTreeMap<String, u64> {
    let is_reason = |name: &str| name.ends_with("_exits");
    counted.kvm().into_iter().filter(|(name, count)| is_reason(name) && *count > 0).collect()
}

pub(super) fn io_threads(counted: &Snapshot) -> Vec<IoThread> {
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

pub(super) fn per(count: u64, requests: u64) -> Option<f64> {
    (requests > 0).then(|| count as f64 / requests as f64)
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;

    /// A load on a disk, as the guest and the machine report it.
    pub(in crate::run) fn report(result: Value) -> Report {
        let Value::Object(result) = result else { panic!("no object") };
        let mut counted = Snapshot { at_ns: 1, ..Snapshot::default() };
        counted.vcpus.push(vmm::stats::VcpuSnapshot {
            kvm: [("exits".into(), 5), ("io_exits".into(), 2), ("halt_exits".into(), 0)].into(),
            ..Default::default()
        });
        let results = vec![Measured { result: JobResult(result), counted: Some(counted) }];
        Report { vcpus: 1, disks: vec!["null:8G".into()], results, ..Report::default() }
    }

    #[test]
    fn a_line_of_json_has_the_keys_that_scripts_read() {
        let result = json!({
            "job": "blk", "requests": 1000, "iops": 1.5e6, "bytes_per_s": 6e9, "p50_us": 20.5, "p99_us": 30, "kicks": 7,
            "interrupts": 8, "lost_interrupts": 0
        });
        let row: Value = serde_json::from_str(&report(result).text(true)).unwrap();
        for key in [
            "iops",
            "bytes_per_s",
            "p50_us",
            "p99_us",
            "exits_per_request",
            "kicks",
            "interrupts",
            "eht_percent",
            "eht_error_percent",
        ] {
            assert!(row.get(key).is_some(), "no `{key}` in {row}");
        }
        assert_eq!(row["exits_per_request"], 0.005);
        assert_eq!(row["exits_by_reason"], json!({ "io_exits": 2 }));
        assert_eq!((&row["kicks"], &row["kicks_sent"]), (&json!(0), &json!(7)));
        assert_eq!((&row["interrupts"], &row["interrupts_taken"]), (&json!(0), &json!(8)));
    }

    #[test]
    fn requests_of_a_kernel_that_failed_are_no_work() {
        let mut counted = Snapshot::default();
        counted.queues.push(vmm::stats::QueueSnapshot::default());
        counted.queues[0].counters.requests = 10;
        let vcpu = vmm::stats::VcpuSnapshot { inside_ns: 2_000_000_000, ..Default::default() };
        counted.vcpus.push(vcpu);
        let mut report = Report { kernel: true, failed: 4, ..Report::default() };
        report.end(Outcome::PowerOff, counted);
        let row: Value = serde_json::from_str(&report.text(true)).unwrap();
        assert_eq!((&row["requests"], &row["errors"], &row["iops"]), (&json!(10), &json!(4), &json!(3.0)));
        assert!(report.text(false).contains("10 requests (4 failed)"));
    }

    #[test]
    fn whatever_a_job_measures_is_in_its_line() {
        let row: Value =
            serde_json::from_str(&report(json!({"job": "ring", "exit_us": 12.5})).text(true)).unwrap();
        assert_eq!((&row["exit_us"], &row["exits_per_request"]), (&json!(12.5), &Value::Null));
        assert!(row.get("iops").is_none(), "{row}");
    }
}

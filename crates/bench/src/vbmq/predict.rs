//! What the measured costs promise for more queues than this machine has CPUs for, and how far the same model is from
//! what was measured.

use serde::Serialize;

use super::model::{self, Costs, Shape};
use super::report::Line;
use super::rows::BARE_METAL;
use crate::report::text::rate;

/// The rows that are predicted: one I/O thread for all queues, and one for each. The former is calibrated with one job,
/// where it is the baseline.
const SHARED: &str = "b";
const OWN: &str = "h";
const QUEUES: [u32; 7] = [1, 2, 4, 8, 16, 32, 64];

/// One row under one backend and pattern, at one depth.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Prediction {
    pub(crate) row: String,
    pub(crate) backend: &'static str,
    pub(crate) rw: &'static str,
    pub(crate) qd: u16,
    pub(crate) costs: Costs,
    /// Queues and IOPS, with CPUs for all vCPUs and I/O threads.
    pub(crate) predicted: Vec<(u32, f64)>,
    /// What can be compared on this machine.
    pub(crate) checked: Vec<Checked>,
}

/// A prediction for this machine's CPUs beside the measurement.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Checked {
    pub(crate) queues: u16,
    pub(crate) qd: u16,
    pub(crate) predicted: f64,
    pub(crate) measured: f64,
}

/// Predictions for every backend and pattern in `lines`, measured on `cpus` CPUs.
pub(crate) fn predict(lines: &[Line], cpus: usize) -> Vec<Prediction> {
    let mut kinds: Vec<_> = lines.iter().map(|line| (line.backend, line.rw)).collect();
    kinds.dedup();
    let each = kinds.into_iter().flat_map(|kind| [SHARED, OWN].map(|row| one(lines, row, kind, cpus as u32)));
    each.flatten().collect()
}

fn one(
    lines: &[Line],
    row: &str,
    (backend, rw): (&'static str, &'static str),
    cpus: u32,
) -> Option<Prediction> {
    let here = || lines.iter().filter(|line| (line.backend, line.rw) == (backend, rw));
    let of_row: Vec<_> = here().filter(|line| line.row == row).collect();
    let single: Vec<_> = of_row.iter().filter(|line| line.jobs == 1).collect();
    let deepest = single.iter().max_by_key(|line| line.qd)?;
    let io_us = deepest.io_us_per_request?;
    // What the storage gives without a VM is the most that all queues together can have.
    let fastest = here().filter(|line| line.row == BARE_METAL).map(|line| line.iops).fold(0.0, f64::max);
    let device_us = if backend == "file" && fastest > 0.0 { 1e6 / fastest } else { 0.0 };
    let measured: Vec<_> = single.iter().map(|line| (line.qd, line.iops)).collect();
    let costs = model::fit(&measured, io_us, device_us)?;
    let qd = single.iter().map(|line| line.qd).find(|&qd| qd == 32).unwrap_or(deepest.qd);

    let threads = |queues: u32| if row == SHARED { 1 } else { queues };
    let enough = |queues| Shape { queues, qd: qd.into(), vcpus: queues, io_threads: threads(queues) };
    let predicted = QUEUES.map(|queues| (queues, model::iops(&costs, enough(queues)))).to_vec();
    let checked = of_row.iter().map(|line| {
        let queues = u32::from(line.jobs);
        let io_threads = threads(queues).min(cpus / 2).max(1);
        let vcpus = queues.min(cpus.saturating_sub(io_threads)).max(1);
        // vCPUs that poll never give way: of those that share a CPU, one at a time keeps its queue going.
        let active = if row == OWN { queues.min(vcpus) } else { queues };
        let shape = Shape { queues: active, qd: line.qd.into(), vcpus, io_threads };
        Checked { queues: line.jobs, qd: line.qd, predicted: model::iops(&costs, shape), measured: line.iops }
    });
    let checked = checked.collect();
    Some(Prediction { row: row.to_owned(), backend, rw, qd, costs, predicted, checked })
}

impl Prediction {
    pub(crate) fn text(&self) -> String {
        let Costs { vcpu_us, io_us, device_us, delay_us } = self.costs;
        let device = if device_us > 0.0 { format!(", storage {device_us:.2} µs") } else { String::new() };
        let predicted: Vec<_> =
            self.predicted.iter().map(|(queues, iops)| format!("{queues}: {}", rate(*iops))).collect();
        let checked = self.checked.iter().map(|check| {
            let Checked { queues, qd, predicted, measured } = check;
            format!("{queues}x{qd}: {} for {}", rate(*predicted), rate(*measured))
        });
        format!(
            "\nModel of row ({}), {}, {}: a request takes a vCPU {vcpu_us:.3} µs, an I/O thread {io_us:.3} µs{device}, \
             and is {delay_us:.2} µs on its way\n  with CPUs for all, {} in flight, by queues: {}\n  on this machine, \
             predicted for measured, queues x in flight: {}\n",
            self.row,
            self.backend,
            self.rw,
            self.qd,
            predicted.join(", "),
            checked.collect::<Vec<_>>().join(", ")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(row: &str, qd: u16, jobs: u16, iops: f64) -> Line {
        Line {
            row: row.into(),
            backend: "null",
            rw: "randread",
            qd,
            jobs,
            iops,
            ratio_to_baseline: None,
            ratio_to_bare_metal: None,
            p50_us: 1.0,
            p99_us: 1.0,
            exits_per_request: None,
            eht_percent: None,
            p50_ratio_to_bare_metal: None,
            io_us_per_request: Some(0.1),
            hop_ns: None,
            repetitions: 1,
        }
    }

    #[test]
    fn one_queue_calibrates_and_all_are_checked() {
        let lines = [
            line("b", 1, 1, 25e3),
            line("b", 32, 1, 800e3),
            line("h", 1, 1, 1e6),
            line("h", 32, 1, 6e6),
            line("h", 32, 2, 6e6),
        ];
        let predictions = predict(&lines, 2);
        assert_eq!(predictions.len(), 2);
        let own = &predictions[1];
        assert_eq!((own.row.as_str(), own.qd, own.checked.len()), ("h", 32, 3));
        let one = own.predicted[0].1;
        assert!((own.predicted[6].1 / one - 64.0).abs() < 0.1, "queues of their own add up");
        assert!(predictions[0].predicted[6].1 <= 10.01e6, "one I/O thread is the ceiling");
        let shared = own.checked[2];
        assert!((shared.predicted / one - 1.0).abs() < 0.01, "two queues on the CPUs of one: {shared:?}");
        assert!(own.text().contains("64:") && own.text().contains("2x32:"), "{}", own.text());
    }

    #[test]
    fn without_measurements_nothing_is_predicted() {
        assert!(predict(&[], 2).is_empty());
        assert!(predict(&[line("a", 1, 1, 1e4)], 2).is_empty());
    }
}

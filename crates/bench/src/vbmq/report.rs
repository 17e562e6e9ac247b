//! What was measured, with its ratios: as a table, CSV, JSON and a drawing.

pub(crate) mod csv;
pub(crate) mod svg;
pub(crate) mod text;

use serde::Serialize;

use super::condition::Condition;
use super::figures::Figures;
use super::predict::Prediction;
use super::rows::{BARE_METAL, BASELINE, Row};
use crate::hop;
use crate::row::median;

/// One repetition.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    pub(crate) row: String,
    pub(crate) condition: Condition,
    pub(crate) figures: Figures,
}

/// One row under one condition: medians, and ratios of medians.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Line {
    pub(crate) row: String,
    pub(crate) backend: &'static str,
    pub(crate) rw: &'static str,
    pub(crate) qd: u16,
    pub(crate) jobs: u16,
    pub(crate) iops: f64,
    pub(crate) ratio_to_baseline: Option<f64>,
    pub(crate) ratio_to_bare_metal: Option<f64>,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) exits_per_request: Option<f64>,
    pub(crate) eht_percent: Option<f64>,
    /// The median latency without a virtual machine, divided by this row's: what `ratio_to_bare_metal` would be on a
    /// machine with nothing else to do.
    pub(crate) p50_ratio_to_bare_metal: Option<f64>,
    pub(crate) io_us_per_request: Option<f64>,
    /// How far apart the CPUs were, see `bench blk`.
    pub(crate) hop_ns: Option<f64>,
    pub(crate) repetitions: usize,
}

/// A row, for those who read the report.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct About {
    pub(crate) row: String,
    pub(crate) title: String,
    pub(crate) change: String,
}

impl About {
    pub(crate) fn of(row: &Row) -> Self {
        Self { row: row.name.clone(), title: row.title.clone(), change: row.change.clone() }
    }
}

/// Why something is missing.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Missing {
    pub(crate) row: String,
    /// The condition; None if it is missing altogether.
    pub(crate) condition: Option<String>,
    pub(crate) reason: String,
}

/// A whole run.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    pub(crate) machine: String,
    pub(crate) date: String,
    pub(crate) method: String,
    pub(crate) about: Vec<About>,
    pub(crate) rows: Vec<Line>,
    pub(crate) skipped: Vec<Missing>,
    pub(crate) failed: Vec<Missing>,
    pub(crate) remarks: Vec<String>,
    pub(crate) predictions: Vec<Prediction>,
}

/// The best of the ratios.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Best<'a> {
    pub(crate) ratio: f64,
    pub(crate) line: &'a Line,
}

impl Report {
    /// Medians of `samples` in the order in which row and condition first appear, grouped by condition.
    pub(crate) fn lines(samples: &[Sample]) -> Vec<Line> {
        let mut conditions: Vec<Condition> = Vec::new();
        let mut rows: Vec<&str> = Vec::new();
        for sample in samples {
            if !conditions.contains(&sample.condition) {
                conditions.push(sample.condition);
            }
            if !rows.contains(&sample.row.as_str()) {
                rows.push(&sample.row);
            }
        }
        let mut lines = Vec::new();
        for condition in &conditions {
            let from = lines.len();
            lines.extend(rows.iter().filter_map(|row| line(row, condition, samples)));
            compare(&mut lines[from..]);
        }
        lines
    }

    /// The lines of each condition, which stand together.
    pub(crate) fn groups(&self) -> Vec<&[Line]> {
        self.rows
            .chunk_by(|a, b| (a.backend, a.rw, a.qd, a.jobs) == (b.backend, b.rw, b.qd, b.jobs))
            .collect()
    }

    /// The highest rate of the ablation's rows over that of row `other`, under the same condition.
    pub(crate) fn best_over(&self, other: &str) -> Option<Best<'_>> {
        let ratios = self.groups().into_iter().flat_map(|group| {
            let other = group.iter().find(|line| line.row == other);
            let ours = group.iter().filter(|line| line.row.len() == 1 && line.row != BASELINE);
            ours.filter_map(move |line| {
                let other = other.filter(|other| line.is_as_near_as(other))?;
                Some(Best { ratio: line.iops / other.iops, line })
            })
        });
        ratios.max_by(|a, b| a.ratio.total_cmp(&b.ratio))
    }
}

impl Line {
    /// Whether both were measured with the CPUs at one distance: ratios of others say nothing.
    fn is_as_near_as(&self, other: &Self) -> bool {
        let Some((ours, theirs)) = self.hop_ns.zip(other.hop_ns) else { return true };
        hop::is_near(ours, theirs)
    }

    pub(crate) fn condition(&self) -> String {
        let jobs = if self.jobs == 1 { "1 job".to_owned() } else { format!("{} jobs", self.jobs) };
        format!("{}, {}, {} in flight, {jobs}", self.backend, self.rw, self.qd)
    }
}

/// The shortest distance between the CPUs at which something was measured.
pub(crate) fn nearest_ns(samples: &[Sample]) -> Option<f64> {
    hop::nearest_ns(samples.iter().filter_map(|sample| sample.figures.hop_ns))
}

/// Medians over repetitions. Those during which the CPUs were farther apart than in others do not count, unless there
/// is no other one.
fn line(row: &str, condition: &Condition, samples: &[Sample]) -> Option<Line> {
    let nearest_ns = nearest_ns(samples).unwrap_or(f64::INFINITY);
    let mut all: Vec<_> = samples.iter().filter(|s| s.row == row && s.condition == *condition).collect();
    let is_near = |s: &&Sample| s.figures.hop_ns.is_none_or(|ns| hop::is_near(ns, nearest_ns));
    if all.iter().any(is_near) {
        all.retain(is_near);
    }
    let of = |figure: fn(&Figures) -> Option<f64>| median(all.iter().filter_map(|s| figure(&s.figures)));
    Some(Line {
        row: row.to_owned(),
        backend: condition.backend_name(),
        rw: condition.op.name(),
        qd: condition.qd,
        jobs: condition.jobs,
        iops: of(|f| Some(f.iops))?,
        ratio_to_baseline: None,
        ratio_to_bare_metal: None,
        p50_us: of(|f| Some(f.p50_us))?,
        p99_us: of(|f| Some(f.p99_us))?,
        exits_per_request: of(|f| f.exits_per_request),
        eht_percent: of(|f| f.eht_percent),
        p50_ratio_to_bare_metal: None,
        io_us_per_request: of(|f| f.io_us_per_request),
        hop_ns: of(|f| f.hop_ns),
        repetitions: all.len(),
    })
}

/// Fills in the ratios of the lines of one condition.
fn compare(lines: &mut [Line]) {
    let find = |name: &str| lines.iter().find(|line| line.row == name && line.iops > 0.0).cloned();
    let (baseline, bare) = (find(BASELINE), find(BARE_METAL));
    for line in lines {
        let comparable = |other: &&Line| line.is_as_near_as(other);
        let over = |other: Option<&Line>| other.filter(comparable).map(|other| line.iops / other.iops);
        let ratio_to_baseline = over(baseline.as_ref());
        let ratio_to_bare_metal = over(bare.as_ref());
        let p50 = bare.as_ref().filter(comparable).filter(|_| line.p50_us > 0.0);
        let p50_ratio_to_bare_metal = p50.map(|bare| bare.p50_us / line.p50_us);
        line.ratio_to_baseline = ratio_to_baseline;
        line.ratio_to_bare_metal = ratio_to_bare_metal;
        line.p50_ratio_to_bare_metal = p50_ratio_to_bare_metal;
    }
}

#[cfg(test)]
pub(crate) mod tests;

//! The report for people: aligned tables that are Markdown as well.

use crate::case::Op;
use crate::report::Report;
use crate::row::{Measurement, Summary};

/// Cells in columns; the first column is left-aligned, the others right-aligned.
pub(crate) struct Table(Vec<Vec<String>>);

impl Table {
    pub(crate) fn new(header: &[&str]) -> Self {
        Self(vec![header.iter().map(ToString::to_string).collect()])
    }

    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.0.push(cells);
    }

    pub(crate) fn text(&self) -> String {
        let columns = self.0[0].len();
        let width =
            |column: usize| self.0.iter().map(|row| row[column].chars().count()).max().unwrap_or(0).max(3);
        let widths: Vec<_> = (0..columns).map(width).collect();
        let line = |row: &Vec<String>| {
            let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| match column {
                0 => format!(" {cell:<width$} |"),
                _ => format!(" {cell:>width$} |"),
            });
            format!("|{}\n", cells.collect::<String>())
        };
        let rule = widths.iter().enumerate().map(|(column, &width)| match column {
            0 => format!("{:-<1$}|", "", width + 2),
            _ => format!("{:-<1$}:|", "", width + 1),
        });
        let rule = format!("|{}\n", rule.collect::<String>());
        self.0
            .iter()
            .enumerate()
            .map(|(at, row)| if at == 0 { line(row) + &rule } else { line(row) })
            .collect()
    }
}

/// A table for each group of cases.
pub(crate) fn tables(report: &Report) -> String {
    let mut text = preamble(report);
    for (title, cases) in report.groups() {
        let idle = cases.iter().all(|case| case.op == Op::Idle);
        let header: &[&str] = if idle {
            &["case", "server", "CPU %", "own memory MiB"]
        } else {
            &[
                "case",
                "server",
                "IOPS",
                "mean",
                "per core",
                "p50 µs",
                "p99 µs",
                "p99.9 µs",
                "kicks/req",
                "calls/req",
            ]
        };
        let mut table = Table::new(header);
        let mut any = false;
        for case in &cases {
            for summary in report.peers.iter().filter_map(|(peer, _)| report.summary(&case.name, peer)) {
                any = true;
                table.row(if idle { idle_cells(summary) } else { cells(summary) });
            }
        }
        if any {
            text += &format!("\n{title}\n\n{}", table.text());
        }
    }
    text + &ending(report)
}

fn cells(summary: &Summary) -> Vec<String> {
    let median = &summary.median;
    let us = |value: Option<f64>| value.map_or("-".into(), microseconds);
    let ratio = |value: Option<f64>| {
        value.map_or("-".into(), |v| if v == 0.0 { "0".into() } else { format!("{v:.3}") })
    };
    vec![
        summary.case.clone(),
        summary.peer.clone(),
        median.iops().map_or("-".into(), rate),
        median.iops_mean.map_or("-".into(), rate),
        summary.iops_per_core.map_or("-".into(), rate),
        us(median.p50_us),
        us(median.p99_us),
        us(median.p999_us),
        ratio(median.kicks_per_request),
        ratio(median.calls_per_request),
    ]
}

fn idle_cells(summary: &Summary) -> Vec<String> {
    let idle = summary.median.idle;
    let memory = idle.and_then(|idle| idle.own_memory_kib);
    vec![
        summary.case.clone(),
        summary.peer.clone(),
        idle.map_or("-".into(), |idle| format!("{:.2}", idle.cores * 100.0)),
        memory.map_or("-".into(), |kib| format!("{:.1}", kib as f64 / 1024.0)),
    ]
}

/// One row for each case, one column for each peer.
pub(crate) fn markdown(report: &Report) -> String {
    let peers: Vec<&str> = report.peers.iter().map(|(name, _)| name.as_str()).collect();
    let mut header = vec!["IOPS (p50 latency)"];
    header.extend(&peers);
    let mut table = Table::new(&header);
    for case in report.cases.iter().filter(|case| case.op != Op::Idle) {
        let mut row = vec![case.name.clone()];
        row.extend(peers.iter().map(|peer| report.summary(&case.name, peer).map_or("-".into(), compact)));
        table.row(row);
    }
    preamble(report) + "\n" + &table.text() + &ending(report)
}

fn compact(summary: &Summary) -> String {
    let rate = summary.median.iops().map_or("-".into(), rate);
    summary.median.p50_us.map_or(rate.clone(), |us| format!("{rate} ({} µs)", microseconds(us)))
}

fn preamble(report: &Report) -> String {
    let versions = report.peers.iter().map(|(name, version)| match version.as_str() {
        "" => name.clone(),
        version if version.contains(name.as_str()) => version.to_owned(),
        version => format!("{name} ({version})"),
    });
    format!(
        "{}: {}\nrepetitions: {}; {}\nServers: {}\nIOPS is the 90th percentile of 1-ms windows (the mean where there are none).\n",
        report.date,
        report.machine,
        report.repetitions,
        report.method,
        versions.collect::<Vec<_>>().join(", ")
    )
}

/// What is not in the tables, and why.
fn ending(report: &Report) -> String {
    let mut text = String::new();
    let mut section = |title: &str, lines: Vec<String>| {
        if !lines.is_empty() {
            text += &format!(
                "\n{title}\n\n{}",
                lines.into_iter().map(|line| format!("- {line}\n")).collect::<String>()
            );
        }
    };
    section("Remarks", report.remarks.clone());
    section(
        "Not installed",
        report.absent.iter().map(|(peer, reason)| format!("{peer}: {reason}")).collect(),
    );
    let mut reasons: Vec<(&str, &str, Vec<&str>)> = Vec::new();
    for (case, peer, reason) in &report.skipped {
        match reasons.iter_mut().find(|(p, r, _)| p == peer && r == reason) {
            Some((_, _, cases)) => cases.push(case),
            None => reasons.push((peer, reason, vec![case])),
        }
    }
    let skipped = reasons.iter().map(|(peer, reason, cases)| format!("{peer} {reason}: {}", few(cases)));
    section("Skipped", skipped.collect());
    section(
        "Failed",
        report.failed.iter().map(|(case, peer, error)| format!("{case}, {peer}: {error}")).collect(),
    );
    text
}

/// The first names, and how many more there are.
fn few(names: &[&str]) -> String {
    const SHOWN: usize = 3;
    let shown = names[..names.len().min(SHOWN)].join(", ");
    if names.len() > SHOWN { format!("{shown} and {} more", names.len() - SHOWN) } else { shown }
}

/// Cases and peers, without measuring.
pub(crate) fn list(report: &Report) -> String {
    let mut text = String::from("Peers\n");
    for (name, version) in &report.peers {
        text += &format!("  {name}  {version}\n");
    }
    for (name, reason) in &report.absent {
        text += &format!("  {name}  not here: {reason}\n");
    }
    text += "Cases\n";
    for (title, cases) in report.groups() {
        text += &format!("  {title}\n");
        for case in cases {
            text += &format!("    {case}{}\n", if case.quick { "  (quick)" } else { "" });
        }
    }
    text
}

/// The line for a repetition.
pub(crate) fn one_line(figures: &Measurement) -> String {
    if let Some(idle) = figures.idle {
        return format!("{:.2} % of a CPU", idle.cores * 100.0);
    }
    let p50 = figures.p50_us.map_or("-".into(), microseconds);
    format!("{} IOPS, p50 {p50} µs", figures.iops().map_or("-".into(), rate))
}

/// Three significant digits with k or M.
pub(crate) fn rate(value: f64) -> String {
    let (value, unit) = match value {
        v if v >= 999_500.0 => (v / 1e6, " M"),
        v if v >= 999.5 => (v / 1e3, " k"),
        v => (v, ""),
    };
    format!("{}{unit}", three_digits(value))
}

pub(crate) fn microseconds(value: f64) -> String {
    three_digits(value)
}

fn three_digits(value: f64) -> String {
    match value {
        v if v >= 99.95 => format!("{v:.0}"),
        v if v >= 9.995 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::example;

    #[test]
    fn rates_have_three_digits() {
        let rates = [5.0, 999.0, 12_345.0, 999_499.0, 999_500.0, 6_721_000.0].map(rate);
        assert_eq!(rates, ["5.00", "999", "12.3 k", "999 k", "1.00 M", "6.72 M"]);
    }

    #[test]
    fn tables_are_aligned_and_markdown() {
        for text in [tables(&example()), markdown(&example())] {
            let table: Vec<_> = text.lines().filter(|line| line.starts_with('|')).collect();
            let widths: Vec<_> = table.iter().map(|line| line.chars().count()).collect();
            assert!(table.len() >= 4 && widths.iter().all(|width| *width == widths[0]), "{text}");
            assert!(table[1].chars().all(|c| "|-:".contains(c)));
            assert!(text.contains("1.21 M"));
            assert!(text.contains("- other takes \"small\" rings: null/qd32"));
        }
    }

    #[test]
    fn a_peer_without_figures_has_a_dash() {
        let text = markdown(&example());
        let line = text.lines().find(|line| line.contains("null/qd32 ")).unwrap();
        assert!(line.trim_end_matches(['|', ' ']).ends_with('-'), "{line}");
    }
}

//! The report for people: a table for each condition, which is Markdown as well.

use super::{Line, Missing, Report};
use crate::report::text::{Table, microseconds, rate};

pub(crate) fn text(report: &Report) -> String {
    let mut text = format!("{}: {}\n{}\n\n", report.date, report.machine, report.method);
    for about in &report.about {
        text += &format!("{}: {}: {}\n", about.row, about.title, about.change);
    }
    for group in report.groups() {
        let mut table = Table::new(&[
            "row",
            "IOPS",
            "to (a)",
            "to bare metal",
            "p50 µs",
            "p99 µs",
            "p50 to bare",
            "exits/req",
            "EHT %",
        ]);
        group.iter().for_each(|line| table.row(cells(line)));
        text += &format!("\n{}\n\n{}", group[0].condition(), table.text());
    }
    text += &conclusion(report);
    for prediction in &report.predictions {
        text += &prediction.text();
    }
    section(&mut text, "Remarks", report.remarks.clone());
    section(&mut text, "Not measured", grouped(&report.skipped));
    section(&mut text, "Failed", grouped(&report.failed));
    text
}

fn cells(line: &Line) -> Vec<String> {
    let times = |ratio: Option<f64>| ratio.map_or("-".into(), |ratio| format!("{ratio:.2}"));
    vec![
        line.row.clone(),
        rate(line.iops),
        times(line.ratio_to_baseline),
        times(line.ratio_to_bare_metal),
        microseconds(line.p50_us),
        microseconds(line.p99_us),
        times(line.p50_ratio_to_bare_metal),
        line.exits_per_request.map_or("-".into(), |v| if v == 0.0 { "0".into() } else { format!("{v:.5}") }),
        line.eht_percent.map_or("-".into(), |v| format!("{v:.2}")),
    ]
}

/// The figures that the ablation is about.
fn conclusion(report: &Report) -> String {
    let mut text = String::new();
    for (other, name) in [("a", "the baseline (a)"), ("qemu-iothread", "QEMU's virtio-blk with one iothread")]
    {
        if let Some(best) = report.best_over(other) {
            let (row, condition) = (&best.line.row, best.line.condition());
            text += &format!("\nBest over {name}: {:.1}x, row ({row}), {condition}", best.ratio);
        }
    }
    if text.is_empty() { text } else { text + "\n" }
}

/// A line for each row and reason.
fn grouped(all: &[Missing]) -> Vec<String> {
    let mut lines: Vec<(&Missing, usize)> = Vec::new();
    for missing in all {
        match lines
            .iter_mut()
            .find(|(first, _)| (&first.row, &first.reason) == (&missing.row, &missing.reason))
        {
            Some((_, more)) => *more += 1,
            None => lines.push((missing, 0)),
        }
    }
    let line = |(missing, more): (&Missing, usize)| {
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let condition = missing.condition.as_ref().map_or(String::new(), |first| format!(" ({first}{more})"));
        format!("{}{condition}: {}", missing.row, missing.reason)
    };
    lines.into_iter().map(line).collect()
}

fn section(text: &mut String, title: &str, lines: Vec<String>) {
    if !lines.is_empty() {
        *text += &format!("\n{title}\n\n");
        lines.into_iter().for_each(|line| *text += &format!("- {line}\n"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vbmq::report::tests::example;

    #[test]
    fn the_report_reads_like_this() {
        let wanted = "\
2026-01-02: a processor, 2 CPUs, Linux 6
100 ms each

a: baseline: one queue
h: no exits: doorbells are memory
bare-metal: no VM: the same without
qemu-iothread: QEMU, one iothread: its own virtio-blk

null, randread, 1 in flight, 1 job

| row           |   IOPS | to (a) | to bare metal | p50 µs | p99 µs | p50 to bare | exits/req | EHT % |
|---------------|-------:|-------:|--------------:|-------:|-------:|------------:|----------:|------:|
| a             | 20.0 k |   1.00 |          0.02 |   40.0 |   80.0 |        0.02 |   1.50000 | 60.00 |
| h             |  900 k |  45.00 |          0.90 |   1.00 |   2.00 |        0.90 |         0 |  0.00 |
| bare-metal    | 1.00 M |  50.00 |          1.00 |   0.90 |   1.80 |        1.00 |         - |     - |
| qemu-iothread | 10.0 k |   0.50 |          0.01 |   80.0 |    160 |        0.01 |         - |     - |

null, randread, 32 in flight, 1 job

| row |   IOPS | to (a) | to bare metal | p50 µs | p99 µs | p50 to bare | exits/req | EHT % |
|-----|-------:|-------:|--------------:|-------:|-------:|------------:|----------:|------:|
| a   |  400 k |   1.00 |             - |   70.0 |    140 |           - |   1.50000 | 60.00 |
| h   | 4.00 M |  10.00 |             - |   7.00 |   14.0 |           - |         0 |  0.00 |

Best over the baseline (a): 45.0x, row (h), null, randread, 1 in flight, 1 job
Best over QEMU's virtio-blk with one iothread: 90.0x, row (h), null, randread, 1 in flight, 1 job

Remarks

- 2 jobs: 4 threads share 2 CPUs

Not measured

- qemu-iothreads: not available: this qemu has no iothread-vq-mapping

Failed

- qemu-iothread (null, randread, 32 in flight, 1 job): it did not end
";
        let found = text(&example());
        assert!(found == wanted, "it reads:\n{found}");
    }
}

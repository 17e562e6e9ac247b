//! The medians drawn: a panel for each condition, a bar for each row, on one logarithmic scale.
//!
//! Rows differ a hundredfold and are to be compared across panels too; a step of the same length is the same factor.

use super::Report;
use crate::report::svg::{Canvas, MARGIN};
use crate::report::text::{microseconds, rate};

const NAME_WIDTH: f64 = 190.0;
const BAR_WIDTH: f64 = 430.0;
const STEP: f64 = 19.0;
/// Rows of the ablation, the host without a guest, the others.
const COLORS: [&str; 3] = ["#0072b2", "#c9ced3", "#e69f00"];

pub(crate) fn draw(report: &Report) -> String {
    let mut canvas = Canvas::new();
    canvas.title("Virtual disks, step by step: IOPS (p50 latency, ratio to the baseline)");
    canvas.small(&format!("{}, {}", report.date, report.machine));
    canvas.small(&format!("{}; logarithmic scale", report.method));
    let rates = || report.rows.iter().map(|line| line.iops).filter(|iops| *iops > 0.0);
    // A bar has a length at the lowest rate too.
    let (low, high) = (rates().fold(f64::INFINITY, f64::min) / 2.0, rates().fold(0.0, f64::max));
    let length = |iops: f64| {
        let span = (high / low).ln();
        if span > 0.0 { (iops.max(low) / low).ln() / span * BAR_WIDTH } else { 0.0 }
    };
    for group in report.groups() {
        canvas.y += 16.0;
        let y = canvas.y;
        canvas.label(MARGIN, y, r#"font-size="14" font-weight="bold""#, &group[0].condition());
        canvas.y += 12.0;
        for line in group {
            let (y, x) = (canvas.y, MARGIN + NAME_WIDTH);
            let color = match line.row.as_str() {
                "bare-metal" => COLORS[1],
                row if row.len() == 1 => COLORS[0],
                _ => COLORS[2],
            };
            canvas.label(x - 10.0, y + 12.0, r#"text-anchor="end""#, &line.row);
            canvas.bar(x, y, length(line.iops), color);
            let ratio = line.ratio_to_baseline.map_or(String::new(), |ratio| format!(", {ratio:.1}x"));
            let figures = format!("{} ({} µs{ratio})", rate(line.iops), microseconds(line.p50_us));
            canvas.label(x + length(line.iops) + 8.0, y + 12.0, r#"font-size="12""#, &figures);
            canvas.y += STEP;
        }
        canvas.y += 10.0;
    }
    canvas.finish(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vbmq::report::tests::example;

    #[test]
    fn every_line_has_a_bar_and_its_figures() {
        let svg = draw(&example());
        assert_eq!(svg.matches("rx=\"2\"").count(), example().rows.len());
        assert!(svg.contains("900 k (1.00 µs, 45.0x)"), "{svg}");
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }

    #[test]
    fn an_empty_report_is_a_drawing_too() {
        let svg = draw(&Report { rows: Vec::new(), ..example() });
        assert!(svg.starts_with("<svg ") && !svg.contains("NaN") && !svg.contains("inf"));
    }
}

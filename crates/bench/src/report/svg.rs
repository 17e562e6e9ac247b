//! The medians drawn: a panel for each group of cases, a bar for each peer, numbers at the bars.
//!
//! Rates of different cases differ a hundredfold, so every panel has a scale of its own; bars are compared within a
//! panel, numbers everywhere. A thin line at a bar's end spans the repetitions.

use std::fmt::Write;

use crate::case::{Case, Op};
use crate::report::Report;
use crate::report::text::{microseconds, rate};
use crate::row::Summary;

const WIDTH: f64 = 920.0;
pub(crate) const MARGIN: f64 = 28.0;
const NAME_WIDTH: f64 = 190.0;
const BAR_WIDTH: f64 = 430.0;
const BAR_HEIGHT: f64 = 15.0;
const BAR_STEP: f64 = 19.0;
const CASE_GAP: f64 = 11.0;
const PANEL_GAP: f64 = 26.0;
const TITLE_HEIGHT: f64 = 26.0;
const LEGEND_STEP: f64 = 20.0;
const FONT: &str = "DejaVu Sans, Verdana, Helvetica, Arial, sans-serif";
/// Colours that differ in lightness too (Okabe and Ito, "Color Universal Design").
const COLORS: [&str; 6] = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"];
/// The ceiling of the method is not a competitor.
const BARE: (&str, &str) = ("bare", "#c9ced3");

/// What is drawn, from top to bottom.
pub(crate) struct Canvas {
    text: String,
    /// Where the next thing goes.
    pub(crate) y: f64,
}

impl Canvas {
    pub(crate) fn new() -> Self {
        Self { text: String::new(), y: MARGIN + 14.0 }
    }

    pub(crate) fn title(&mut self, text: &str) {
        let y = self.y;
        self.label(MARGIN, y, r#"font-size="19" font-weight="bold""#, text);
        self.y += 22.0;
    }

    /// A line of small print.
    pub(crate) fn small(&mut self, text: &str) {
        let y = self.y;
        self.label(MARGIN, y, r##"font-size="12" fill="#555""##, text);
        self.y += 17.0;
    }

    /// The whole drawing.
    pub(crate) fn finish(self, gap: f64) -> String {
        let height = self.y + MARGIN - gap;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" width=\"{WIDTH}\" \
             height=\"{height:.0}\" font-family=\"{FONT}\" font-size=\"13\" fill=\"#222\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n{}</svg>\n",
            self.text
        )
    }

    pub(crate) fn label(&mut self, x: f64, y: f64, style: &str, text: &str) {
        let _ = writeln!(self.text, r#"<text x="{x:.1}" y="{y:.1}" {style}>{}</text>"#, escaped(text));
    }

    pub(crate) fn bar(&mut self, x: f64, y: f64, width: f64, color: &str) {
        let width = width.max(1.0);
        let _ = writeln!(
            self.text,
            r#"<rect x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{BAR_HEIGHT}" rx="2" fill="{color}"/>"#
        );
    }

    /// A horizontal line with ends, over a bar.
    fn whisker(&mut self, from: f64, to: f64, y: f64) {
        let _ = writeln!(
            self.text,
            r##"<path d="M{from:.1} {:.1}v6m0 -3H{to:.1}m0 -3v6" stroke="#222" stroke-opacity="0.55" fill="none"/>"##,
            y - 3.0
        );
    }
}

/// The whole drawing.
pub(crate) fn draw(report: &Report) -> String {
    let mut canvas = Canvas::new();
    canvas.title("vhost-user-blk servers on one core, IOPS (p50 latency)");
    canvas.small(&format!("{}, {}", report.date, report.machine));
    canvas.small(&report.method);
    canvas.y += 10.0;
    legend(&mut canvas, report);
    for (title, cases) in report.groups() {
        let cases: Vec<_> =
            cases.into_iter().filter(|case| case.op != Op::Idle && case.pause_ms == 0).collect();
        panel(&mut canvas, report, title, &cases);
    }
    canvas.finish(PANEL_GAP)
}

fn color(report: &Report, peer: &str) -> &'static str {
    if peer == BARE.0 {
        return BARE.1;
    }
    let others = report.peers.iter().filter(|(name, _)| name != BARE.0);
    COLORS[others.take_while(|(name, _)| name != peer).count() % COLORS.len()]
}

fn legend(canvas: &mut Canvas, report: &Report) {
    let drawn = report.peers.iter().filter(|(peer, _)| report.summaries.iter().any(|s| s.peer == *peer));
    for (peer, version) in drawn {
        let y = canvas.y;
        canvas.bar(MARGIN, y, 15.0, color(report, peer));
        let text = match version.as_str() {
            _ if peer == BARE.0 => "bare: a thread without a device, the ceiling of the method".to_owned(),
            version if version.contains(peer.as_str()) => version.to_owned(),
            version => format!("{peer} {version}"),
        };
        canvas.label(MARGIN + 23.0, y + 12.0, "", text.trim());
        canvas.y += LEGEND_STEP;
    }
    canvas.y += PANEL_GAP;
}

fn panel(canvas: &mut Canvas, report: &Report, title: &str, cases: &[&Case]) {
    let of = |case: &Case| -> Vec<&Summary> {
        let summaries = report.peers.iter().filter_map(|(peer, _)| report.summary(&case.name, peer));
        summaries.filter(|summary| summary.median.iops().is_some()).collect()
    };
    let top = |summary: &Summary| summary.iops_range.map_or(0.0, |(_, high)| high);
    let most = cases.iter().flat_map(|case| of(case)).map(top).fold(0.0, f64::max);
    if most <= 0.0 {
        return;
    }
    let (bars_x, scale) = (MARGIN + NAME_WIDTH, BAR_WIDTH / most);
    let y = canvas.y;
    canvas.label(MARGIN, y, r#"font-size="14" font-weight="bold""#, title);
    canvas.y += TITLE_HEIGHT - 12.0;
    for case in cases {
        let summaries = of(case);
        if summaries.is_empty() {
            continue;
        }
        let middle = canvas.y + summaries.len() as f64 * BAR_STEP / 2.0 + 2.0;
        canvas.label(bars_x - 10.0, middle, r#"text-anchor="end""#, &short(case, cases));
        for summary in summaries {
            let (y, value) = (canvas.y, summary.median.iops().unwrap_or(0.0));
            canvas.bar(bars_x, y, value * scale, color(report, &summary.peer));
            let (low, high) = summary.iops_range.unwrap_or((value, value));
            if (high - low) * scale > 2.0 {
                canvas.whisker(bars_x + low * scale, bars_x + high * scale, y + BAR_HEIGHT / 2.0);
            }
            let latency =
                summary.median.p50_us.map_or(String::new(), |us| format!(" ({} µs)", microseconds(us)));
            let end = bars_x + value.max(high) * scale + 8.0;
            canvas.label(end, y + 12.0, r#"font-size="12""#, &format!("{}{latency}", rate(value)));
            canvas.y += BAR_STEP;
        }
        canvas.y += CASE_GAP;
    }
    canvas.y += PANEL_GAP;
}

/// What tells a case from the others of its group.
fn short(case: &Case, group: &[&Case]) -> String {
    let differs = |same: fn(&Case, &Case) -> bool| group.iter().any(|other| !same(case, other));
    let mut parts = Vec::new();
    if differs(|a, b| a.op == b.op) {
        parts.push(case.op.name().to_owned());
    }
    if differs(|a, b| a.queues == b.queues) {
        parts.push(format!("{} queues", case.queues));
    }
    parts.push(format!("{} in flight", case.depth));
    parts.join(", ")
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::example;

    #[test]
    fn every_median_has_a_bar_and_a_number() {
        let svg = draw(&example());
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
        let bars = svg.matches("rx=\"2\"").count();
        assert_eq!(bars, 2 + 3, "two in the legend");
        for number in ["1.21 M (0.80 µs)", "275 k (0.80 µs)", "7.15 M (0.80 µs)"] {
            assert!(svg.contains(number), "{number}");
        }
        assert!(!svg.contains("Idle guest"), "a group without rates has no panel");
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }

    #[test]
    fn an_empty_report_is_a_drawing_too() {
        let svg = draw(&Report::new(Vec::new()));
        assert!(svg.contains("viewBox") && !svg.contains("NaN"));
    }

    #[test]
    fn text_is_escaped() {
        assert_eq!(escaped("a<b & c>"), "a&lt;b &amp; c&gt;");
    }
}

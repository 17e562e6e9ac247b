//! Every repetition as a line (RFC 4180), for those who do not trust medians.

use crate::row::{Measurement, Row};

type Column = (&'static str, fn(&Measurement) -> Option<f64>);

const COLUMNS: &[Column] = &[
    ("requests", |m| Some(m.requests as f64)),
    ("iops_mean", |m| m.iops_mean),
    ("iops_p90_of_ms", |m| m.iops_p90),
    ("iops_per_core", Measurement::iops_per_core),
    ("server_cores", |m| m.server_cores),
    ("waited_for_cpu", |m| m.waited_for_cpu),
    ("hop_ns", |m| m.hop_ns),
    ("server_ns_per_request", Measurement::server_ns_per_request),
    ("p50_us", |m| m.p50_us),
    ("p99_us", |m| m.p99_us),
    ("p999_us", |m| m.p999_us),
    ("kicks_per_request", |m| m.kicks_per_request),
    ("calls_per_request", |m| m.calls_per_request),
    ("idle_cores", |m| m.idle.map(|idle| idle.cores)),
    ("idle_own_memory_kib", |m| m.idle?.own_memory_kib.map(|kib| kib as f64)),
];

/// The names of the fields.
pub(crate) fn header() -> String {
    let names: String = COLUMNS.iter().map(|(name, _)| format!(",{name}")).collect();
    format!("case,peer,repetition{names},verified\r\n")
}

/// A repetition. What was not measured is empty.
pub(crate) fn line(row: &Row) -> String {
    let field =
        |(_, figure): &Column| figure(&row.figures).map_or(",".into(), |value| format!(",{}", number(value)));
    let figures: String = COLUMNS.iter().map(field).collect();
    let verified = quoted(&row.figures.verified.text());
    format!("{},{},{}{figures},{verified}\r\n", quoted(&row.case), quoted(&row.peer), row.repetition)
}

/// Six significant digits are more than the machine's noise leaves.
fn number(value: f64) -> String {
    if value == 0.0 || value.abs() >= 1e5 {
        return format!("{value:.0}");
    }
    let digits = (5 - value.abs().log10().floor() as i32).clamp(0, 9) as usize;
    let text = format!("{value:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

fn quoted(text: &str) -> String {
    if text.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::example;

    #[test]
    fn every_line_has_as_many_fields_as_the_header() {
        let fields = |line: &str| line.strip_suffix("\r\n").unwrap().split(',').count();
        let lines: Vec<_> = example().rows.iter().map(line).collect();
        assert!(header().starts_with("case,peer,repetition,requests,iops_mean,iops_p90_of_ms,"));
        assert!(lines.iter().all(|line| fields(line) == fields(&header())));
        assert!(
            lines[0].starts_with("null/qd1,exitless,1,1000,1100000,1210000,1100000,1,,,909.091,0.8,,,0,,,,")
        );
    }

    #[test]
    fn numbers_are_short_and_names_are_safe() {
        assert_eq!(
            [0.0, 1234567.8, 0.012345678, 2.5, 100.0].map(number),
            ["0", "1234568", "0.0123457", "2.5", "100"]
        );
        assert_eq!(quoted("a, \"b\""), "\"a, \"\"b\"\"\"");
    }
}

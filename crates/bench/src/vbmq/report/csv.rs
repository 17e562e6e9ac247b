//! Every repetition as a line (RFC 4180).

use anyhow::{Context, Result, ensure};

use super::Sample;
use crate::vbmq::condition::Condition;
use crate::vbmq::figures::Figures;

/// The names of the fields.
pub(crate) const HEADER: &str = "row,backend,rw,qd,jobs,requests,iops,p50_us,p99_us,exits_per_request,eht_percent,kicks,\
                                 interrupts,io_us_per_request,hop_ns\r\n";

/// A repetition. What nobody counted is empty. No field needs quoting.
pub(crate) fn line(Sample { row, condition, figures }: &Sample) -> String {
    let optional = |value: Option<f64>| value.map_or(String::new(), |value| format!("{value:.6}"));
    let count = |value: Option<u64>| value.map_or(String::new(), |value| value.to_string());
    format!(
        "{row},{},{},{},{},{},{:.0},{:.3},{:.3},{},{},{},{},{},{}\r\n",
        condition.backend_name(),
        condition.op.name(),
        condition.qd,
        condition.jobs,
        figures.requests,
        figures.iops,
        figures.p50_us,
        figures.p99_us,
        optional(figures.exits_per_request),
        optional(figures.eht_percent),
        count(figures.kicks),
        count(figures.interrupts),
        optional(figures.io_us_per_request),
        optional(figures.hop_ns),
    )
}

/// The repetitions that [`line`] wrote.
///
/// # Errors
/// A line is none of them.
pub(crate) fn parse(text: &str) -> Result<Vec<Sample>> {
    let mut lines = text.lines();
    ensure!(lines.next() == Some(HEADER.trim_end()), "these are no rows of `bench vbmq`: another header");
    let samples = lines.enumerate().map(|(index, line)| {
        sample(line).with_context(|| format!("line {}: `{line}` is no repetition", index + 2))
    });
    samples.collect()
}

fn sample(line: &str) -> Option<Sample> {
    let fields: Vec<_> = line.split(',').collect();
    let &[row, backend, op, qd, jobs, requests, iops, p50, p99, exits, eht, kicks, interrupts, io_us, hop] =
        fields.as_slice()
    else {
        return None;
    };
    let condition = Condition::parse(backend, op, qd.parse().ok()?, jobs.parse().ok()?)?;
    let figures = Figures {
        requests: requests.parse().ok()?,
        iops: iops.parse().ok()?,
        p50_us: p50.parse().ok()?,
        p99_us: p99.parse().ok()?,
        exits_per_request: exits.parse().ok(),
        eht_percent: eht.parse().ok(),
        kicks: kicks.parse().ok(),
        interrupts: interrupts.parse().ok(),
        io_us_per_request: io_us.parse().ok(),
        hop_ns: hop.parse().ok(),
        ..Figures::default()
    };
    Some(Sample { row: row.to_owned(), condition, figures })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::BackendKind;
    use crate::case::Op;

    #[test]
    fn a_line_has_as_many_fields_as_the_header() {
        let condition = Condition { backend: BackendKind::Disk, op: Op::RandWrite, qd: 8, jobs: 2 };
        let figures = Figures { requests: 9, iops: 90.0, p50_us: 1.5, kicks: Some(3), ..Figures::default() };
        let line = line(&Sample { row: "a".into(), condition, figures });
        let read = parse(&(HEADER.to_owned() + &line)).unwrap().remove(0);
        assert_eq!((read.row.as_str(), read.condition, read.figures), ("a", condition, figures));
        assert!(parse("row,backend\r\n").is_err());
        assert!(format!("{:#}", parse(&(HEADER.to_owned() + "a,tape\r\n")).unwrap_err()).contains("line 2"));
        assert_eq!(line.split(',').count(), HEADER.split(',').count());
        assert_eq!(line, "a,file,randwrite,8,2,9,90,1.500,0.000,,,3,,,\r\n");
    }
}

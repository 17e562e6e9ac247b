//! Every repetition as a line (RFC 4180).

use super::Sample;

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::BackendKind;
    use crate::case::Op;
    use crate::vbmq::condition::Condition;
    use crate::vbmq::figures::Figures;

    #[test]
    fn a_line_has_as_many_fields_as_the_header() {
        let condition = Condition { backend: BackendKind::Disk, op: Op::RandWrite, qd: 8, jobs: 2 };
        let figures = Figures { requests: 9, iops: 90.4, p50_us: 1.5, kicks: Some(3), ..Figures::default() };
        let line = line(&Sample { row: "a".into(), condition, figures });
        assert_eq!(line.split(',').count(), HEADER.split(',').count());
        assert_eq!(line, "a,file,randwrite,8,2,9,90,1.500,0.000,,,3,,,\r\n");
    }
}

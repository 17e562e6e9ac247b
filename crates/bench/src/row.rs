//! What is kept of a measurement, and the medians over repetitions.

use serde::{Serialize, Serializer};

use crate::hop;

/// Whether the data was checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Verified {
    /// The backend stores nothing; there is nothing to compare.
    #[default]
    NothingStored,
    /// In another repetition of the same case.
    Before,
    /// So many bytes were written, read back and compared.
    Bytes(u64),
    /// The peer is a load generator itself.
    NotOurs,
}

impl Serialize for Verified {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&self.text())
    }
}

impl Verified {
    pub(crate) fn text(self) -> String {
        match self {
            Self::NothingStored => "nothing stored".into(),
            Self::Before => "in repetition 1".into(),
            Self::Bytes(bytes) => format!("{bytes} bytes"),
            Self::NotOurs => "no".into(),
        }
    }
}

/// What a server uses when it has nothing to do.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct IdleUse {
    /// CPU time per time.
    pub(crate) cores: f64,
    /// Resident memory without the guest's, in KiB.
    pub(crate) own_memory_kib: Option<u64>,
}

/// The figures of one repetition, or their medians. What was not measured is `None`.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Measurement {
    pub(crate) requests: u64,
    /// Requests per second over the whole repetition.
    pub(crate) iops_mean: Option<f64>,
    /// The rate that nine of ten milliseconds do not exceed.
    pub(crate) iops_p90: Option<f64>,
    /// CPU time of the server per time: 1 for one that polls all the time.
    pub(crate) server_cores: Option<f64>,
    /// The share of the time in which server or client, whichever was worse off, waited for a CPU that another
    /// process had.
    pub(crate) waited_for_cpu: Option<f64>,
    /// How long a cache line took between the CPUs of server and client, the longer of before and after.
    pub(crate) hop_ns: Option<f64>,
    pub(crate) p50_us: Option<f64>,
    pub(crate) p99_us: Option<f64>,
    pub(crate) p999_us: Option<f64>,
    pub(crate) kicks_per_request: Option<f64>,
    pub(crate) calls_per_request: Option<f64>,
    pub(crate) idle: Option<IdleUse>,
    pub(crate) verified: Verified,
}

impl Measurement {
    /// The rate to show: of the undisturbed milliseconds if there are such figures.
    pub(crate) fn iops(&self) -> Option<f64> {
        self.iops_p90.or(self.iops_mean)
    }

    /// Requests per second of CPU time that the server used.
    pub(crate) fn iops_per_core(&self) -> Option<f64> {
        let cores = self.server_cores.filter(|&cores| cores > 0.0)?;
        Some(self.iops_mean? / cores)
    }

    /// CPU time of the server per request.
    pub(crate) fn server_ns_per_request(&self) -> Option<f64> {
        Some(1e9 / self.iops_per_core()?)
    }
}

/// One repetition.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) case: String,
    pub(crate) peer: String,
    pub(crate) repetition: u32,
    #[serde(flatten)]
    pub(crate) figures: Measurement,
}

/// The median of each figure over repetitions.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Summary {
    pub(crate) case: String,
    pub(crate) peer: String,
    pub(crate) repetitions: usize,
    #[serde(flatten)]
    pub(crate) median: Measurement,
    pub(crate) iops_per_core: Option<f64>,
    pub(crate) server_ns_per_request: Option<f64>,
    /// The lowest and highest rate shown by any repetition.
    pub(crate) iops_range: Option<(f64, f64)>,
}

/// The shortest distance between server and client at which something was measured.
pub(crate) fn nearest_ns(rows: &[Row]) -> Option<f64> {
    hop::nearest_ns(rows.iter().filter_map(|row| row.figures.hop_ns))
}

/// Summaries in the order in which case and peer first appear in `rows`. Repetitions in which the CPUs were farther
/// apart than in others do not count, unless there is no other one.
pub(crate) fn summarize(rows: &[Row]) -> Vec<Summary> {
    let nearest_ns = nearest_ns(rows).unwrap_or(f64::INFINITY);
    let mut keys: Vec<(&str, &str)> = Vec::new();
    for row in rows {
        if !keys.contains(&(&row.case, &row.peer)) {
            keys.push((&row.case, &row.peer));
        }
    }
    keys.into_iter().map(|(case, peer)| summary(case, peer, rows, nearest_ns)).collect()
}

fn summary(case: &str, peer: &str, rows: &[Row], nearest_ns: f64) -> Summary {
    let mut all: Vec<_> =
        rows.iter().filter(|r| r.case == case && r.peer == peer).map(|r| &r.figures).collect();
    let near = |m: &&Measurement| m.hop_ns.is_none_or(|ns| hop::is_near(ns, nearest_ns));
    if all.iter().any(near) {
        all.retain(near);
    }
    let of = |figure: fn(&Measurement) -> Option<f64>| median(all.iter().filter_map(|m| figure(m)));
    let rates: Vec<f64> = all.iter().filter_map(|m| m.iops()).collect();
    let idle = of(|m| m.idle.map(|idle| idle.cores)).map(|cores| IdleUse {
        cores,
        own_memory_kib: of(|m| Some(m.idle?.own_memory_kib? as f64)).map(|kib| kib as u64),
    });
    Summary {
        case: case.to_owned(),
        peer: peer.to_owned(),
        repetitions: all.len(),
        median: Measurement {
            requests: all.iter().map(|m| m.requests).sum(),
            iops_mean: of(|m| m.iops_mean),
            iops_p90: of(|m| m.iops_p90),
            server_cores: of(|m| m.server_cores),
            waited_for_cpu: of(|m| m.waited_for_cpu),
            hop_ns: of(|m| m.hop_ns),
            p50_us: of(|m| m.p50_us),
            p99_us: of(|m| m.p99_us),
            p999_us: of(|m| m.p999_us),
            kicks_per_request: of(|m| m.kicks_per_request),
            calls_per_request: of(|m| m.calls_per_request),
            idle,
            verified: all.first().map(|m| m.verified).unwrap_or_default(),
        },
        iops_per_core: of(Measurement::iops_per_core),
        server_ns_per_request: of(Measurement::server_ns_per_request),
        iops_range: rates.iter().copied().reduce(f64::min).zip(rates.iter().copied().reduce(f64::max)),
    }
}

/// The middle value, or the mean of the two in the middle.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    let lower = values[(values.len() - 1) / 2];
    Some((lower + upper) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(peer: &str, repetition: u32, iops: f64, cores: f64) -> Row {
        let figures = Measurement {
            requests: 10,
            iops_mean: Some(iops),
            server_cores: Some(cores),
            ..Measurement::default()
        };
        Row { case: "c".into(), peer: peer.into(), repetition, figures }
    }

    #[test]
    fn medians_of_odd_even_and_no_values() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), Some(2.5));
        assert_eq!(median(std::iter::empty()), None);
    }

    #[test]
    fn repetitions_farther_apart_count_only_where_there_is_nothing_else() {
        let at = |peer, repetition, iops, hop_ns| {
            let mut row = row(peer, repetition, iops, 1.0);
            row.figures.hop_ns = Some(hop_ns);
            row
        };
        let rows = [at("a", 1, 100.0, 30.0), at("a", 2, 10.0, 150.0), at("b", 1, 20.0, 150.0)];
        let summaries = summarize(&rows);
        assert_eq!((summaries[0].repetitions, summaries[0].median.iops_mean), (1, Some(100.0)));
        assert_eq!((summaries[1].repetitions, summaries[1].median.hop_ns), (1, Some(150.0)));
    }

    #[test]
    fn interleaved_rows_are_told_apart() {
        let rows = [
            row("a", 1, 100.0, 1.0),
            row("b", 1, 10.0, 0.5),
            row("a", 2, 300.0, 1.0),
            row("b", 2, 30.0, 0.5),
            row("a", 3, 200.0, 1.0),
        ];
        let summaries = summarize(&rows);
        assert_eq!(summaries.len(), 2);
        assert_eq!((summaries[0].peer.as_str(), summaries[0].repetitions), ("a", 3));
        assert_eq!(summaries[0].median.iops_mean, Some(200.0));
        assert_eq!(summaries[0].iops_range, Some((100.0, 300.0)));
        assert_eq!(summaries[1].iops_per_core, Some(40.0), "half a core makes 20 a second");
        assert_eq!(summaries[1].median.p50_us, None);
    }
}

//! What the embedded guest says: lines of JSON on its serial port.

use serde::{Deserialize, Serialize};

/// A line of the guest's.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Line {
    /// It has found its devices.
    Ready {
        /// Its virtual CPUs.
        cpus: u32,
        /// Its disks.
        disks: u32,
    },
    /// What a job came to.
    Result(Box<JobResult>),
    /// It failed.
    Error(String),
}

/// The figures of one job. What a job has none of is 0 or empty.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
#[allow(missing_docs, reason = "the names are those of the table's columns")]
pub(crate) struct JobResult {
    pub(crate) job: String,
    pub(crate) id: String,
    pub(crate) jobs: u32,
    pub(crate) qd: u32,
    pub(crate) bs: u64,
    pub(crate) rw: String,
    pub(crate) ring: String,
    pub(crate) seconds: f64,
    pub(crate) requests: u64,
    pub(crate) iops: f64,
    pub(crate) bytes_per_s: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) p999_us: f64,
    #[serde(skip_serializing)]
    pub(crate) kicks: u64,
    #[serde(skip_serializing)]
    pub(crate) interrupts: u64,
    pub(crate) lost_interrupts: u64,
    pub(crate) errors: u64,
    pub(crate) verified_bytes: u64,
}

/// The longest line that is looked at, in bytes. The guest is ours, its memory is not safe from its neighbours' bugs.
const LINE_BYTES_MAX: usize = 4096;

/// Reads a line; None if it is none of the guest's.
pub(crate) fn parse(line: &str) -> Option<Line> {
    let line = line.trim();
    if !line.starts_with('{') || line.len() > LINE_BYTES_MAX {
        return None;
    }
    serde_json::from_str(line).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_understood() {
        assert_eq!(
            parse("{\"ready\":{\"cpus\":2,\"disks\":1}}\r\n"),
            Some(Line::Ready { cpus: 2, disks: 1 })
        );
        let result =
            r#"{"result":{"job":"blk","id":"","jobs":1,"qd":32,"iops":1.5,"p50_us":2.25,"new":"field"}}"#;
        let Some(Line::Result(result)) = parse(result) else { panic!("no result") };
        assert_eq!((result.job.as_str(), result.qd, result.iops, result.kicks), ("blk", 32, 1.5, 0));
        assert_eq!(parse("{\"error\":\"no disk\"}"), Some(Line::Error("no disk".into())));
    }

    #[test]
    fn what_is_none_is_left_alone() {
        for line in ["", "Linux version 6", "{", "{\"other\":1}"] {
            assert_eq!(parse(line), None, "{line}");
        }
    }
}

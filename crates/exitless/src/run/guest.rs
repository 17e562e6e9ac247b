//! What the embedded guest says: lines of JSON on its serial port.

use serde::Deserialize;
use serde_json::{Map, Value};

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

/// The figures of one job, by their names. Each job has its own.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(transparent)]
pub(crate) struct JobResult(pub(crate) Map<String, Value>);

impl JobResult {
    /// A figure; None if the job has none of this name.
    pub(crate) fn number(&self, name: &str) -> Option<f64> {
        self.0.get(name)?.as_f64()
    }

    /// The same, of things that are counted.
    pub(crate) fn count(&self, name: &str) -> Option<u64> {
        self.0.get(name)?.as_u64()
    }

    /// A word; empty if the job has none of this name.
    pub(crate) fn text(&self, name: &str) -> &str {
        self.0.get(name).and_then(Value::as_str).unwrap_or_default()
    }
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
        assert_eq!(
            (result.text("job"), result.count("qd"), result.number("iops")),
            ("blk", Some(32), Some(1.5))
        );
        assert_eq!((result.text("new"), result.count("kicks")), ("field", None));
        assert_eq!(parse("{\"error\":\"no disk\"}"), Some(Line::Error("no disk".into())));
    }

    #[test]
    fn what_is_none_is_left_alone() {
        for line in ["", "Linux version 6", "{", "{\"other\":1}"] {
            assert_eq!(parse(line), None, "{line}");
        }
    }
}

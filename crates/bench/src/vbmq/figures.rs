//! What a run of the guest says of itself.

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

/// The figures of one repetition of one row, or their medians.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct Figures {
    pub(crate) requests: u64,
    pub(crate) errors: u64,
    pub(crate) iops: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) kicks: Option<u64>,
    pub(crate) interrupts: Option<u64>,
    /// Only our monitor counts them.
    pub(crate) exits_per_request: Option<f64>,
    pub(crate) eht_percent: Option<f64>,
    /// Time that the I/O threads worked, for each request.
    #[serde(skip)]
    pub(crate) io_us_per_request: Option<f64>,
    /// How long a cache line took between the CPUs of vCPU and I/O thread, the longer of before and after.
    #[serde(skip)]
    pub(crate) hop_ns: Option<f64>,
}

/// A line of our monitor's.
#[derive(Deserialize)]
struct MonitorLine {
    #[serde(flatten)]
    figures: Figures,
    #[serde(default)]
    io_threads: Vec<IoThread>,
}

#[derive(Deserialize)]
struct IoThread {
    busy_percent: f64,
}

/// A line of the guest's own.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum GuestLine {
    Ready(serde::de::IgnoredAny),
    Result(Figures),
    Error(String),
}

/// Finds the result in what `exitless run --json` printed.
pub(crate) fn of_monitor(output: &str) -> Result<Figures> {
    let line =
        output.lines().rev().find(|line| line.starts_with('{')).context("the monitor printed no result")?;
    let line: MonitorLine = serde_json::from_str(line).context("the monitor's result")?;
    let mut figures = line.figures;
    let busy: f64 = line.io_threads.iter().map(|thread| thread.busy_percent / 100.0).sum();
    figures.io_us_per_request = Some(busy * 1e6 / figures.iops).filter(|us| us.is_finite() && *us > 0.0);
    checked(figures)
}

/// Finds the result on the serial line of a guest in another monitor.
pub(crate) fn of_guest(output: &str) -> Result<Figures> {
    for line in output.lines().filter(|line| line.starts_with('{')) {
        match serde_json::from_str(line) {
            Ok(GuestLine::Result(figures)) => return checked(figures),
            Ok(GuestLine::Error(error)) => bail!("the guest failed: {error}"),
            Ok(GuestLine::Ready(_)) | Err(_) => {}
        }
    }
    bail!("the guest printed no result")
}

fn checked(figures: Figures) -> Result<Figures> {
    ensure!(figures.errors == 0, "{} requests failed", figures.errors);
    ensure!(figures.requests > 0 && figures.iops > 0.0, "no request was completed");
    Ok(figures)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_monitor_counts_exits_and_how_busy_its_threads_were() {
        let output = "warning: something\n{\"job\":\"blk\",\"requests\":1000,\"iops\":500000.0,\"p50_us\":2.0,\
            \"p99_us\":4.5,\"errors\":0,\"kicks\":0,\"exits_per_request\":0.5,\"eht_percent\":null,\
            \"io_threads\":[{\"cpu\":0,\"busy_percent\":50.0,\"asleep_percent\":0}]}\n";
        let figures = of_monitor(output).unwrap();
        assert_eq!((figures.iops, figures.p99_us, figures.exits_per_request), (500_000.0, 4.5, Some(0.5)));
        assert_eq!((figures.eht_percent, figures.io_us_per_request), (None, Some(1.0)));
        assert!(of_monitor("").unwrap_err().to_string().contains("no result"));
    }

    #[test]
    fn the_guest_says_what_it_did_or_why_not() {
        let ready = "SeaBIOS\n{\"ready\":{\"cpus\":1,\"disks\":1}}\n";
        let result =
            "{\"result\":{\"job\":\"blk\",\"requests\":5,\"iops\":2.5,\"p50_us\":1,\"kicks\":3}}\r\n";
        let figures = of_guest(&format!("{ready}{result}")).unwrap();
        assert_eq!((figures.requests, figures.iops, figures.kicks), (5, 2.5, Some(3)));
        assert_eq!(figures.exits_per_request, None);
        let error = of_guest(&format!("{ready}{{\"error\":\"no disk\"}}\n")).unwrap_err();
        assert_eq!(error.to_string(), "the guest failed: no disk");
        assert!(of_guest(ready).is_err());
    }

    #[test]
    fn failed_requests_are_no_result() {
        let line = "{\"requests\":1000,\"iops\":500000.0,\"errors\":2}";
        assert!(of_monitor(line).unwrap_err().to_string().contains("2 requests failed"));
        assert!(of_monitor("{\"requests\":0,\"iops\":0}").is_err());
    }
}

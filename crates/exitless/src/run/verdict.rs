//! Whether a run went well, and what is said of one that did not.

use std::fmt::{self, Display, Formatter};

use anyhow::{Error, anyhow};
use vmm::Outcome;

use super::guest::JobResult;
use super::report::Report;
use crate::failure::Failure;

/// What is wrong with a job that has a result all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flaw {
    /// So many requests failed, of so many that came back.
    Failed(u64, u64),
    /// No request came back while it was measured.
    NoRequest,
    /// It was ended before its time.
    CutShort,
}

impl Display for Flaw {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(failed, all) => write!(f, "{failed} of {all} requests failed"),
            Self::NoRequest => f.write_str("no request came back while it was measured"),
            Self::CutShort => f.write_str("cut short by a signal, and measured up to then"),
        }
    }
}

/// What counts the requests that a job has measured: a load has one, round trips come in two kinds.
const MEASURED: [&str; 3] = ["requests", "asleep_rounds", "awake_rounds"];

/// What is wrong with it, the worst first.
pub(super) fn flaws(result: &JobResult) -> Vec<Flaw> {
    let (failed, returned) = (result.count("errors").unwrap_or(0), result.count("returned").unwrap_or(0));
    let cut_short = result.count("cut_short") == Some(1);
    let mut flaws = Vec::new();
    if failed > 0 {
        flaws.push(Flaw::Failed(failed, returned.max(failed)));
    }
    if cut_short {
        flaws.push(Flaw::CutShort);
    }
    let mut measured = MEASURED.iter().filter_map(|name| result.count(name)).peekable();
    // What was ended before its time may not have come to the second kind of round trips.
    let none = measured.peek().is_some() && measured.all(|count| count == 0);
    let missing = MEASURED.iter().any(|name| result.count(name) == Some(0));
    if none || missing && !cut_short {
        flaws.push(Flaw::NoRequest);
    }
    flaws
}

/// How the program ends.
pub(super) fn verdict(outcome: Outcome, report: &Report) -> Result<(), Failure> {
    match reason(outcome, report) {
        None => Ok(()),
        Some(reason) => Err(Failure::Runtime(reason)),
    }
}

fn reason(outcome: Outcome, report: &Report) -> Option<Error> {
    if let Some(error) = report.errors.first() {
        return Some(anyhow!("the guest failed: {error}"));
    }
    match outcome {
        Outcome::TripleFault => return Some(anyhow!("the guest failed: a triple fault ended it")),
        Outcome::Panicked => return Some(anyhow!("the guest failed: its kernel panicked")),
        Outcome::Exit(status @ 1..) => return Some(anyhow!("the guest ended with status {status}")),
        Outcome::Reset if report.kernel && report.console_panicked => {
            return Some(anyhow!("the guest failed: its kernel panicked, by what it said on its console"));
        }
        Outcome::Reset if !report.kernel => {
            return Some(anyhow!("the guest failed: a fault that it could not report ended it"));
        }
        Outcome::Stopped if !report.kernel => {
            return Some(anyhow!("stopped before the guest had come to its end"));
        }
        Outcome::Stopped if report.was_asked => {
            return Some(anyhow!("cut off: the guest had not switched itself off when it was stopped"));
        }
        Outcome::PowerOff | Outcome::Exit(0) | Outcome::Stopped | Outcome::Reset => {}
    }
    let flaw = report.results.iter().flat_map(|measured| flaws(&measured.result)).next();
    // A tour may have been ended between two of its loads.
    let flaw = flaw.or((report.was_asked && !report.kernel).then_some(Flaw::CutShort));
    flaw.map(|flaw| anyhow!("{flaw}"))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::report::tests::report;
    use super::*;
    use crate::failure::EXIT_RUNTIME;

    fn of(result: Value) -> Vec<Flaw> {
        let Value::Object(result) = result else { panic!("no object") };
        flaws(&JobResult(result))
    }

    #[test]
    fn what_is_wrong_with_a_job_is_found_in_its_result() {
        let failed = of(json!({"requests": 4, "returned": 10, "errors": 5, "cut_short": 1}));
        assert_eq!(failed, [Flaw::Failed(5, 10), Flaw::CutShort]);
        assert_eq!(of(json!({"requests": 0, "returned": 0, "errors": 0})), [Flaw::NoRequest]);
        assert_eq!(of(json!({"asleep_rounds": 5, "awake_rounds": 0})), [Flaw::NoRequest]);
        assert_eq!(of(json!({"asleep_rounds": 5, "awake_rounds": 0, "cut_short": 1})), [Flaw::CutShort]);
        assert_eq!(of(json!({"requests": 9, "returned": 10, "errors": 0})), []);
        assert_eq!(of(json!({"job": "ring", "split_rounds": 0})), [], "it makes no requests");
    }

    #[test]
    fn a_run_is_good_only_if_everything_about_it_is() {
        let said = |outcome, result| verdict(outcome, &report(result)).err().map(|error| error.to_string());
        let good = || json!({"requests": 1, "returned": 1, "errors": 0});
        assert_eq!(said(Outcome::Exit(0), good()), None);
        let failed = said(Outcome::Exit(0), json!({"requests": 1, "returned": 3, "errors": 2}));
        assert_eq!(failed.unwrap(), "2 of 3 requests failed");
        let mut cut = report(good());
        cut.was_asked = true;
        assert!(verdict(Outcome::Exit(0), &cut).unwrap_err().to_string().contains("cut short"));
        for outcome in
            [Outcome::Exit(1), Outcome::TripleFault, Outcome::Panicked, Outcome::Reset, Outcome::Stopped]
        {
            let failure = verdict(outcome, &report(good())).unwrap_err();
            assert_eq!(failure.exit_code(), EXIT_RUNTIME, "{outcome:?}");
        }
    }

    #[test]
    fn a_kernel_may_reset_the_machine_unless_it_panicked() {
        let mut kernel = report(json!({}));
        (kernel.kernel, kernel.results) = (true, Vec::new());
        for outcome in [Outcome::PowerOff, Outcome::Reset, Outcome::Stopped, Outcome::Exit(0)] {
            assert!(verdict(outcome, &kernel).is_ok(), "{outcome:?}");
        }
        for outcome in [Outcome::TripleFault, Outcome::Panicked] {
            assert!(verdict(outcome, &kernel).is_err(), "{outcome:?}");
        }
        kernel.console_panicked = true;
        assert!(verdict(Outcome::Reset, &kernel).is_err() && verdict(Outcome::PowerOff, &kernel).is_ok());
        kernel.was_asked = true;
        assert!(verdict(Outcome::Stopped, &kernel).is_err());
    }
}

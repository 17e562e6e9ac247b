//! What the embedded guest says, and for how long it says nothing.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use vmm::Machine;

use super::console;
use super::guest::{JobResult, Line};
use super::options::RunOptions;
use super::progress::Progress;
use super::report::{Measured, Report};
use super::silence::{Silence, Verdict};

/// How often it is looked after a guest that says nothing.
const LOOK: Duration = Duration::from_secs(1);

/// What reaches the thread that reports.
pub(super) enum Said {
    /// A line of the embedded guest's.
    Line(Line),
    /// The machine has ended.
    Ended,
}

/// Collects what the embedded guest says, each result with what the machine counted meanwhile, until the machine has
/// ended; false if it does not.
pub(super) fn follow(
    machine: &Machine,
    said: &Receiver<Said>,
    options: &RunOptions,
    mut silence: Option<Silence>,
    report: &mut Report,
) -> bool {
    let console = options.kernel.as_ref().map(|_| console::stream(options.json));
    let mut progress = Progress::new(options.quiet, console, machine.snapshot());
    let ended = loop {
        let wait = if silence.is_some() { progress.wait().min(LOOK) } else { progress.wait() };
        let event = said.recv_timeout(wait);
        if let (Some(silence), Ok(_)) = (&mut silence, &event) {
            silence.heard();
        }
        match event {
            Ok(Said::Line(Line::Ready { .. })) => {}
            Ok(Said::Line(Line::Result(result))) => report.results.push(measured(*result, machine)),
            Ok(Said::Line(Line::Error(error))) => report.errors.push(error),
            Err(RecvTimeoutError::Timeout) => {
                let counted = machine.snapshot();
                let verdict =
                    silence.as_mut().map(|silence| silence.look(counted.requests(), Instant::now()));
                progress.show(counted);
                match verdict {
                    None | Some(Verdict::Wait) => {}
                    Some(Verdict::Stop(reason)) => {
                        report.errors.push(reason);
                        machine.stop();
                    }
                    Some(Verdict::Leave) => break false,
                }
            }
            Ok(Said::Ended) | Err(RecvTimeoutError::Disconnected) => break true,
        }
    };
    progress.clear();
    ended
}

fn measured(result: JobResult, machine: &Machine) -> Measured {
    Measured { result, counted: machine.measured() }
}

//! Being told to end: SIGTERM or SIGINT. The first one is a request, the second one an order.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};
use signal_hook::{SigId, flag, low_level};

use crate::failure::EXIT_RUNTIME;

const SIGNALS: [i32; 2] = [SIGTERM, SIGINT];

/// The signals that end a service.
pub(crate) struct StopSignals {
    signals: Signals,
    /// A first one has come.
    asked: Arc<AtomicBool>,
    /// What sets `asked`.
    setters: Vec<SigId>,
}

impl StopSignals {
    /// From here on a first signal is remembered, and a second one ends the process at once.
    pub(crate) fn install() -> io::Result<Self> {
        let asked = Arc::new(AtomicBool::new(false));
        let mut setters = Vec::new();
        for signal in SIGNALS {
            // In this order: the first signal finds the flag unset, and sets it.
            flag::register_conditional_shutdown(signal, EXIT_RUNTIME.into(), asked.clone())?;
            setters.push(flag::register(signal, asked.clone())?);
        }
        Ok(Self { signals: Signals::new(SIGNALS)?, asked, setters })
    }

    /// From here on no signal ends the process at once, until [`SecondSignal::allow`] says that nothing is left behind
    /// then. SIGHUP, with which a terminal goes, asks like the others. None if a first signal has come already.
    pub(crate) fn hold_second(&mut self) -> io::Result<Option<SecondSignal>> {
        for setter in self.setters.drain(..) {
            low_level::unregister(setter);
        }
        if self.asked.load(Ordering::SeqCst) {
            return Ok(None);
        }
        flag::register_conditional_shutdown(SIGHUP, EXIT_RUNTIME.into(), self.asked.clone())?;
        self.signals.add_signal(SIGHUP)?;
        Ok(Some(SecondSignal(self.asked.clone())))
    }

    /// Ends the wait when it is dropped.
    pub(crate) fn handle(&self) -> StopHandle {
        StopHandle(self.signals.handle())
    }

    /// Waits for the first signal, which may have come already; None if a [`StopHandle`] was dropped before that.
    pub(crate) fn wait(&mut self) -> Option<&'static str> {
        match self.signals.forever().next()? {
            SIGINT => Some("SIGINT"),
            SIGHUP => Some("SIGHUP"),
            _ => Some("SIGTERM"),
        }
    }
}

/// The order that a second signal is, as long as it is held back.
pub(crate) struct SecondSignal(Arc<AtomicBool>);

impl SecondSignal {
    /// The next signal, a first one too, ends the process at once.
    pub(crate) fn allow(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Held by whoever the service cannot do without.
pub(crate) struct StopHandle(Handle);

impl Drop for StopHandle {
    fn drop(&mut self) {
        self.0.close();
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use signal_hook::low_level::raise;

    use super::*;

    /// Set in the child that plays a service.
    const CHILD: &str = "EXITLESS_STOP_TEST";

    /// Runs this test again in a process of its own, as a service that gets `signals`, and returns its exit code.
    fn as_child(test: &str, signals: &[i32]) -> Option<i32> {
        if std::env::var_os(CHILD).is_some() {
            let mut stop = StopSignals::install().unwrap();
            signals.iter().for_each(|&signal| raise(signal).unwrap());
            let first = stop.wait();
            std::process::exit(if first == Some("SIGTERM") { 40 } else { 41 });
        }
        let this = std::env::current_exe().unwrap();
        let mut child = Command::new(this);
        let status =
            child.args(["--exact", &format!("stop::tests::{test}")]).env(CHILD, "1").status().unwrap();
        status.code()
    }

    #[test]
    fn a_first_signal_is_a_request() {
        assert_eq!(as_child("a_first_signal_is_a_request", &[SIGTERM]), Some(40));
    }

    #[test]
    fn a_second_signal_ends_the_process_at_once() {
        let code = as_child("a_second_signal_ends_the_process_at_once", &[SIGTERM, SIGINT]);
        assert_eq!(code, Some(EXIT_RUNTIME.into()));
    }

    #[test]
    fn a_second_signal_that_is_held_back_waits_for_leave() {
        let test = "a_second_signal_that_is_held_back_waits_for_leave";
        if std::env::var_os(CHILD).is_some() {
            let mut stop = StopSignals::install().unwrap();
            let second = stop.hold_second().unwrap().unwrap();
            for signal in [SIGHUP, SIGTERM, SIGINT] {
                raise(signal).unwrap();
                assert!(stop.wait().is_some());
            }
            second.allow();
            raise(SIGHUP).unwrap();
            std::process::exit(42);
        }
        assert_eq!(as_child(test, &[]), Some(EXIT_RUNTIME.into()));
    }

    #[test]
    fn nothing_is_held_back_when_a_first_signal_has_come() {
        let test = "nothing_is_held_back_when_a_first_signal_has_come";
        if std::env::var_os(CHILD).is_some() {
            let mut stop = StopSignals::install().unwrap();
            raise(SIGTERM).unwrap();
            assert!(stop.hold_second().unwrap().is_none());
            raise(SIGTERM).unwrap();
            std::process::exit(42);
        }
        assert_eq!(as_child(test, &[]), Some(EXIT_RUNTIME.into()));
    }

    #[test]
    fn the_wait_ends_with_whoever_the_service_cannot_do_without() {
        let mut stop = StopSignals::install().unwrap();
        drop(stop.handle());
        assert_eq!(stop.wait(), None);
    }
}

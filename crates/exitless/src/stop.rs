//! Signals: those that ask a service to end, and those that must not end it.
//!
//! Of the former, the first one is a request and the second one an order. What ends a process by default would end it
//! here with requests in flight. SIGQUIT still does that, which is what it is for.

use std::any::Any;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;
use std::{fs, io, thread};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU};
use signal_hook::iterator::{Handle, Signals};
use signal_hook::{SigId, flag, low_level};

use crate::failure::EXIT_RUNTIME;

/// SIGHUP comes when a terminal goes, SIGXCPU when the limit of CPU time is reached, SIGPWR from some service managers.
pub(crate) const SIGNALS: [i32; 5] = [SIGTERM, SIGINT, SIGHUP, SIGXCPU, SIGPWR];
/// In libc's numbering, on every architecture this runs on.
pub(crate) const SIGPWR: i32 = 30;
const SIGXFSZ: i32 = 25;
/// SIGXFSZ comes with a write beyond the limit of file sizes, which then fails. The others are sent to processes that give
/// them a meaning. Handled rather than ignored, so that programs which this one starts find them as usual.
const SURVIVED: [i32; 3] = [SIGXFSZ, SIGUSR1, SIGUSR2];
/// How soon work before a service is ready ends for a signal.
const LOOK_EVERY: Duration = Duration::from_millis(20);

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
        for signal in SURVIVED {
            flag::register(signal, Arc::default())?;
        }
        let asked = Arc::new(AtomicBool::new(false));
        let mut setters = Vec::new();
        // What nohup(1) starts outlives its terminal.
        let nohup = is_ignored(SIGHUP);
        let signals: Vec<_> = SIGNALS.into_iter().filter(|&signal| signal != SIGHUP || !nohup).collect();
        for &signal in &signals {
            // In this order: the first signal finds the flag unset, and sets it.
            flag::register_conditional_shutdown(signal, EXIT_RUNTIME.into(), asked.clone())?;
            setters.push(flag::register(signal, asked.clone())?);
        }
        Ok(Self { signals: Signals::new(signals)?, asked, setters })
    }

    /// From here on no signal ends the process at once, until [`SecondSignal::allow`] says that nothing is left behind
    /// then. None if a first signal has come already.
    pub(crate) fn hold_second(&mut self) -> io::Result<Option<SecondSignal>> {
        for setter in self.setters.drain(..) {
            low_level::unregister(setter);
        }
        if self.asked.load(Ordering::SeqCst) {
            return Ok(None);
        }
        Ok(Some(SecondSignal(self.asked.clone())))
    }

    /// Ends the wait when it is dropped.
    pub(crate) fn handle(&self) -> StopHandle {
        StopHandle(self.signals.handle())
    }

    /// Waits for the first signal, which may have come already; None if a [`StopHandle`] was dropped before that.
    pub(crate) fn wait(&mut self) -> Option<&'static str> {
        let signal = self.signals.forever().next()?;
        Some(low_level::signal_name(signal).unwrap_or("a signal"))
    }

    /// Does `work` on a thread of its own and waits for that; None if a signal came first. What was begun then is left
    /// behind.
    pub(crate) fn unless_asked<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<Option<T>> {
        let (tell, told) = channel();
        let work = move || {
            let _ = tell.send(work());
        };
        let thread = thread::Builder::new().name("opening".to_owned()).spawn(work)?;
        while !self.asked.load(Ordering::SeqCst) {
            match told.recv_timeout(LOOK_EVERY) {
                Ok(result) => return Ok(Some(result)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => resume_unwind(panic_of(thread)),
            }
        }
        Ok(None)
    }
}

fn panic_of(thread: thread::JoinHandle<()>) -> Box<dyn Any + Send> {
    thread.join().err().unwrap_or_else(|| Box::new("no result"))
}

/// Whether this process was started with a signal ignored.
fn is_ignored(signal: i32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

/// The order that a second signal is, as long as it is held back.
#[derive(Clone)]
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
            for signal in [SIGPWR, SIGTERM, SIGINT] {
                raise(signal).unwrap();
                assert!(stop.wait().is_some());
            }
            second.allow();
            raise(SIGPWR).unwrap();
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

    #[test]
    fn what_has_a_meaning_elsewhere_is_survived() {
        assert_eq!(
            as_child("what_has_a_meaning_elsewhere_is_survived", &[SIGXFSZ, SIGUSR1, SIGUSR2, SIGTERM]),
            Some(40)
        );
    }

    #[test]
    fn work_is_left_behind_when_a_signal_comes() {
        let test = "work_is_left_behind_when_a_signal_comes";
        if std::env::var_os(CHILD).is_some() {
            let stop = StopSignals::install().unwrap();
            assert_eq!(stop.unless_asked(|| 7).unwrap(), Some(7));
            let never = stop.unless_asked(|| {
                raise(SIGTERM).unwrap();
                loop {
                    thread::park();
                }
            });
            assert_eq!(never.unwrap(), None::<()>);
            std::process::exit(42);
        }
        assert_eq!(as_child(test, &[]), Some(42));
    }

    #[test]
    fn a_panic_at_work_is_not_waited_for() {
        let stop = StopSignals::install().unwrap();
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            stop.unless_asked(|| panic!("on purpose"))
        }));
        assert!(result.is_err_and(|panic| *panic.downcast::<&str>().unwrap() == "on purpose"));
    }
}

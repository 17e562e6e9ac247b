//! How a run ends: by a signal, and with what is in flight.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use anyhow::{Context, anyhow};
use reactor::Pool;
use vmm::Machine;

use super::terminal::Terminal;
use crate::drain::DRAIN_MAX;
use crate::failure::{EXIT_RUNTIME, Failure};
use crate::stop::{SecondSignal, StopSignals};

/// Waits are counted in these: time in which this process was stopped itself is no time.
const STEP: Duration = Duration::from_secs(1);

/// What signals do to a machine: the first presses its power button, and the second stops it, or the first if the guest
/// does not listen to the button. The one after that ends the process.
pub(super) struct Signalled {
    pub(super) machine: Weak<Machine>,
    pub(super) terminal: Option<Arc<Terminal>>,
    /// The order to end at once, which is held back until the terminal is given back.
    pub(super) at_once: SecondSignal,
    pub(super) quiet: bool,
    /// The guest has been asked to come to its end.
    pub(super) asked: Arc<AtomicBool>,
}

impl Signalled {
    /// Begins to listen.
    pub(super) fn listen(self, mut signals: StopSignals) -> anyhow::Result<()> {
        let listen = move || {
            let Some(first) = signals.wait() else { return };
            if self.ask(first) && signals.wait().is_none() {
                return;
            }
            self.stop();
        };
        thread::Builder::new().name("signals".into()).spawn(listen).context("cannot start a thread")?;
        Ok(())
    }

    /// Asks the guest to come to its end. False if it does not listen.
    fn ask(&self, signal: &str) -> bool {
        let listens = self.machine.upgrade().is_some_and(|machine| machine.press_power_button());
        self.asked.store(listens, Ordering::Release);
        if listens && !self.quiet {
            let _ = writeln!(
                io::stderr(),
                "{signal}: the guest is asked to come to its end; another signal stops it"
            );
        }
        listens
    }

    /// Stops the machine. What does not come to rest then, because storage or a console takes nothing, is left behind.
    fn stop(&self) {
        match &self.terminal {
            Some(terminal) => terminal.give_back(),
            None => self.at_once.allow(),
        }
        if let Some(machine) = self.machine.upgrade() {
            machine.stop();
        }
        (0..DRAIN_MAX.as_secs()).for_each(|_| thread::sleep(STEP));
        let _ = writeln!(io::stderr(), "error: not at rest within {} s", DRAIN_MAX.as_secs());
        std::process::exit(EXIT_RUNTIME.into());
    }
}

/// Waits until everything in flight is done, but not for storage that does not answer.
pub(super) fn finish(machine: Arc<Machine>, pool: Arc<Pool>) -> Result<(), Failure> {
    let (tell, told) = mpsc::channel();
    let finish = move || {
        let stopped = pool.stop();
        drop(machine);
        let _ = tell.send(stopped);
    };
    thread::Builder::new().name("finish".into()).spawn(finish).context("cannot start a thread")?;
    match wait(&told) {
        Some(stopped) => Ok(stopped.context("cannot stop the I/O threads")?),
        None => Err(Failure::Runtime(anyhow!(
            "not drained within {} s, so what is in flight is left to the storage",
            DRAIN_MAX.as_secs()
        ))),
    }
}

/// Waits for as long as a drain may take.
fn wait<T>(told: &Receiver<T>) -> Option<T> {
    for _ in 0..DRAIN_MAX.as_secs() {
        match told.recv_timeout(STEP) {
            Ok(told) => return Some(told),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return None,
        }
    }
    None
}

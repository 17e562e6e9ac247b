//! How a run ends: by a signal, and with what is in flight.

use std::io::{self, Write};
use std::sync::{Arc, mpsc};
use std::thread;

use anyhow::{Context, anyhow};
use reactor::Pool;
use vmm::Machine;

use super::terminal::Terminal;
use crate::drain::DRAIN_MAX;
use crate::failure::{EXIT_RUNTIME, Failure};
use crate::stop::StopSignals;

/// Has the first signal stop the machine. What does not come to rest then, because storage or a console takes nothing,
/// is left behind.
pub(super) fn stop_by_signal(
    mut signals: StopSignals,
    machine: Arc<Machine>,
    terminal: Option<Arc<Terminal>>,
) -> anyhow::Result<()> {
    let wait = move || {
        if signals.wait().is_some() {
            if let Some(terminal) = terminal {
                terminal.give_back();
            }
            machine.stop();
            thread::sleep(DRAIN_MAX);
            let _ = writeln!(io::stderr(), "error: not at rest within {} s", DRAIN_MAX.as_secs());
            std::process::exit(EXIT_RUNTIME.into());
        }
    };
    thread::Builder::new().name("signals".into()).spawn(wait).context("cannot start a thread")?;
    Ok(())
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
    match told.recv_timeout(DRAIN_MAX) {
        Ok(stopped) => Ok(stopped.context("cannot stop the I/O threads")?),
        Err(_) => Err(Failure::Runtime(anyhow!(
            "not drained within {} s, so what is in flight is left to the storage",
            DRAIN_MAX.as_secs()
        ))),
    }
}

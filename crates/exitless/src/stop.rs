//! Being told to end: SIGTERM or SIGINT. The first one is a request, the second one an order.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use signal_hook::iterator::{Handle, Signals};

use crate::failure::EXIT_RUNTIME;

const SIGNALS: [i32; 2] = [SIGTERM, SIGINT];

/// The signals that end a service.
pub(crate) struct StopSignals(Signals);

impl StopSignals {
    /// From here on a first signal is remembered, and a second one ends the process at once.
    pub(crate) fn install() -> io::Result<Self> {
        let asked = Arc::new(AtomicBool::new(false));
        for signal in SIGNALS {
            // In this order: the first signal finds the flag unset, and sets it.
            flag::register_conditional_shutdown(signal, EXIT_RUNTIME.into(), asked.clone())?;
            flag::register(signal, asked.clone())?;
        }
        Signals::new(SIGNALS).map(Self)
    }

    /// Ends the wait when it is dropped.
    pub(crate) fn handle(&self) -> StopHandle {
        StopHandle(self.0.handle())
    }

    /// Waits for the first signal, which may have come already; None if a [`StopHandle`] was dropped before that.
    pub(crate) fn wait(&mut self) -> Option<&'static str> {
        match self.0.forever().next()? {
            SIGINT => Some("SIGINT"),
            _ => Some("SIGTERM"),
        }
    }
}

/// Held by whoever the service cannot do without.
pub(crate) struct StopHandle(Handle);

impl Drop for StopHandle {
    fn drop(&mut self) {
        self.0.close();
    }
}

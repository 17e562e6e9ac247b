//! The terminal on stdin, lent to the guest: every key is the guest's, Ctrl-C, Tab and arrows too.
//!
//! The terminal does nothing with its input any more (it echoes nothing, edits no line and makes no signals), but goes
//! on to process its output, so that what this program says beside the guest begins on the left. Whatever ends the
//! program gives the terminal back as it was: the guest's end, an error, a panic of the main thread, a signal.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use rustix::process::getpgrp;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetpgrp, tcsetattr};

use crate::stop::SecondSignal;

/// A terminal that is lent. Threads may hold on to it longer than it is.
pub(super) struct Terminal {
    before: Termios,
    lent: Mutex<bool>,
    second_signal: SecondSignal,
}

/// As long as it lives, and nobody says otherwise, the terminal is lent.
pub(super) struct Loan(Arc<Terminal>);

impl Loan {
    /// Lends the terminal; None if stdin is none. `second_signal` is allowed to end the process at once only when the
    /// terminal was given back.
    pub(super) fn take(second_signal: SecondSignal) -> anyhow::Result<Option<Self>> {
        let stdin = io::stdin();
        if !isatty(&stdin) {
            return Ok(None);
        }
        let before = tcgetattr(&stdin).context("cannot read the terminal's settings")?;
        let loan = Self(Arc::new(Terminal { before, lent: Mutex::new(true), second_signal }));
        tcsetattr(&stdin, OptionalActions::Now, &raw(&loan.0.before))
            .context("cannot set up the terminal")?;
        Ok(Some(loan))
    }

    pub(super) fn terminal(&self) -> &Arc<Terminal> {
        &self.0
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        self.0.give_back();
    }
}

impl Terminal {
    /// Gives it back. The first time counts: later, it may be somebody else's.
    pub(super) fn give_back(&self) {
        let stdin = io::stdin();
        // Held until it is given back: whoever comes second may be about to end the process.
        let mut lent = self.lent.lock().unwrap_or_else(PoisonError::into_inner);
        // From the background, the attempt would stop this process, and the settings are not its own any more.
        let background = tcgetpgrp(&stdin).is_ok_and(|foreground| foreground != getpgrp());
        if std::mem::take(&mut *lent) && !background {
            // `Now`: what waits to be shown may wait for ever.
            if let Err(error) = tcsetattr(&stdin, OptionalActions::Now, &self.before) {
                tracing::debug!(%error, "the terminal's settings are not put back");
            }
        }
        self.second_signal.allow();
    }
}

/// The settings for raw input.
fn raw(before: &Termios) -> Termios {
    let mut raw = before.clone();
    raw.make_raw();
    raw.output_modes = before.output_modes;
    raw
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::process::{Command, Stdio};

    use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
    use rustix::termios::LocalModes;

    use super::*;
    use crate::stop::StopSignals;

    /// Set in the child that has a terminal.
    const CHILD: &str = "EXITLESS_TERMINAL_TEST";

    #[test]
    fn a_panic_gives_the_terminal_back() {
        if std::env::var_os(CHILD).is_some() {
            let mut signals = StopSignals::install().unwrap();
            let second = signals.hold_second().unwrap().unwrap();
            let _loan = Loan::take(second).unwrap().unwrap();
            assert!(!tcgetattr(io::stdin()).unwrap().local_modes.intersects(LocalModes::ICANON));
            panic!("on purpose");
        }
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let keys = openpt(flags).unwrap();
        unlockpt(&keys).unwrap();
        let terminal = ioctl_tiocgptpeer(&keys, flags).unwrap();
        let settings = || format!("{:?}", tcgetattr(terminal.as_fd()).unwrap());
        let before = settings();
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "run::terminal::tests::a_panic_gives_the_terminal_back", "--nocapture"]);
        child.env(CHILD, "1").stdin(terminal.try_clone().unwrap());
        let output = child.stdout(Stdio::null()).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(stderr.contains("on purpose"), "{stderr}");
        assert_eq!(settings(), before);
    }
}

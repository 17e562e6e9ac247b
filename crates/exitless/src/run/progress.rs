//! What is going on, as one line on a terminal that changes.

use std::io::{self, IsTerminal, Write};
use std::time::Instant;

use vmm::Snapshot;

/// The line.
pub(super) struct Progress {
    shown: bool,
    terminal: bool,
    began: Instant,
    last: Option<Snapshot>,
}

impl Progress {
    pub(super) fn new() -> Self {
        Self { shown: false, terminal: io::stderr().is_terminal(), began: Instant::now(), last: None }
    }

    /// Shows what happened since the last time.
    pub(super) fn show(&mut self, now: &Snapshot) {
        if !self.terminal {
            return;
        }
        if let Some(last) = &self.last {
            self.line(&text(self.began.elapsed().as_secs(), &(now.clone() - last)));
            self.shown = true;
        }
        self.last = Some(now.clone());
    }

    pub(super) fn clear(&mut self) {
        if std::mem::take(&mut self.shown) {
            self.line("");
        }
    }

    fn line(&self, text: &str) {
        let mut stderr = io::stderr().lock();
        // Carriage return, the text, and "erase to the end of the line" (ECMA-48, 8.3.41).
        let _ = write!(stderr, "\r{text}\x1b[K").and_then(|()| stderr.flush());
    }
}

fn text(seconds: u64, since: &Snapshot) -> String {
    let per_s = |count: u64| count as f64 * 1e9 / since.at_ns.max(1) as f64;
    format!("{seconds} s: {:.0} requests/s, {:.0} exits/s", per_s(since.requests()), per_s(since.exits()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_per_second() {
        let mut since = Snapshot { at_ns: 500_000_000, ..Snapshot::default() };
        since.queues.push(vmm::stats::QueueSnapshot::default());
        since.queues[0].counters.requests = 1000;
        assert_eq!(text(3, &since), "3 s: 2000 requests/s, 0 exits/s");
    }
}

//! What is going on, on stderr: on a terminal one line that changes, elsewhere a line now and then in a long run.
//!
//! Never among the lines of a guest's console.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use vmm::Snapshot;

use super::console::Stream;

/// How often the line on a terminal changes.
const CHANGE: Duration = Duration::from_millis(500);
/// How long a run is that says something elsewhere, and how often it does.
const LINE: Duration = Duration::from_secs(10);

/// How it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    NotAtAll,
    Changing,
    Lines,
}

impl Way {
    fn choose(quiet: bool, console_on_stderr: bool, terminal: bool) -> Self {
        match (quiet || console_on_stderr, terminal) {
            (true, _) => Self::NotAtAll,
            (false, true) => Self::Changing,
            (false, false) => Self::Lines,
        }
    }

    fn every(self) -> Option<Duration> {
        match self {
            Self::NotAtAll => None,
            Self::Changing => Some(CHANGE),
            Self::Lines => Some(LINE),
        }
    }
}

/// Tells what is going on.
pub(super) struct Progress {
    way: Way,
    began: Instant,
    /// How many times to tell have passed.
    told: u32,
    last: Snapshot,
}

impl Progress {
    /// Of a machine that begins at `now`, whose guest has a console on `console`, if it has one.
    pub(super) fn new(quiet: bool, console: Option<Stream>, now: Snapshot) -> Self {
        let console_on_stderr = console.is_some_and(Stream::is_stderr);
        let way = Way::choose(quiet, console_on_stderr, io::stderr().is_terminal());
        Self { way, began: Instant::now(), told: 0, last: now }
    }

    /// How long it is until there is something to tell.
    pub(super) fn wait(&self) -> Duration {
        self.way.every().map_or(Duration::MAX, |every| due(every, self.told, self.began.elapsed()))
    }

    /// Tells what happened since the last time, if it is time to.
    pub(super) fn show(&mut self, now: Snapshot) {
        if !self.wait().is_zero() {
            return;
        }
        self.told = self.way.every().map_or(0, |every| periods(every, self.began.elapsed()));
        let since = now.clone() - &self.last;
        self.last = now;
        let text = text(self.began.elapsed().as_secs(), &since);
        match self.way {
            Way::NotAtAll => {}
            Way::Changing => line(&text),
            Way::Lines => {
                let _ = writeln!(io::stderr(), "running for {text}");
            }
        }
    }

    pub(super) fn clear(&self) {
        if self.way == Way::Changing && self.told > 0 {
            line("");
        }
    }
}

/// How many times to tell have passed; those that nobody had time for are left out.
fn periods(every: Duration, elapsed: Duration) -> u32 {
    u32::try_from(elapsed.as_millis() / every.as_millis().max(1)).unwrap_or(u32::MAX)
}

/// How long it is from `elapsed` until the next time to tell, when `told` of them have passed.
fn due(every: Duration, told: u32, elapsed: Duration) -> Duration {
    every.saturating_mul(told.saturating_add(1)).saturating_sub(elapsed)
}

fn line(text: &str) {
    let mut stderr = io::stderr().lock();
    // Carriage return, the text, and "erase to the end of the line" (ECMA-48, 8.3.41).
    let _ = write!(stderr, "\r{text}\x1b[K").and_then(|()| stderr.flush());
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

    #[test]
    fn it_is_told_where_it_disturbs_nobody() {
        assert_eq!(Way::choose(false, false, true), Way::Changing);
        assert_eq!(Way::choose(false, false, false), Way::Lines);
        for terminal in [false, true] {
            assert_eq!(Way::choose(true, false, terminal), Way::NotAtAll, "quiet");
            assert_eq!(Way::choose(false, true, terminal), Way::NotAtAll, "a console");
        }
        assert!(Stream::Stderr.is_stderr());
    }

    #[test]
    fn lines_come_at_their_times_and_none_in_a_short_run() {
        let seconds = Duration::from_secs;
        assert_eq!(due(LINE, 0, seconds(0)), seconds(10));
        assert_eq!(due(LINE, 0, seconds(9)), seconds(1));
        assert_eq!(due(LINE, 0, seconds(10)), seconds(0));
        assert_eq!(due(LINE, 1, seconds(10)), seconds(10));
        assert_eq!(due(LINE, 1, seconds(35)), seconds(0), "late");
        assert_eq!(due(LINE, periods(LINE, seconds(35)), seconds(35)), seconds(5), "and only once");
    }
}

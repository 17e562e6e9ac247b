//! What is going on, on stderr: one line that changes on a terminal, a line for each repetition elsewhere.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

pub(crate) struct Progress {
    terminal: bool,
    done: usize,
    total: usize,
    began: Instant,
}

impl Progress {
    pub(crate) fn new(total: usize) -> Self {
        Self { terminal: std::io::stderr().is_terminal(), done: 0, total, began: Instant::now() }
    }

    /// How many repetitions there will be.
    pub(crate) fn total(&self) -> usize {
        self.total
    }

    /// `what` begins.
    pub(crate) fn begin(&mut self, what: &str) {
        self.done += 1;
        if self.terminal {
            let left = self.left().map_or(String::new(), |left| format!("  {} left", duration(left)));
            self.line(&format!("[{}/{}] {what}{left}", self.done, self.total));
        }
    }

    /// `what` has ended with `result`.
    pub(crate) fn end(&self, what: &str, result: &str) {
        if !self.terminal {
            eprintln!("[{}/{}] {what}: {result}", self.done, self.total);
        }
    }

    /// A remark that stays.
    pub(crate) fn note(&self, text: &str) {
        self.clear();
        eprintln!("{text}");
    }

    pub(crate) fn clear(&self) {
        if self.terminal {
            self.line("");
        }
    }

    fn line(&self, text: &str) {
        let mut stderr = std::io::stderr().lock();
        // Carriage return, the text, and "erase to the end of the line" (ECMA-48, 8.3.41).
        let _ = write!(stderr, "\r{text}\x1b[K").and_then(|()| stderr.flush());
    }

    /// Extrapolated from what is done.
    fn left(&self) -> Option<Duration> {
        let done = self.done.checked_sub(1).filter(|&done| done >= 3)?;
        Some(self.began.elapsed().mul_f64((self.total - done) as f64 / done as f64))
    }
}

fn duration(duration: Duration) -> String {
    match duration.as_secs() {
        seconds @ 0..=99 => format!("{seconds} s"),
        seconds => format!("{} min", seconds.div_ceil(60)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_short() {
        assert_eq!(duration(Duration::from_secs(99)), "99 s");
        assert_eq!(duration(Duration::from_secs(100)), "2 min");
        assert_eq!(duration(Duration::from_secs(121)), "3 min");
    }
}

//! How far apart the two CPUs of a run are: how long a cache line takes from one to the other.
//!
//! A host may move virtual CPUs to other cores at any time, nearer together or farther apart, and everything that two
//! CPUs do together takes that much less or more time. A figure is therefore kept with the distance at which it was
//! measured, and figures are compared at the same one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::cpus::{self, Cpus};

/// Distances are the same that differ by less than this factor: neighbours differ by 20 %, sockets and dies by 100 % or more.
const SAME: f64 = 1.5;
/// Rounds of a look: the best of several, because an interrupt in between says nothing about the distance.
const BATCHES: u32 = 8;
const ROUNDS: u32 = 500;
/// Between two looks while waiting.
const PAUSE: Duration = Duration::from_millis(50);
/// How long to wait before a repetition.
const WAIT_MAX: Duration = Duration::from_secs(3);

/// The share of `nearest_ns` beyond which CPUs are farther apart.
pub(crate) fn is_near(hop_ns: f64, nearest_ns: f64) -> bool {
    hop_ns < SAME * nearest_ns
}

/// The distance between server and client, as it was seen so far.
pub(crate) struct Distance {
    cpus: Cpus,
    nearest_ns: f64,
    patience: Duration,
}

impl Distance {
    /// Waits no longer than `patience` in all.
    pub(crate) fn new(cpus: Cpus, patience: Duration) -> Self {
        let mut new = Self { cpus, nearest_ns: f64::INFINITY, patience };
        new.look();
        new
    }

    /// Nanoseconds one way; None where there is one CPU only.
    pub(crate) fn look(&mut self) -> Option<f64> {
        let ns = ping_pong(self.cpus)?;
        self.nearest_ns = self.nearest_ns.min(ns);
        Some(ns)
    }

    /// Waits a while for the CPUs to be as near as they were seen before.
    pub(crate) fn settle(&mut self) -> Option<f64> {
        let began = Instant::now();
        let mut ns = self.look()?;
        while !self.is_nearest(ns) && began.elapsed() < WAIT_MAX.min(self.patience) {
            std::thread::sleep(PAUSE);
            ns = self.look()?;
        }
        self.patience = self.patience.saturating_sub(began.elapsed());
        Some(ns)
    }

    pub(crate) fn is_nearest(&self, hop_ns: f64) -> bool {
        is_near(hop_ns, self.nearest_ns)
    }

    /// Whether it is worth waiting, or doing again what was disturbed.
    pub(crate) fn is_patient(&self) -> bool {
        self.patience > PAUSE
    }
}

/// Passes a word back and forth between threads on the two CPUs.
fn ping_pong(cpus: Cpus) -> Option<f64> {
    cpus.server?;
    #[repr(align(128))]
    struct Line(AtomicU32);
    let line = Arc::new(Line(AtomicU32::new(0)));
    let total = 2 * BATCHES * ROUNDS;
    let wait = |line: &Line, value: u32| {
        while line.0.load(Ordering::Acquire) != value {
            std::hint::spin_loop();
        }
    };
    let theirs = line.clone();
    let far = std::thread::spawn(move || {
        let _ = cpus::pin(cpus.server);
        for value in (1..total).step_by(2) {
            wait(&theirs, value);
            theirs.0.store(value + 1, Ordering::Release);
        }
    });
    let near = std::thread::spawn(move || {
        let _ = cpus::pin(cpus.client);
        let mut value = 0;
        let batch = |_| {
            let began = Instant::now();
            for _ in 0..ROUNDS {
                line.0.store(value + 1, Ordering::Release);
                value += 2;
                wait(&line, value);
            }
            began.elapsed().as_nanos() as f64 / f64::from(2 * ROUNDS)
        };
        (0..BATCHES).map(batch).reduce(f64::min)
    });
    far.join().ok()?;
    near.join().ok()?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_near_and_other_dies_are_not() {
        assert!(is_near(31.0, 26.0));
        assert!(!is_near(156.0, 26.0));
    }

    #[test]
    fn two_cpus_have_a_distance_and_one_has_none() {
        assert_eq!(ping_pong(Cpus { server: None, client: None }), None);
        let machine = reactor::Machine::read();
        let cpus = Cpus::choose(&machine, None, None).unwrap();
        let mut distance = Distance::new(cpus, Duration::ZERO);
        assert!(!distance.is_patient());
        assert_eq!(distance.settle().is_some(), cpus.server.is_some());
    }
}

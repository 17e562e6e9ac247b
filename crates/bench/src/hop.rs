//! How far apart the two CPUs of a run are: how long a cache line takes from one to the other.
//!
//! A host may move virtual CPUs to other cores at any time, nearer together or farther apart, and everything that two
//! CPUs do together takes that much less or more time. A figure is therefore kept with the distance at which it was
//! measured, and figures are compared at the same one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::cpus::{self, Cpus};

/// Distances are the same that differ by less than this factor: neighbours differ by 20 %, sockets and dies by 100 % or more.
const SAME: f64 = 1.5;
/// What is seen less often than once in so many times is an exception.
const RARE: usize = 10;
/// Rounds of a look: the best of several, because an interrupt in between says nothing about the distance.
const BATCHES: u32 = 8;
const ROUNDS: u32 = 500;
/// Between two looks while waiting.
const PAUSE: Duration = Duration::from_millis(50);
/// How often a repetition is made during which the CPUs were moved apart.
const TRIES: u32 = 3;
/// How much of a run may pass with waiting for CPUs that are near each other, as a share of the load's duration.
const PATIENCE: f64 = 0.3;
/// How long to wait before a repetition.
const WAIT_MAX: Duration = Duration::from_secs(3);

/// What of `seen` is the shortest distance that was no exception. Virtual CPUs that are threads of one core for a moment
/// are nearer, and each has half of the core.
pub(crate) fn nearest_ns(seen: impl Iterator<Item = f64>) -> Option<f64> {
    let mut seen: Vec<f64> = seen.collect();
    seen.sort_by(f64::total_cmp);
    let alike = |from: usize| seen[from..].iter().take_while(|&&ns| is_near(ns, seen[from])).count();
    (0..seen.len()).find(|&from| alike(from) * RARE >= seen.len()).map(|from| seen[from])
}

/// Whether the CPUs were as near to each other as they usually are when they are near: neither farther nor nearer.
pub(crate) fn is_near(hop_ns: f64, nearest_ns: f64) -> bool {
    hop_ns < SAME * nearest_ns && nearest_ns < SAME * hop_ns
}

/// The distance between server and client, as it was seen so far.
pub(crate) struct Distance {
    cpus: Cpus,
    seen: Vec<f64>,
    patience: Duration,
}

impl Distance {
    /// For a run of measurements that take `load_ms` together.
    pub(crate) fn new(cpus: Cpus, load_ms: u64) -> Self {
        let patience = Duration::from_millis(load_ms).mul_f64(PATIENCE);
        let mut new = Self { cpus, seen: Vec::new(), patience };
        new.look();
        new
    }

    /// Measures while the CPUs are as near to each other as they were before, if that can be had. `hop_ns` is where a
    /// result keeps the distance; it is measured again if that is far, and kept as it is without such a place.
    pub(crate) fn near<T>(
        &mut self,
        mut measure: impl FnMut() -> Result<T>,
        hop_ns: impl Fn(&mut T) -> Option<&mut Option<f64>>,
    ) -> Result<T> {
        let mut tries = TRIES;
        loop {
            tries -= 1;
            let before = self.settle();
            let mut measured = measure()?;
            if let Some(hop_ns) = hop_ns(&mut measured) {
                *hop_ns = before.zip(self.look()).map(|(before, after)| before.max(after));
                let moved = hop_ns.is_some_and(|ns| !self.is_near(ns));
                if moved && tries > 0 && self.patience > PAUSE {
                    continue;
                }
            }
            return Ok(measured);
        }
    }

    /// Nanoseconds one way; None where there is one CPU only.
    fn look(&mut self) -> Option<f64> {
        let ns = ping_pong(self.cpus)?;
        self.seen.push(ns);
        Some(ns)
    }

    /// Waits a while for the CPUs to be as near as they were seen before.
    fn settle(&mut self) -> Option<f64> {
        let began = Instant::now();
        let mut ns = self.look()?;
        while !self.is_near(ns) && began.elapsed() < WAIT_MAX.min(self.patience) {
            std::thread::sleep(PAUSE);
            ns = self.look()?;
        }
        self.patience = self.patience.saturating_sub(began.elapsed());
        Some(ns)
    }

    fn is_near(&self, hop_ns: f64) -> bool {
        nearest_ns(self.seen.iter().copied()).is_some_and(|nearest_ns| is_near(hop_ns, nearest_ns))
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
        assert!(!is_near(13.0, 26.0), "two threads of one core");
    }

    #[test]
    fn exceptions_are_not_what_others_are_compared_with() {
        let usual = [30.0, 31.0, 156.0, 155.0, 32.0, 30.5, 157.0, 31.0, 33.0, 30.0, 155.0];
        assert_eq!(nearest_ns(usual.into_iter().chain([13.0])), Some(30.0));
        assert_eq!(nearest_ns([155.0, 30.0].into_iter()), Some(30.0), "of a few, each counts");
        assert_eq!(nearest_ns(std::iter::empty()), None);
    }

    #[test]
    fn two_cpus_have_a_distance_and_one_has_none() {
        assert_eq!(ping_pong(Cpus { server: None, client: None }), None);
        let machine = reactor::Machine::read();
        let cpus = Cpus::choose(&machine, None, None).unwrap();
        let mut distance = Distance::new(cpus, 0);
        let mut times = 0;
        let measured = distance.near(|| Ok((times += 1, None)), |(_, hop_ns)| Some(hop_ns)).unwrap();
        assert_eq!(measured.1.is_some(), cpus.server.is_some());
        assert_eq!(times, 1, "without patience nothing is measured again");
    }
}

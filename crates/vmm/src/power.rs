//! Running, pausing and ending: the one place that virtual CPUs, devices and the user agree in.
//!
//! Devices ask for the end (a guest writes a reset register), and so does the user. Whoever asks first decides how the
//! machine ends. Virtual CPUs look here before each entry into the guest; [`Power::change`] says when somebody has to
//! be kicked out of one.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// How a machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest switched it off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// A virtual CPU ran into a fault while it began to handle another one, and into a third.
    TripleFault,
    /// The guest's kernel said that it has panicked.
    Panicked,
    /// The guest ended it with a status, by a write to port 0x501. 0 is success.
    Exit(u8),
    /// It was told to stop.
    Stopped,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Running,
    Pausing,
    Over,
}

struct State {
    phase: Phase,
    outcome: Option<Outcome>,
    /// The guest's kernel has panicked, and another one goes on.
    crashed: bool,
    /// Virtual CPUs that have begun and not ended.
    alive: usize,
    /// Of those, how many wait for the pause to end.
    resting: usize,
}

/// What a machine is doing.
pub(crate) struct Power {
    state: Mutex<State>,
    changed: Condvar,
}

impl Power {
    pub(crate) fn new() -> Self {
        let state = State { phase: Phase::Running, outcome: None, crashed: false, alive: 0, resting: 0 };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Ends the machine, unless it has ended. Virtual CPUs that are in the guest must be kicked afterwards; the one that
    /// called a device notices by itself.
    pub(crate) fn end(&self, outcome: Outcome) {
        let mut state = self.lock();
        if state.phase != Phase::Over {
            state.phase = Phase::Over;
            let ends_a_crash = state.crashed && matches!(outcome, Outcome::Reset | Outcome::PowerOff);
            state.outcome.get_or_insert(if ends_a_crash { Outcome::Panicked } else { outcome });
            self.changed.notify_all();
        }
    }

    /// Takes note that the guest's kernel has panicked, though it goes on to its crash kernel.
    pub(crate) fn crashed(&self) {
        self.lock().crashed = true;
    }

    /// How it ended, if it has.
    #[cfg(test)]
    pub(crate) fn outcome(&self) -> Option<Outcome> {
        self.lock().outcome
    }

    /// Waits until it has ended.
    pub(crate) fn wait(&self) -> Outcome {
        let mut state = self.lock();
        loop {
            if let Some(outcome) = state.outcome {
                return outcome;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A virtual CPU begins.
    pub(crate) fn begin(&self) {
        self.lock().alive += 1;
    }

    /// A virtual CPU ends.
    pub(crate) fn retire(&self) {
        self.lock().alive -= 1;
        self.changed.notify_all();
    }

    /// A virtual CPU asks whether it may go on; waits while the machine is paused. False if it is over.
    pub(crate) fn may_go_on(&self) -> bool {
        let mut state = self.lock();
        if state.phase == Phase::Pausing {
            state.resting += 1;
            self.changed.notify_all();
            while state.phase == Phase::Pausing {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.resting -= 1;
        }
        state.phase != Phase::Over
    }

    /// Begins a pause. False if the machine is over.
    pub(crate) fn pause(&self) -> bool {
        let mut state = self.lock();
        if state.phase == Phase::Running {
            state.phase = Phase::Pausing;
        }
        state.phase == Phase::Pausing
    }

    /// Waits until every virtual CPU rests, or the pause is over.
    pub(crate) fn wait_for_rest(&self) {
        let mut state = self.lock();
        while state.phase == Phase::Pausing && state.resting < state.alive {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Ends a pause.
    pub(crate) fn resume(&self) {
        let mut state = self.lock();
        if state.phase == Phase::Pausing {
            state.phase = Phase::Running;
            self.changed.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::thread;

    use super::*;

    #[test]
    fn whoever_ends_it_first_decides_how() {
        let power = Power::new();
        assert!(power.may_go_on());
        power.end(Outcome::Exit(3));
        power.end(Outcome::Stopped);
        assert!(!power.may_go_on());
        assert_eq!(power.wait(), Outcome::Exit(3));
        assert!(!power.pause());
    }

    #[test]
    fn nobody_goes_on_while_it_is_paused() {
        let shared = Arc::new((Power::new(), AtomicU64::new(0)));
        let power = &shared.0;
        let threads: Vec<_> = (0..3)
            .map(|_| {
                power.begin();
                let shared = shared.clone();
                thread::spawn(move || {
                    while shared.0.may_go_on() {
                        shared.1.fetch_add(1, Ordering::Relaxed);
                        thread::yield_now();
                    }
                    shared.0.retire();
                })
            })
            .collect();
        for _ in 0..20 {
            assert!(power.pause());
            power.wait_for_rest();
            let steps = shared.1.load(Ordering::Relaxed);
            thread::yield_now();
            assert_eq!(shared.1.load(Ordering::Relaxed), steps);
            power.resume();
        }
        assert!(power.pause());
        power.end(Outcome::Stopped);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
}

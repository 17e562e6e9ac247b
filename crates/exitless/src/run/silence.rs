//! When to give up an embedded guest of which nothing is heard any more.
//!
//! The guest itself has a limit for everything that it waits for, and says which one was reached. This limit is for the
//! guest that cannot: one that a device keeps in an exit, say, because it does not finish what it has in flight.
//!
//! Silence is time in which somebody listened. A program that was stopped itself, and its guest with it, has not.

use std::time::{Duration, Instant};

/// How long a guest may be silent beyond its job: it boots within a second, but for the slowest of nested machines, and
/// none of its own limits is longer.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
/// How long a machine that was told to stop may take. Longer, and what held its guest holds its threads too.
const STOP_MAX: Duration = Duration::from_secs(5);

/// How much time may have passed since the look before, to be taken for time in which somebody listened.
const HEARING_MAX: Duration = Duration::from_secs(2);

/// How long nothing was heard of the guest.
pub(super) struct Silence {
    job: Duration,
    patience: Duration,
    silent: Duration,
    looked: Instant,
    requests: u64,
    broken_off: bool,
}

/// What is to be done about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Wait.
    Wait,
    /// Stop the machine, for this reason.
    Stop(String),
    /// Leave it behind: it did not stop.
    Leave,
}

impl Silence {
    /// Of a guest whose job takes so long.
    pub(super) fn new(job: Duration, patience: Duration) -> Self {
        Self { job, patience, silent: Duration::ZERO, looked: Instant::now(), requests: 0, broken_off: false }
    }

    /// It said something.
    pub(super) fn heard(&mut self) {
        self.silent = Duration::ZERO;
        self.looked = Instant::now();
    }

    /// It has made so many requests until `now`: as long as there are new ones, it is not silent.
    pub(super) fn look(&mut self, requests: u64, now: Instant) -> Verdict {
        let since = now.saturating_duration_since(self.looked);
        self.looked = now;
        self.silent += since.min(HEARING_MAX);
        let silent = self.silent;
        if self.broken_off {
            return if silent < STOP_MAX { Verdict::Wait } else { Verdict::Leave };
        }
        if std::mem::replace(&mut self.requests, requests) != requests {
            self.silent = Duration::ZERO;
        } else if silent > self.job + self.patience {
            (self.broken_off, self.silent) = (true, Duration::ZERO);
            return Verdict::Stop(format!(
                "it has said nothing and made no request for {} s, and its job takes {} s",
                silent.as_secs(),
                self.job.as_secs_f32()
            ));
        }
        Verdict::Wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_given_up_when_it_neither_speaks_nor_works() {
        let mut silence = Silence::new(Duration::from_secs(2), Duration::from_secs(30));
        let start = silence.looked;
        // Looks from one second to another, and what the last one comes to.
        let mut look = |requests, seconds: std::ops::RangeInclusive<u64>| {
            let at = |second| start + Duration::from_secs(second);
            seconds.map(|second| silence.look(requests, at(second))).last()
        };
        assert_eq!(look(0, 1..=32), Some(Verdict::Wait));
        assert_eq!(look(7, 33..=65), Some(Verdict::Wait), "there was a request");
        let Some(Verdict::Stop(reason)) = look(7, 66..=66) else { panic!("it goes on for ever") };
        assert!(reason.contains("for 33 s, and its job takes 2 s"), "{reason}");
        assert_eq!(look(7, 67..=70), Some(Verdict::Wait));
        assert_eq!(look(8, 71..=71), Some(Verdict::Leave));
    }

    #[test]
    fn a_guest_is_not_blamed_for_time_in_which_this_program_was_stopped() {
        let mut silence = Silence::new(Duration::from_secs(2), Duration::from_secs(30));
        let start = silence.looked;
        let at = |seconds| start + Duration::from_secs(seconds);
        for stop in 1..=3 {
            assert_eq!(silence.look(0, at(stop * 40)), Verdict::Wait);
        }
    }
}

//! Queues whose driver does not kick, looked at every so often.
//!
//! A front end may pass no descriptor to kick ("polling should be used"). Whether a thread polls for good is not for a
//! front end to say: where it does not, the thread sleeps as ever and a timer takes the kick's place.

use std::os::fd::RawFd;

use reactor::{Budget, Poller, Ticks, Work};

use crate::device::PollerBuilder;

/// The time between two looks at an idle queue: a thousand of them take a percent of a CPU or so.
const LOOK_NS: u64 = 1_000_000;

struct Unkicked(Box<dyn Poller>);

/// The same poller, with a timer for kicks.
pub(crate) fn unkicked(builder: PollerBuilder) -> PollerBuilder {
    Box::new(move || Box::new(Unkicked(builder())))
}

impl Poller for Unkicked {
    fn poll(&mut self, now: Ticks, budget: Budget) -> Work {
        let mut work = self.0.poll(now, budget);
        let look = now.plus_ns(LOOK_NS);
        work.wake_at = Some(work.wake_at.map_or(look, |due| due.min(look)));
        work
    }

    fn arm(&mut self) -> bool {
        self.0.arm()
    }

    fn disarm(&mut self) {
        self.0.disarm();
    }

    fn wake_fds(&self) -> Vec<RawFd> {
        self.0.wake_fds()
    }

    fn awaits_completion(&self) -> bool {
        self.0.awaits_completion()
    }

    fn drain(&mut self, now: Ticks) -> bool {
        self.0.drain(now)
    }

    fn abandon(&mut self) -> bool {
        self.0.abandon()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Waits for storage, which has not ended.
    struct Busy;

    impl Poller for Busy {
        fn poll(&mut self, now: Ticks, _budget: Budget) -> Work {
            Work { done: 1, more: true, wake_at: Some(now.plus_ns(7)) }
        }

        fn arm(&mut self) -> bool {
            true
        }

        fn disarm(&mut self) {}

        fn wake_fds(&self) -> Vec<RawFd> {
            vec![3]
        }

        fn awaits_completion(&self) -> bool {
            true
        }

        fn drain(&mut self, _now: Ticks) -> bool {
            false
        }

        fn abandon(&mut self) -> bool {
            false
        }
    }

    #[test]
    fn a_queue_without_kicks_is_the_same_poller_but_for_a_timer() {
        let mut poller = unkicked(Box::new(|| Box::new(Busy)))();
        let (now, budget) = (Ticks(1), Budget { requests: 1, bytes: 1 });
        assert_eq!(poller.poll(now, budget), Busy.poll(now, budget), "what is due sooner stays");
        assert!(poller.arm() && poller.awaits_completion());
        assert_eq!(poller.wake_fds(), [3]);
        assert!(!poller.drain(now) && !poller.abandon(), "what it waits for still works on its memory");
    }
}

//! When to poll and when to sleep.
//!
//! A kick costs the guest an exit and the thread a wake-up, together several microseconds; a core that polls an
//! idle queue costs somebody else that core. The hybrid scheme of ES2 (Hu et al., TCC 2020) pays for neither: poll
//! while there is work, go on polling for a window after the last of it, then ask for a notification and sleep.
//! What the window should be depends on the load, so it follows the load.
//!
//! Everything here is a function of its arguments. The thread measures, these decide.

use std::fmt;
use std::str::FromStr;

use crate::Ticks;

/// How a poller notices new work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Sleep until notified, whenever there is nothing to do. The baseline, and the one that costs least when idle.
    Notify,
    /// Poll while work comes, sleep when it stops.
    #[default]
    Hybrid,
    /// Never sleep. The lowest latency; takes the whole CPU whether or not there is work.
    Poll,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Notify => "notify",
            Self::Hybrid => "hybrid",
            Self::Poll => "poll",
        })
    }
}

/// A mode that does not exist.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("polling mode `{0}` is none of `notify`, `hybrid`, `poll`")]
pub struct ModeError(String);

impl FromStr for Mode {
    type Err = ModeError;

    fn from_str(text: &str) -> Result<Self, ModeError> {
        match text {
            "notify" => Ok(Self::Notify),
            "hybrid" => Ok(Self::Hybrid),
            "poll" => Ok(Self::Poll),
            other => Err(ModeError(other.to_owned())),
        }
    }
}

/// The longest a hybrid poller polls in vain before it sleeps.
///
/// Polling for as long as sleeping and waking would cost is at most twice the cost of having known the future (the
/// ski-rental bound; Karlin et al., "Empirical Studies of Competitive Spinning for a Shared-Memory Multiprocessor",
/// SOSP 1991). Arming, sleeping, the guest's exit and the wake-up cost 5 µs on bare metal and some 50 µs when the
/// host is itself a guest; 100 µs covers the latter. It is also the damage limit: it is a thirtieth of the 3 ms a
/// CPU scheduler gives a task at a time, so on a crowded CPU a pause costs the neighbours no more than that.
pub const WINDOW_NS_MAX: u64 = 100_000;
/// Where the window of a new poller starts, and where it restarts once load is back: `halt_poll_ns_grow_start` of
/// KVM's adaptive halt polling is 10 µs.
pub const WINDOW_NS_START: u64 = 10_000;
/// Below this a window is not worth having, less time than arming and sleeping takes, and it becomes 0.
pub const WINDOW_NS_MIN: u64 = 2_500;
/// With a deadline nearer than this a thread polls on: a sleep would end later than that.
pub const SLEEP_NS_MIN: u64 = 10_000;

/// The window after work came `gap_ns` after the work before it.
///
/// A gap that fits into [`WINDOW_NS_MAX`] is a hit, caught by polling or missed narrowly: the window doubles until
/// it is twice the gap. A longer one is a miss, where all polling was in vain: the window halves, down to 0. A
/// guest that sends a request now and then is thus served by notifications alone after a few of them.
#[must_use]
pub fn window_after(window_ns: u64, gap_ns: u64) -> u64 {
    if gap_ns > WINDOW_NS_MAX {
        let halved = window_ns / 2;
        if halved < WINDOW_NS_MIN { 0 } else { halved }
    } else if gap_ns.saturating_mul(2) > window_ns {
        (window_ns * 2).clamp(WINDOW_NS_START, WINDOW_NS_MAX)
    } else {
        window_ns
    }
}

/// Until when a poller that last had work at `last_work` must be polled.
#[must_use]
#[inline]
pub fn awake_until(mode: Mode, last_work: Ticks, window_ns: u64) -> Ticks {
    match mode {
        Mode::Notify => Ticks(0),
        Mode::Hybrid => last_work.plus_ns(window_ns),
        Mode::Poll => Ticks(u64::MAX),
    }
}

/// What a thread does after a turn in which no poller found work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// Take another turn at once.
    Poll,
    /// Arm every poller and sleep; at the latest until this time.
    Sleep(Option<Ticks>),
}

/// Decides for a thread from the pollers' [`awake_until`] and their deadlines. It sleeps only if all agree.
#[must_use]
#[inline]
pub fn rest(now: Ticks, pollers: impl IntoIterator<Item = (Ticks, Option<Ticks>)>) -> Rest {
    let mut deadline = None;
    for (awake_until, wake_at) in pollers {
        if awake_until > now {
            return Rest::Poll;
        }
        deadline = crate::timer::earliest(deadline, wake_at);
    }
    match deadline {
        Some(at) if at.since_ns(now) < SLEEP_NS_MIN => Rest::Poll,
        deadline => Rest::Sleep(deadline),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settle(mut window_ns: u64, gap_ns: u64) -> u64 {
        for _ in 0..64 {
            window_ns = window_after(window_ns, gap_ns);
        }
        window_ns
    }

    #[test]
    fn modes_read_as_they_print() {
        for mode in [Mode::Notify, Mode::Hybrid, Mode::Poll] {
            assert_eq!(mode.to_string().parse(), Ok(mode));
        }
        let error = "Poll".parse::<Mode>().unwrap_err();
        assert_eq!(error.to_string(), "polling mode `Poll` is none of `notify`, `hybrid`, `poll`");
    }

    #[test]
    fn the_window_grows_to_twice_a_gap_it_can_cover_and_no_further() {
        assert_eq!(settle(0, 3_000), WINDOW_NS_START);
        assert_eq!(settle(0, 15_000), 40_000);
        assert_eq!(settle(0, WINDOW_NS_MAX), WINDOW_NS_MAX);
        assert_eq!(settle(80_000, 1_000), 80_000, "a busy queue does not lose what it learned");
    }

    #[test]
    fn the_window_of_rare_requests_shrinks_to_nothing() {
        assert_eq!(window_after(WINDOW_NS_MAX, WINDOW_NS_MAX + 1), WINDOW_NS_MAX / 2);
        assert_eq!(settle(WINDOW_NS_MAX, 1_000_000), 0);
        assert_eq!(window_after(0, u64::MAX), 0);
        assert_eq!(window_after(0, 20_000), WINDOW_NS_START, "and comes back with the load");
    }

    #[test]
    fn a_poll_thread_never_sleeps_and_a_notify_thread_at_once() {
        let now = Ticks(1_000_000);
        assert_eq!(rest(now, [(awake_until(Mode::Poll, Ticks(0), 0), None)]), Rest::Poll);
        assert_eq!(rest(now, [(awake_until(Mode::Notify, now, 50_000), None)]), Rest::Sleep(None));
    }

    #[test]
    fn a_hybrid_thread_sleeps_when_the_window_is_over() {
        let last = Ticks(1_000_000);
        let until = awake_until(Mode::Hybrid, last, 20_000);
        assert_eq!(rest(last.plus_ns(19_999), [(until, None)]), Rest::Poll);
        assert_eq!(rest(last.plus_ns(20_000), [(until, None)]), Rest::Sleep(None));
    }

    #[test]
    fn one_poller_that_wants_to_poll_keeps_the_thread_awake() {
        let now = Ticks(1_000_000);
        let (asleep, awake) = ((Ticks(0), None), (now.plus_ns(1), None));
        assert_eq!(rest(now, [asleep, awake, asleep]), Rest::Poll);
        assert_eq!(rest(now, [asleep, asleep]), Rest::Sleep(None));
        assert_eq!(rest(now, []), Rest::Sleep(None), "nothing to poll");
    }

    #[test]
    fn a_thread_sleeps_until_the_first_deadline_unless_it_is_very_near() {
        let now = Ticks(1_000_000);
        let (near, far) = (now.plus_ns(SLEEP_NS_MIN), now.plus_ns(5_000_000));
        let idle = |wake_at| (Ticks(0), wake_at);
        assert_eq!(rest(now, [idle(Some(far)), idle(None), idle(Some(near))]), Rest::Sleep(Some(near)));
        assert_eq!(rest(now.plus_ns(1), [idle(Some(far)), idle(Some(near))]), Rest::Poll);
        assert_eq!(rest(now, [idle(Some(Ticks(7)))]), Rest::Poll, "a deadline that passed is due now");
    }
}

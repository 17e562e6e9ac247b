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
/// Windows in vain in a row that are put down to a load that changes. One more, and polling is not what catches it.
const VAIN_TOLERATED: u8 = 1;
/// Windows in vain remembered; each beyond those tolerated doubles the notifications until the next try, up to 1024. A
/// try costs a window of twice the gap, or [`WINDOW_NS_START`], so that tries in vain take less than 1 % of the time.
const VAIN_MAX: u8 = 11;
/// An interrupt in a turn that has nothing to do takes a few µs. A thread that finds such a turn took longer than this was
/// off its CPU, where something else ran...
pub const PREEMPTED_NS: u64 = 50_000;
/// ...with so much more for each of its pollers: to find one idle takes well under this, even if nothing of it is in the
/// cache.
pub const EMPTY_POLL_NS_MAX: u64 = 1_000;
/// With a deadline nearer than this a thread polls on: a sleep would end later than that.
pub const SLEEP_NS_MIN: u64 = 10_000;

/// The time polled in vain before sleeping, and what polling has caught so far.
///
/// The length follows the gaps between work, but gaps alone mislead: where the driver shares the thread's CPU, it
/// cannot run while the thread polls, so work always comes just after the window, however long that is. So a window is
/// judged by what it caught. One in vain is made longer, once; if that is in vain as well, the window closes and
/// notifications serve alone, for more of them each time, until one is tried again. Each catch halves what was held
/// against polling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    ns: u64,
    /// Windows in vain, less what was caught since.
    vain: u8,
    /// Notifications until polling is tried again.
    closed_for: u16,
}

impl Default for Window {
    /// The window of a new poller.
    fn default() -> Self {
        Self { ns: WINDOW_NS_START, vain: 0, closed_for: 0 }
    }
}

impl Window {
    /// Its length in ns; 0 while it is closed.
    #[must_use]
    #[inline]
    pub fn ns(&self) -> u64 {
        self.ns
    }

    /// Whether work that came `gap_ns` after the work before it was caught by polling.
    #[must_use]
    #[inline]
    pub fn catches(&self, gap_ns: u64) -> bool {
        gap_ns <= self.ns
    }

    /// The window after work came `gap_ns` after the work before it.
    #[must_use]
    pub fn after(self, gap_ns: u64) -> Self {
        if self.catches(gap_ns) {
            let ns = if gap_ns.saturating_mul(2) > self.ns { covering(gap_ns) } else { self.ns };
            Self { ns, vain: self.vain / 2, closed_for: 0 }
        } else if gap_ns - self.ns > WINDOW_NS_MAX {
            // Nobody wanted anything for long. That says nothing about what polling catches when somebody does.
            let halved = self.ns / 2;
            Self { ns: if halved < WINDOW_NS_MIN { 0 } else { halved }, ..self }
        } else if self.ns > 0 {
            self.in_vain(gap_ns)
        } else if self.closed_for > 0 {
            Self { closed_for: self.closed_for - 1, ..self }
        } else {
            Self { ns: covering(gap_ns), ..self }
        }
    }

    /// The window after the thread found that something else had taken its CPU, `waited_ns` after the last work.
    #[must_use]
    pub fn preempted(self, waited_ns: u64) -> Self {
        if self.ns > 0 { self.in_vain(waited_ns) } else { self }
    }

    fn in_vain(self, gap_ns: u64) -> Self {
        let vain = (self.vain + 1).min(VAIN_MAX);
        if vain > VAIN_TOLERATED {
            Self { ns: 0, vain, closed_for: 1 << (vain - 1) }
        } else {
            Self { ns: covering(gap_ns), vain, closed_for: 0 }
        }
    }
}

/// A window that catches gaps of this length with room to spare.
fn covering(gap_ns: u64) -> u64 {
    gap_ns.saturating_mul(2).clamp(WINDOW_NS_START, WINDOW_NS_MAX)
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

/// Whether a turn in which none of so many pollers had work took so long that something else must have had the CPU.
#[must_use]
#[inline]
pub fn was_preempted(took_ns: u64, pollers: usize) -> bool {
    took_ns > PREEMPTED_NS + EMPTY_POLL_NS_MAX * pollers as u64
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
mod simulation;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_read_as_they_print() {
        for mode in [Mode::Notify, Mode::Hybrid, Mode::Poll] {
            assert_eq!(mode.to_string().parse(), Ok(mode));
        }
        let error = "Poll".parse::<Mode>().unwrap_err();
        assert_eq!(error.to_string(), "polling mode `Poll` is none of `notify`, `hybrid`, `poll`");
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
    fn a_turn_of_many_pollers_takes_its_time_and_is_no_preemption() {
        assert!(was_preempted(60_000, 1) && !was_preempted(20_000, 1));
        assert!(!was_preempted(200 * 400, 200), "each takes less than half a microsecond");
        assert!(was_preempted(3_000_000, 200), "another task's turn");
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

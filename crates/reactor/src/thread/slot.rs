//! One poller on its thread, with what the policies know about it.
//!
//! A poller is code of a device, and one device's bug must not take the others down: every call into it is
//! fenced, and a panic turns into a poller that is drained and removed.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::epoll::Watch;
use crate::fair::Standing;
use crate::policy::{self, Mode, Window};
use crate::record::{Departure, PollerState, Record};
use crate::{Budget, Poller, Ticks, Work};

/// A poller that drains is called every turn for this long; most requests in flight complete within it.
const DRAIN_SPIN_NS: u64 = 100_000;
/// After that it is called at this interval while the thread has nothing else to do.
const DRAIN_NAP_NS: u64 = 200_000;
/// A drain that takes longer is logged once: something in flight does not complete.
const DRAIN_WARN_NS: u64 = 5_000_000_000;

/// Fields drop in order: the descriptors leave epoll, the poller goes, then whoever waits for that is told.
pub(super) struct Slot {
    _watches: Vec<Watch>,
    poller: Box<dyn Poller>,
    departure: Departure,
    phase: Phase,
    mode: Mode,
    /// One for each [`Awaits`].
    windows: [Window; 2],
    last_work: Ticks,
    idle: Option<Idle>,
    standing: Standing,
    /// It must be polled until then.
    awake_until: Ticks,
    /// `NEVER` if nothing is due.
    wake_at: Ticks,
}

const NEVER: Ticks = Ticks(u64::MAX);

/// The last poll found nothing.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Idle {
    awaits: Awaits,
    /// Whether the window was judged before the wait was over.
    judged: bool,
}

/// What an idle poller waits for. The two take different times, and a driver on the thread's own CPU is kept from its
/// work by polling while storage is not.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Awaits {
    Driver = 0,
    Completion = 1,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Serving,
    Draining { since: Ticks, warned: bool },
    Drained,
}

impl Slot {
    pub(super) fn new(
        poller: Box<dyn Poller>,
        watches: Vec<Watch>,
        record: Arc<Record>,
        mode: Mode,
        now: Ticks,
    ) -> Self {
        let mut slot = Self {
            _watches: watches,
            poller,
            departure: Departure(record),
            phase: Phase::Serving,
            mode,
            windows: [Window::default(); 2],
            last_work: now,
            idle: None,
            standing: Standing { more: false, moved_at: now },
            awake_until: now,
            wake_at: NEVER,
        };
        slot.show_window(Awaits::Driver);
        slot.disarm(now);
        slot
    }

    #[inline]
    pub(super) fn record(&self) -> &Arc<Record> {
        &self.departure.0
    }

    pub(super) fn standing(&self) -> Standing {
        self.standing
    }

    /// What [`policy::rest`] decides from.
    #[inline]
    pub(super) fn rest(&self) -> (Ticks, Option<Ticks>) {
        (self.awake_until, (self.wake_at != NEVER).then_some(self.wake_at))
    }

    /// Whether it drains or has drained.
    pub(super) fn is_leaving(&self) -> bool {
        self.phase != Phase::Serving
    }

    pub(super) fn is_drained(&self) -> bool {
        self.phase == Phase::Drained
    }

    pub(super) fn set_mode(&mut self, mode: Mode) {
        self.mode = mode;
        if let Some(idle) = self.idle
            && self.phase == Phase::Serving
        {
            self.stay_awake(idle.awaits);
        }
    }

    /// Something else took the CPU while the thread polled. Whatever that is wants more of it.
    #[cold]
    pub(super) fn give_way(&mut self, now: Ticks) {
        if self.mode != Mode::Hybrid || self.phase != Phase::Serving {
            return;
        }
        if let Some(idle @ Idle { awaits, judged: false }) = self.idle
            && self.awake_until > self.last_work
        {
            let window = &mut self.windows[awaits as usize];
            *window = window.preempted(now.since_ns(self.last_work));
            self.idle = Some(Idle { judged: true, ..idle });
            self.record().counters.vain_windows.add(1);
            self.show_window(awaits);
        }
        self.awake_until = now;
    }

    /// One turn of it. True if there was anything to do, or is.
    #[inline]
    pub(super) fn poll(&mut self, now: Ticks, budget: Budget) -> bool {
        if self.phase != Phase::Serving {
            return self.drain(now);
        }
        // The report is read inside the fence: carried out of it, it would be copied in words that straddle the
        // poller's stores, and wait for them.
        let turn = catch_unwind(AssertUnwindSafe(|| {
            let work = self.poller.poll(now, budget);
            self.account(now, work)
        }));
        turn.unwrap_or_else(|panic| {
            self.fail("poll", &*panic, now);
            true
        })
    }

    #[inline]
    fn account(&mut self, now: Ticks, work: Work) -> bool {
        self.wake_at = work.wake_at.unwrap_or(NEVER);
        if work.done == 0 && !work.more {
            if self.idle.is_none() {
                self.begin_wait();
            }
            self.standing.more = false;
            self.record().counters.empty_polls.add(1);
            return false;
        }
        self.worked(now, work.done, work.more);
        true
    }

    fn begin_wait(&mut self) {
        let awaits = if self.poller.awaits_completion() { Awaits::Completion } else { Awaits::Driver };
        self.idle = Some(Idle { awaits, judged: false });
        self.stay_awake(awaits);
    }

    fn stay_awake(&mut self, awaits: Awaits) {
        self.awake_until = policy::awake_until(self.mode, self.last_work, self.windows[awaits as usize].ns());
    }

    #[inline]
    fn worked(&mut self, now: Ticks, done: u32, more: bool) {
        if done > 0 {
            if let Some(Idle { awaits, judged: false }) = self.idle {
                self.judge_window(awaits, now.since_ns(self.last_work));
            }
            self.last_work = now;
        }
        if done > 0 || !self.standing.more {
            self.standing.moved_at = now;
        }
        self.standing.more = more;
        self.idle = None;
        let counters = &self.record().counters;
        counters.busy_polls.add(u64::from(done > 0));
        counters.full_polls.add(u64::from(more));
        counters.done.add(u64::from(done));
    }

    #[inline]
    fn judge_window(&mut self, awaits: Awaits, gap_ns: u64) {
        if self.mode != Mode::Hybrid {
            return;
        }
        let window = self.windows[awaits as usize];
        let (caught, polled) = (window.catches(gap_ns), window.ns() > 0);
        let counters = &self.record().counters;
        counters.catches.add(u64::from(caught));
        counters.vain_windows.add(u64::from(polled && !caught));
        let after = window.after(gap_ns);
        if after != window {
            self.windows[awaits as usize] = after;
            self.show_window(awaits);
        }
    }

    fn show_window(&self, awaits: Awaits) {
        if awaits == Awaits::Driver {
            self.record().counters.window_ns.set(self.windows[awaits as usize].ns());
        }
    }

    /// Switches its notifications on; true if work slipped in before.
    pub(super) fn arm(&mut self, now: Ticks) -> bool {
        if self.phase != Phase::Serving {
            return false;
        }
        match catch_unwind(AssertUnwindSafe(|| self.poller.arm())) {
            Ok(slipped) => {
                let counters = &self.record().counters;
                counters.arms.add(1);
                counters.slips.add(u64::from(slipped));
                slipped
            }
            Err(panic) => {
                self.fail("arm", &*panic, now);
                true
            }
        }
    }

    pub(super) fn disarm(&mut self, now: Ticks) {
        if self.phase != Phase::Serving {
            return;
        }
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.poller.disarm())) {
            self.fail("disarm", &*panic, now);
        }
    }

    /// Lets it finish what is in flight; it is polled no more.
    pub(super) fn begin_drain(&mut self, now: Ticks) {
        if self.phase == Phase::Serving {
            self.phase = Phase::Draining { since: now, warned: false };
            self.standing.more = false;
            self.awake_until = now.plus_ns(DRAIN_SPIN_NS);
            self.record().advance(PollerState::Draining);
        }
    }

    #[cold]
    #[inline(never)]
    fn drain(&mut self, now: Ticks) -> bool {
        let Phase::Draining { since, warned } = self.phase else { return false };
        let failed = self.record().state() == PollerState::Failed;
        let poller = &mut self.poller;
        match catch_unwind(AssertUnwindSafe(|| if failed { poller.abandon() } else { poller.drain(now) })) {
            Ok(false) => {
                self.wake_at = now.plus_ns(DRAIN_NAP_NS);
                if !warned && now.since_ns(since) > DRAIN_WARN_NS {
                    self.phase = Phase::Draining { since, warned: true };
                    tracing::warn!(
                        poller = self.record().label,
                        "requests in flight do not complete; still waiting"
                    );
                }
                return false;
            }
            Ok(true) => {}
            Err(panic) if !failed => {
                self.fail("drain", &*panic, now);
                return true;
            }
            Err(panic) => {
                let (poller, cause) = (&self.record().label, message(&*panic));
                tracing::error!(poller, cause, "a poller panicked in `abandon` and is dropped as it is");
            }
        }
        self.phase = Phase::Drained;
        true
    }

    #[cold]
    #[inline(never)]
    fn fail(&mut self, call: &str, panic: &(dyn Any + Send), now: Ticks) {
        let (poller, cause) = (&self.record().label, message(panic));
        tracing::error!(poller, call, cause, "a poller panicked and is removed; the others go on");
        self.begin_drain(now);
        self.record().advance(PollerState::Failed);
    }

    /// Drops the poller, on its thread.
    pub(super) fn retire(self) {
        let record = self.record().clone();
        if let Err(panic) = catch_unwind(AssertUnwindSafe(move || drop(self))) {
            let cause = message(&*panic);
            tracing::error!(poller = record.label, cause, "a poller panicked while it was dropped");
        }
    }
}

/// What a panic said.
pub(super) fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("(no message)")
}

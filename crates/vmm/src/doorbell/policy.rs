//! When mapping a doorbell is worth its price. Pure functions of what was counted and of the time.
//!
//! A driver that honours the suppression of kicks makes none while it is polled, so that mapping gains it nothing, and a
//! thread that sleeps after every burst unmaps what it has just mapped. Two rules keep the loss small. In
//! [`DoorbellMode::Adaptive`] a driver must have made enough exits, since the thread last woke, to have paid for a change.
//! And in every mode changes are paid from a [`Budget`], a small share of the time that passes: however often a thread
//! sleeps, and whatever the guest does, its queues get the rest.

use reactor::Ticks;

use super::DoorbellMode;

/// What a write that traps is taken to cost, and a page fault of the guest's, in ns. An exit that the kernel handles
/// takes 1 to 2 µs on bare metal and 20 to 50 µs where the host is itself a guest; between the two, closer to the lower,
/// because mapping in vain also keeps the I/O thread from its other queues.
pub const EXIT_NS: u64 = 5_000;
/// What mapping and unmapping a page is taken to take before it was done once, in ns: the median on a nested host.
pub const CHANGE_NS_START: u64 = 80_000;
/// How many page faults follow from it: one on the page that is mapped, one when its place is empty again.
pub const FAULTS_START: u64 = 2;
/// Changes may take one part in so many of the time: 2.5 %.
pub const SHARE: u64 = 40;
/// The most page faults that are put down to one change: those of 4 GiB of memory in the smallest pages. First touches,
/// which no change leads to, cannot be told from the others; those of a guest that boots are many.
pub const FAULTS_MAX: u64 = 1 << 20;
/// A budget is saved up to the price of so many changes, and no further: what a queue that was idle for long may spend at
/// once.
pub const SAVED_MAX: u64 = 2;

/// What mapping and unmapping costs: means over the last few times.
///
/// Only another change tells what it costs now, and none is made while it is taken to be too dear. So an estimate holds
/// until a change at that price would be within the [`SHARE`], and falls after that, by as much as may be spent: what turns
/// out to be as dear as ever takes no more than the share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    change_ns: u64,
    faults: u64,
    /// When a page was mapped or unmapped last.
    at: Ticks,
    /// What was taken for `change_ns` when the page was mapped.
    tried_ns: u64,
}

impl Default for Cost {
    fn default() -> Self {
        Self { change_ns: CHANGE_NS_START, faults: FAULTS_START, at: Ticks(0), tried_ns: CHANGE_NS_START }
    }
}

impl Cost {
    /// All of it, in ns.
    #[must_use]
    pub fn ns(self) -> u64 {
        self.change_ns.saturating_add(self.faults.saturating_mul(EXIT_NS)).max(EXIT_NS)
    }

    /// What a change is taken to cost at a later time, if there was none until then.
    #[must_use]
    pub fn by(self, now: Ticks) -> Self {
        let earned_ns = (now.since_ns(self.at) / SHARE).saturating_sub(self.ns());
        let change_ns = fallen(self.change_ns, earned_ns, CHANGE_NS_START);
        Self { change_ns, faults: fallen(self.faults, earned_ns / EXIT_NS, FAULTS_START), ..self }
    }

    /// A page is about to be mapped. So many page faults followed the time before, if there was one.
    pub fn maps(&mut self, faults: Option<u64>, now: Ticks) {
        let fallen = self.by(now);
        if let Some(faults) = faults {
            // Rounded up: what does not fault at all is not assumed.
            self.faults = follow(self.faults, fallen.faults, faults.min(FAULTS_MAX) + 3);
        }
        (self.tried_ns, self.at) = (fallen.change_ns, now);
    }

    /// It was unmapped. Both changes together took so long.
    pub fn unmapped(&mut self, took_ns: u64, now: Ticks) {
        self.change_ns = follow(self.change_ns, self.tried_ns, took_ns);
        self.at = now;
    }
}

/// An estimate `by` so much less, but for that no less than `least`.
fn fallen(estimate: u64, by: u64, least: u64) -> u64 {
    estimate.saturating_sub(by).max(least.min(estimate))
}

/// The estimate after a sample. One that it did not reach goes on from what it has `fallen` to: it was wrong, or is no
/// longer right.
fn follow(estimate: u64, fallen: u64, sample: u64) -> u64 {
    if sample < estimate { mean(fallen, sample).max(sample) } else { mean(estimate, sample) }
}

/// Mean over the last few.
fn mean(before: u64, now: u64) -> u64 {
    before.saturating_mul(3).saturating_add(now) / 4
}

/// Whether to map a page whose driver has made `kicks` exits since the I/O thread woke.
#[must_use]
pub fn worth_mapping(mode: DoorbellMode, kicks: u64, cost: Cost) -> bool {
    match mode {
        DoorbellMode::Trap => false,
        DoorbellMode::Adaptive => kicks.saturating_mul(EXIT_NS) >= cost.ns(),
        DoorbellMode::Map => true,
    }
}

/// Time that may be spent on changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    saved_ns: u64,
    at: Ticks,
}

impl Budget {
    /// Enough for the first change: where that is the last one too, it is gained on.
    #[must_use]
    pub fn new(now: Ticks) -> Self {
        Self { saved_ns: Cost::default().ns(), at: now }
    }

    /// Pays for a change, if there is enough.
    pub fn pay(&mut self, now: Ticks, cost: Cost) -> bool {
        let price = cost.ns();
        let earned = now.since_ns(self.at) / SHARE;
        // Less than a unit is not lost: time goes on from where it was counted.
        self.at = self.at.plus_ns(earned * SHARE);
        self.saved_ns = self.saved_ns.saturating_add(earned).min(price.saturating_mul(SAVED_MAX));
        let enough = self.saved_ns >= price;
        if enough {
            self.saved_ns -= price;
        }
        enough
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost_of(change_ns: u64, faults: u64) -> Cost {
        Cost { change_ns, faults, ..Cost::default() }
    }

    #[test]
    fn a_page_is_mapped_once_its_driver_has_paid_for_it() {
        let cost = cost_of(8 * EXIT_NS, 2);
        assert!(!worth_mapping(DoorbellMode::Adaptive, 9, cost));
        assert!(worth_mapping(DoorbellMode::Adaptive, 10, cost));
        assert!(!worth_mapping(DoorbellMode::Adaptive, 0, cost_of(0, 0)), "never for nothing");
        assert!(!worth_mapping(DoorbellMode::Trap, u64::MAX, cost_of(0, 0)));
        let dear = cost_of(u64::MAX, u64::MAX);
        assert!(worth_mapping(DoorbellMode::Map, 0, dear));
        let _ = worth_mapping(DoorbellMode::Adaptive, u64::MAX, dear);
    }

    #[test]
    fn what_a_change_costs_follows_what_it_took_and_what_faulted() {
        let settled = |took_ns, faults| {
            let mut cost = Cost::default();
            (0..64).for_each(|_| {
                cost.maps(Some(faults), Ticks(0));
                cost.unmapped(took_ns, Ticks(0));
            });
            cost
        };
        let cost = settled(1_000_000, 100);
        assert!(
            (999_000..=1_000_000).contains(&cost.change_ns) && (100..=103).contains(&cost.faults),
            "{cost:?}"
        );
        assert_eq!(settled(0, 0).change_ns, 0);
        let mut cost = Cost::default();
        cost.unmapped(10_000_000, Ticks(0));
        assert!(cost.ns() > 2_000_000, "a slow one counts at once");
        cost.unmapped(u64::MAX, Ticks(u64::MAX));
        cost.maps(Some(u64::MAX), Ticks(0));
        let _ = cost.by(Ticks(u64::MAX)).ns();
    }

    /// What a guest that boots touches for the first time is taken for what the change before led to.
    #[test]
    fn what_was_taken_to_be_dear_is_tried_again() {
        for (faults, took_ns) in [(100_000, 80_000), (u64::MAX, 80_000), (2, 1_000_000_000)] {
            let mut cost = Cost::default();
            cost.maps(Some(faults), Ticks(0));
            cost.unmapped(took_ns, Ticks(0));
            let dear_ns = cost.ns();
            assert!(dear_ns > 100_000_000, "{cost:?}");
            assert_eq!(cost.by(Ticks(dear_ns * SHARE)), cost, "it holds until it could be paid");
            let later = Ticks(2 * dear_ns * SHARE);
            assert!(worth_mapping(DoorbellMode::Adaptive, 30, cost.by(later)), "{:?}", cost.by(later));
            // It is as it is taken to be at first.
            cost.maps(Some(0), later);
            cost.unmapped(CHANGE_NS_START, later.plus_ns(1));
            assert!(cost.ns() <= Cost::default().ns() + 2 * EXIT_NS, "{cost:?}");
        }
    }

    /// How much of `time_ns` is spent where a change costs `real`, by a driver that is worth one below `price_ns`.
    fn spent_by_trials_ns(real: Cost, price_ns: u64, time_ns: u64) -> u64 {
        const EVERY_NS: u64 = 1_000_000;
        let (mut cost, mut budget, mut spent_ns) = (real, Budget::new(Ticks(0)), 0);
        for now in (0..time_ns).step_by(EVERY_NS as usize).map(Ticks) {
            let taken = cost.by(now);
            if taken.ns() <= price_ns && budget.pay(now, taken) {
                spent_ns += real.ns();
                cost.maps(Some(real.faults), now);
                cost.unmapped(real.change_ns, now);
            }
        }
        spent_ns
    }

    #[test]
    fn what_stays_dear_is_tried_no_more_often_than_its_share_allows() {
        for real in [cost_of(80_000, 1_000), cost_of(80_000, 25_000), cost_of(300_000_000, 2)] {
            for price_ns in [200_000, real.ns() / 2, u64::MAX] {
                let time_ns = 200 * SHARE * real.ns();
                let spent = spent_by_trials_ns(real, price_ns, time_ns);
                assert!(spent > 0, "{real:?}, worth {price_ns} ns: it is tried");
                let allowed = time_ns / SHARE + (SAVED_MAX + 1) * real.ns();
                assert!(spent <= allowed, "{real:?}, worth {price_ns} ns: {spent} of {allowed} ns");
            }
        }
    }

    /// How much of a second is spent by a thread that would map every `every_ns`.
    fn spent_ns(every_ns: u64, cost: Cost) -> u64 {
        let mut budget = Budget::new(Ticks(0));
        let asked = (0..1_000_000_000).step_by(every_ns as usize);
        asked.filter(|&now| budget.pay(Ticks(now), cost)).count() as u64 * cost.ns()
    }

    #[test]
    fn changes_take_no_more_than_their_share_however_often_a_thread_sleeps() {
        for (change_ns, faults) in [(10_000, 2), (80_000, 2), (100_000, 1_000), (4_000_000, 50)] {
            let cost = cost_of(change_ns, faults);
            for every_ns in [1_000, 50_000, 3_333_333] {
                let spent = spent_ns(every_ns, cost);
                let allowed = 1_000_000_000 / SHARE + Cost::default().ns() + cost.ns();
                assert!(spent <= allowed, "{cost:?} every {every_ns} ns: {spent} ns");
            }
        }
        assert!(spent_ns(1_000, Cost::default()) > 20_000_000, "and are not given up");
    }

    #[test]
    fn idle_time_is_not_saved_for_a_storm_of_changes() {
        let (mut budget, cost, later) = (Budget::new(Ticks(0)), Cost::default(), Ticks(u64::MAX / 2));
        let paid = (0..100).filter(|_| budget.pay(later, cost)).count() as u64;
        assert_eq!(paid, SAVED_MAX);
        assert!(!Budget::new(Ticks(5)).pay(Ticks(0), cost_of(u64::MAX, 0)), "time goes forward");
    }
}

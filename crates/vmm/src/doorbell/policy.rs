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
/// A budget is saved up to the price of so many changes, and no further: what a queue that was idle for long may spend at
/// once.
pub const SAVED_MAX: u64 = 2;

/// What mapping and unmapping costs: means over the last few times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    change_ns: u64,
    faults: u64,
}

impl Default for Cost {
    fn default() -> Self {
        Self { change_ns: CHANGE_NS_START, faults: FAULTS_START }
    }
}

impl Cost {
    /// All of it, in ns.
    #[must_use]
    pub fn ns(self) -> u64 {
        self.change_ns.saturating_add(self.faults.saturating_mul(EXIT_NS)).max(EXIT_NS)
    }

    /// Both changes together took so long.
    pub fn changed(&mut self, took_ns: u64) {
        self.change_ns = mean(self.change_ns, took_ns);
    }

    /// So many page faults followed.
    pub fn faulted(&mut self, faults: u64) {
        // Rounded up: what does not fault at all is not assumed.
        self.faults = mean(self.faults, faults.saturating_add(3));
    }
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

    #[test]
    fn a_page_is_mapped_once_its_driver_has_paid_for_it() {
        let cost = Cost { change_ns: 8 * EXIT_NS, faults: 2 };
        assert!(!worth_mapping(DoorbellMode::Adaptive, 9, cost));
        assert!(worth_mapping(DoorbellMode::Adaptive, 10, cost));
        assert!(
            !worth_mapping(DoorbellMode::Adaptive, 0, Cost { change_ns: 0, faults: 0 }),
            "never for nothing"
        );
        assert!(!worth_mapping(DoorbellMode::Trap, u64::MAX, Cost { change_ns: 0, faults: 0 }));
        let dear = Cost { change_ns: u64::MAX, faults: u64::MAX };
        assert!(worth_mapping(DoorbellMode::Map, 0, dear));
        let _ = worth_mapping(DoorbellMode::Adaptive, u64::MAX, dear);
    }

    #[test]
    fn what_a_change_costs_follows_what_it_took_and_what_faulted() {
        let settled = |took_ns, faults| {
            let mut cost = Cost::default();
            (0..64).for_each(|_| {
                cost.changed(took_ns);
                cost.faulted(faults);
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
        cost.changed(10_000_000);
        assert!(cost.ns() > 2_000_000, "a slow one counts at once");
        cost.changed(u64::MAX);
        cost.faulted(u64::MAX);
        let _ = cost.ns();
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
            let cost = Cost { change_ns, faults };
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
        assert!(
            !Budget::new(Ticks(5)).pay(Ticks(0), Cost { change_ns: u64::MAX, faults: 0 }),
            "time goes forward"
        );
    }
}

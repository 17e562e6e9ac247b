//! Which I/O threads there are, on which CPUs, and which queue goes to which.
//!
//! A polling thread is only as good as the CPU under it: two on one CPU take turns of milliseconds, and one that
//! its control group throttles stands still for most of a period. So each thread gets a CPU of its own, as far as
//! they last, and polling that the machine cannot give is turned into the hybrid mode, with a warning, before it
//! hurts. Queues come and go while the threads run; the same choice serves a plan made in advance and a device
//! attached later.
//!
//! Everything here is a function of its arguments.

use std::fmt;
use std::num::NonZeroUsize;

use crate::cpulist::{CPUS_MAX, CpuList, format_cpus};
use crate::cpus::{Cpu, Machine};
use crate::policy::Mode;

/// What the operator asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// The CPUs to use, in this order; `None` for all that are allowed.
    pub cpus: Option<CpuList>,
    /// Those of all that are allowed to begin with: the ones that take the interrupts of disks, say.
    pub first: Vec<u32>,
    /// The most threads to run; `None` for one per CPU, as far as a CPU quota pays for them.
    pub threads: Option<NonZeroUsize>,
}

/// The threads a pool may have. They start as queues need them, first seats first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The CPU of each thread. Not empty.
    pub seats: Vec<u32>,
    /// How many of them may poll without ever sleeping.
    pub pollers_max: usize,
    /// What the operator should know.
    pub warnings: Vec<Warning>,
}

/// A wish that was granted in part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Warning {
    /// There are more threads than CPUs, so threads share CPUs and none polls for good.
    SharedCpus {
        /// Threads asked for.
        threads: usize,
        /// CPUs there are for them.
        cpus: usize,
    },
    /// The control group's CPU quota pays for fewer CPUs than there are threads.
    Quota {
        /// Threads.
        threads: usize,
        /// Whole CPUs' worth of time granted.
        whole_cpus: usize,
    },
    /// A queue that was to be polled is served in hybrid mode.
    Degraded {
        /// Its group.
        group: String,
        /// How many threads may poll.
        pollers_max: usize,
    },
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SharedCpus { threads, cpus } => {
                write!(
                    f,
                    "{threads} I/O threads share {cpus} CPUs, so none polls for good: hybrid mode instead"
                )
            }
            Self::Quota { threads, whole_cpus } => write!(
                f,
                "the control group's CPU quota pays for {whole_cpus} whole CPUs and there are {threads} I/O threads: \
                 at most {whole_cpus} may poll for good, the others run in hybrid mode"
            ),
            Self::Degraded { group, pollers_max } => write!(
                f,
                "`{group}` runs in hybrid mode instead of polling: at most {pollers_max} I/O threads may poll for good"
            ),
        }
    }
}

/// A wish that cannot be granted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// CPUs outside the process's affinity mask.
    #[error("this process may not run on CPU {outside} of the wanted {wanted}; allowed are {allowed}")]
    NotAllowed {
        /// The wanted CPUs that are not allowed.
        outside: String,
        /// All wanted CPUs.
        wanted: String,
        /// The allowed CPUs.
        allowed: String,
    },
    /// More threads than the limit.
    #[error("{threads} I/O threads wanted; at most {CPUS_MAX} are possible")]
    TooManyThreads {
        /// Threads asked for.
        threads: usize,
    },
    /// The affinity mask is empty or unreadable.
    #[error("this process is not allowed to run on any CPU below {CPUS_MAX}")]
    NoCpu,
}

/// Lays out the threads.
///
/// # Errors
/// [`PlacementError`]: a CPU outside the affinity mask, too many threads.
pub fn layout(machine: &Machine, wish: &Wish) -> Result<Layout, PlacementError> {
    let cpus = match &wish.cpus {
        Some(list) => explicit(machine, list)?,
        None => preferred(&machine.allowed, &wish.first),
    };
    if cpus.is_empty() {
        return Err(PlacementError::NoCpu);
    }
    let paid = machine.quota.map(|quota| usize::try_from(quota.whole_cpus()).unwrap_or(usize::MAX));
    let threads = match wish.threads {
        Some(threads) => threads.get(),
        None if wish.cpus.is_some() => cpus.len(),
        None => cpus.len().min(paid.unwrap_or(usize::MAX).max(1)),
    };
    if threads > CPUS_MAX as usize {
        return Err(PlacementError::TooManyThreads { threads });
    }
    let mut warnings = Vec::new();
    let mut pollers_max = threads;
    if threads > cpus.len() {
        warnings.push(Warning::SharedCpus { threads, cpus: cpus.len() });
        pollers_max = 0;
    }
    if let Some(whole_cpus) = paid.filter(|&paid| paid < threads) {
        warnings.push(Warning::Quota { threads, whole_cpus });
        pollers_max = pollers_max.min(whole_cpus);
    }
    let seats = cpus.iter().copied().cycle().take(threads).collect();
    Ok(Layout { seats, pollers_max, warnings })
}

fn explicit(machine: &Machine, list: &CpuList) -> Result<Vec<u32>, PlacementError> {
    let wanted = list.as_slice();
    let allowed: Vec<u32> = machine.allowed.iter().map(|cpu| cpu.id).collect();
    let outside: Vec<u32> = wanted.iter().copied().filter(|cpu| !allowed.contains(cpu)).collect();
    if outside.is_empty() {
        return Ok(wanted.to_vec());
    }
    Err(PlacementError::NotAllowed {
        outside: format_cpus(&outside),
        wanted: list.to_string(),
        allowed: format_cpus(&allowed),
    })
}

/// The order in which CPUs are used: those wished for first, one of each core before its siblings, and CPU 0 last, where
/// the kernel puts its own chores and interrupts by default.
fn preferred(allowed: &[Cpu], first: &[u32]) -> Vec<u32> {
    let sibling =
        |cpu: &Cpu| allowed.iter().filter(|other| other.core == cpu.core && other.id < cpu.id).count();
    let mut cpus: Vec<_> =
        allowed.iter().map(|cpu| (!first.contains(&cpu.id), cpu.id == 0, sibling(cpu), cpu.id)).collect();
    cpus.sort_unstable();
    cpus.into_iter().map(|(.., id)| id).collect()
}

/// What a seat has to do so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Queues on it that are polled for good.
    pub polled: usize,
    /// All queues on it.
    pub queues: usize,
}

/// Where a queue goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Index of the seat.
    pub seat: usize,
    /// The mode it gets: the one it asked for, or hybrid where polling is not to be had.
    pub mode: Mode,
}

/// Chooses a seat for one more queue; `loads` are those of `layout.seats`.
///
/// The seat with the fewest polled queues, then the fewest queues, then the first. A CPU in `taken`, where the driver runs,
/// counts as one with a queue more: driver and I/O thread would take turns there. A queue that is to be polled may
/// also join a seat that polls already when no further one may: it shares a CPU that is spent anyway.
#[must_use]
pub fn choose(layout: &Layout, loads: &[Load], mode: Mode, taken: &[u32]) -> Choice {
    let least = |eligible: &dyn Fn(&Load) -> bool| {
        let loads = loads.iter().take(layout.seats.len()).enumerate().filter(|(_, load)| eligible(load));
        let queues =
            |seat: usize, load: &Load| load.queues + usize::from(taken.contains(&layout.seats[seat]));
        loads.min_by_key(|&(seat, load)| (load.polled, queues(seat, load), seat)).map(|(seat, _)| seat)
    };
    let polling = loads.iter().filter(|load| load.polled > 0).count();
    if mode == Mode::Poll && polling >= layout.pollers_max {
        return match least(&|load| load.polled > 0) {
            Some(seat) if layout.pollers_max > 0 => Choice { seat, mode },
            _ => Choice { seat: least(&|_| true).unwrap_or(0), mode: Mode::Hybrid },
        };
    }
    Choice { seat: least(&|_| true).unwrap_or(0), mode }
}

/// Whether a queue may start polling on `seat`, where it already is.
#[must_use]
pub fn grant(layout: &Layout, loads: &[Load], seat: usize, mode: Mode) -> Mode {
    let others = loads.iter().enumerate().filter(|&(other, load)| other != seat && load.polled > 0).count();
    if mode == Mode::Poll && others >= layout.pollers_max { Mode::Hybrid } else { mode }
}

/// A queue to be placed. Queues of one group share a thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Queue {
    /// For instance `disk0/3`, or `net0/1` for both directions of a queue pair.
    pub group: String,
    /// How it is to be polled.
    pub mode: Mode,
}

/// Where all of a configuration's queues go, known before anything starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The threads.
    pub layout: Layout,
    /// One choice per queue, in the queues' order.
    pub choices: Vec<Choice>,
    /// The layout's warnings and those about single groups.
    pub warnings: Vec<Warning>,
}

/// Plans for `queues` as a pool that starts empty would place them one after the other.
///
/// # Errors
/// See [`layout`].
pub fn plan(machine: &Machine, wish: &Wish, queues: &[Queue]) -> Result<Plan, PlacementError> {
    let layout = layout(machine, wish)?;
    let mut warnings = layout.warnings.clone();
    let mut loads = vec![Load::default(); layout.seats.len()];
    let mut choices: Vec<Choice> = Vec::with_capacity(queues.len());
    for (index, queue) in queues.iter().enumerate() {
        let placed = queues[..index].iter().position(|earlier| earlier.group == queue.group);
        let choice = match placed.map(|earlier| choices[earlier].seat) {
            Some(seat) => Choice { seat, mode: grant(&layout, &loads, seat, queue.mode) },
            None => choose(&layout, &loads, queue.mode, &[]),
        };
        if choice.mode != queue.mode {
            let warning = Warning::Degraded { group: queue.group.clone(), pollers_max: layout.pollers_max };
            if !warnings.contains(&warning) {
                warnings.push(warning);
            }
        }
        loads[choice.seat].queues += 1;
        loads[choice.seat].polled += usize::from(choice.mode == Mode::Poll);
        choices.push(choice);
    }
    Ok(Plan { layout, choices, warnings })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cpus::Quota;

    fn machine(cpus: &[u32]) -> Machine {
        Machine { allowed: cpus.iter().map(|&id| Cpu { id, core: id }).collect(), quota: None }
    }

    fn with_quota(cpus: &[u32], quota_us: u64) -> Machine {
        Machine { quota: Some(Quota { quota_us, period_us: 100_000 }), ..machine(cpus) }
    }

    fn wish(cpus: &str, threads: usize) -> Wish {
        Wish { cpus: cpus.parse().ok(), threads: NonZeroUsize::new(threads), ..Wish::default() }
    }

    fn queues(count: usize, mode: Mode) -> Vec<Queue> {
        (0..count).map(|index| Queue { group: format!("disk0/{index}"), mode }).collect()
    }

    fn seats(plan: &Plan) -> Vec<usize> {
        plan.choices.iter().map(|choice| choice.seat).collect()
    }

    #[test]
    fn threads_sit_on_the_wanted_cpus_in_the_wanted_order() {
        let machine = machine(&[0, 1, 2, 3, 4]);
        for (cpus, threads, expected) in [
            ("", 0, vec![1, 2, 3, 4, 0]),
            ("", 2, vec![1, 2]),
            ("4,2", 0, vec![4, 2]),
            ("4,2-3", 2, vec![4, 2]),
            ("4,2", 3, vec![4, 2, 4]),
        ] {
            assert_eq!(layout(&machine, &wish(cpus, threads)).unwrap().seats, expected, "{cpus} {threads}");
        }
        for (cpus, first, expected) in
            [("", vec![3, 0, 9], vec![3, 0, 1, 2, 4]), ("4,2", vec![2], vec![4, 2])]
        {
            let wish = Wish { first, ..wish(cpus, 0) };
            assert_eq!(layout(&machine, &wish).unwrap().seats, expected, "named CPUs keep their order");
        }
    }

    #[test]
    fn hyper_thread_siblings_are_used_after_whole_cores() {
        let cpu = |id, core| Cpu { id, core };
        let allowed = vec![cpu(0, 0), cpu(1, 0), cpu(2, 2), cpu(3, 2)];
        let machine = Machine { allowed, quota: None };
        assert_eq!(layout(&machine, &Wish::default()).unwrap().seats, [2, 1, 3, 0]);
    }

    #[test]
    fn a_cpu_outside_the_mask_is_an_error_that_says_what_is_allowed() {
        let error = layout(&machine(&[2, 3, 4, 7]), &wish("1-3,9", 0)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "this process may not run on CPU 1,9 of the wanted 1-3,9; allowed are 2-4,7"
        );
        assert_eq!(layout(&machine(&[]), &Wish::default()), Err(PlacementError::NoCpu));
        let many = layout(&machine(&[0]), &wish("", 5000));
        assert_eq!(many, Err(PlacementError::TooManyThreads { threads: 5000 }));
    }

    #[test]
    fn one_thread_per_queue_while_cpus_last_then_balanced() {
        let plan = plan(&machine(&[1, 2, 3]), &Wish::default(), &queues(7, Mode::Hybrid)).unwrap();
        assert_eq!(seats(&plan), [0, 1, 2, 0, 1, 2, 0]);
        assert!(plan.warnings.is_empty());
    }

    #[test]
    fn the_drivers_cpus_are_avoided_where_others_are_free_and_balanced_with_them_later() {
        let layout = layout(&machine(&[1, 2, 3]), &Wish::default()).unwrap();
        let mut loads = vec![Load::default(); 3];
        let seats: Vec<_> = (0..7)
            .map(|_| {
                let seat = choose(&layout, &loads, Mode::Hybrid, &[1, 2]).seat;
                loads[seat].queues += 1;
                seat
            })
            .collect();
        assert_eq!(seats, [2, 0, 1, 2, 0, 1, 2]);
    }

    #[test]
    fn queues_of_one_group_share_a_thread() {
        let mut queues = queues(2, Mode::Hybrid);
        queues.insert(1, queues[0].clone());
        let plan = plan(&machine(&[1, 2, 3]), &Wish::default(), &queues).unwrap();
        assert_eq!(seats(&plan), [0, 0, 1]);
    }

    #[test]
    fn more_polling_threads_than_cpus_run_hybrid_with_a_warning() {
        let plan = plan(&machine(&[1]), &wish("", 2), &queues(2, Mode::Poll)).unwrap();
        assert_eq!(seats(&plan), [0, 1]);
        assert!(plan.choices.iter().all(|choice| choice.mode == Mode::Hybrid));
        assert_eq!(plan.warnings[0], Warning::SharedCpus { threads: 2, cpus: 1 });
        assert_eq!(plan.warnings.len(), 3, "and one for each queue");
    }

    #[test]
    fn a_quota_limits_threads_and_pollers() {
        let auto = layout(&with_quota(&[1, 2, 3], 250_000), &Wish::default()).unwrap();
        assert_eq!((auto.seats.len(), auto.pollers_max, auto.warnings.len()), (2, 2, 0));
        let explicit = layout(&with_quota(&[1, 2, 3], 250_000), &wish("1-3", 0)).unwrap();
        assert_eq!((explicit.seats.len(), explicit.pollers_max), (3, 2));
        assert_eq!(explicit.warnings, [Warning::Quota { threads: 3, whole_cpus: 2 }]);
        let half = layout(&with_quota(&[1, 2, 3], 50_000), &Wish::default()).unwrap();
        assert_eq!((half.seats.len(), half.pollers_max), (1, 0), "half a CPU cannot poll");
    }

    #[test]
    fn polled_queues_beyond_the_quota_join_threads_that_poll_already() {
        let machine = with_quota(&[1, 2, 3], 200_000);
        let plan = plan(&machine, &wish("1-3", 0), &queues(3, Mode::Poll)).unwrap();
        assert_eq!(seats(&plan), [0, 1, 0]);
        assert!(plan.choices.iter().all(|choice| choice.mode == Mode::Poll));
    }

    #[test]
    fn a_queue_that_does_not_poll_avoids_threads_that_do() {
        let layout = layout(&machine(&[1, 2]), &Wish::default()).unwrap();
        let loads = [Load { polled: 1, queues: 1 }, Load { polled: 0, queues: 5 }];
        assert_eq!(choose(&layout, &loads, Mode::Hybrid, &[]), Choice { seat: 1, mode: Mode::Hybrid });
    }

    #[test]
    fn a_device_attached_later_gets_the_least_loaded_thread() {
        let layout = layout(&machine(&[1, 2, 3]), &Wish::default()).unwrap();
        let loads =
            [Load { polled: 2, queues: 2 }, Load { polled: 1, queues: 3 }, Load { polled: 1, queues: 2 }];
        assert_eq!(choose(&layout, &loads, Mode::Poll, &[]).seat, 2);
    }

    #[test]
    fn a_queue_may_turn_to_polling_only_where_there_is_room() {
        let layout = layout(&with_quota(&[1, 2], 100_000), &wish("1,2", 0)).unwrap();
        let loads = [Load { polled: 1, queues: 2 }, Load { polled: 0, queues: 1 }];
        assert_eq!(grant(&layout, &loads, 0, Mode::Poll), Mode::Poll, "its thread polls anyway");
        assert_eq!(grant(&layout, &loads, 1, Mode::Poll), Mode::Hybrid);
        assert_eq!(grant(&layout, &loads, 1, Mode::Notify), Mode::Notify);
    }

    proptest! {
        #[test]
        fn two_polling_threads_never_share_a_cpu(
            cpus in 1..9_u32, threads in 0..12_usize, count in 0..20_usize, quota in proptest::option::of(0..900_000_u64)
        ) {
            let mut machine = machine(&(0..cpus).collect::<Vec<_>>());
            machine.quota = quota.map(|quota_us| Quota { quota_us, period_us: 100_000 });
            let plan = plan(&machine, &wish("", threads), &queues(count, Mode::Poll)).unwrap();
            let mut polled: Vec<_> = plan.choices.iter().filter(|choice| choice.mode == Mode::Poll).map(|choice| choice.seat).collect();
            polled.sort_unstable();
            polled.dedup();
            let mut on: Vec<_> = polled.iter().map(|&seat| plan.layout.seats[seat]).collect();
            on.sort_unstable();
            on.dedup();
            prop_assert_eq!(on.len(), polled.len(), "one CPU each");
            prop_assert!(polled.len() <= plan.layout.pollers_max);
        }

        #[test]
        fn queues_are_spread_evenly(cpus in 1..9_u32, count in 0..40_usize) {
            let plan = plan(&machine(&(0..cpus).collect::<Vec<_>>()), &Wish::default(), &queues(count, Mode::Poll)).unwrap();
            let on = |seat| plan.choices.iter().filter(|choice| choice.seat == seat).count();
            let counts: Vec<_> = (0..cpus as usize).map(on).collect();
            prop_assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1);
        }
    }
}

//! Simulations of the window: a thread, the driver it serves, and the CPUs they have.
//!
//! A world is a function from the window to the gap that follows, in ns.

use super::*;

const REQUESTS: u64 = 20_000;

/// What became of a number of requests.
#[derive(Debug, Default)]
struct Outcome {
    window: Window,
    caught: u64,
    /// Windows that ended with nothing caught.
    vain: u64,
    /// Time polled in windows in vain, in ns.
    vain_ns: u64,
    /// Time of all gaps, in ns.
    total_ns: u64,
}

impl Outcome {
    fn vain_per_request(&self) -> f64 {
        self.vain as f64 / REQUESTS as f64
    }

    fn caught_per_request(&self) -> f64 {
        self.caught as f64 / REQUESTS as f64
    }

    /// The share of the time that went into windows in vain.
    fn wasted(&self) -> f64 {
        self.vain_ns as f64 / self.total_ns as f64
    }
}

fn simulate(window: Window, mut gap_ns: impl FnMut(u64) -> u64) -> Outcome {
    let mut outcome = Outcome { window, ..Outcome::default() };
    for _ in 0..REQUESTS {
        let window_ns = outcome.window.ns();
        let gap_ns = gap_ns(window_ns);
        outcome.total_ns += gap_ns;
        if outcome.window.catches(gap_ns) {
            outcome.caught += 1;
        } else if window_ns > 0 {
            outcome.vain += 1;
            outcome.vain_ns += window_ns.min(gap_ns);
        }
        outcome.window = outcome.window.after(gap_ns);
    }
    outcome
}

/// The driver has a CPU of its own and answers after `think_ns`; being notified takes both sides longer.
fn apart(think_ns: u64) -> impl Fn(u64) -> u64 {
    const WAKE_UP_NS: u64 = 8_000;
    move |window_ns| if think_ns <= window_ns { think_ns } else { think_ns.max(window_ns) + WAKE_UP_NS }
}

/// The driver spins on the thread's own CPU: it runs when the thread sleeps.
fn together(think_ns: u64) -> impl Fn(u64) -> u64 {
    move |window_ns| window_ns + think_ns
}

/// Pseudo-random numbers below 1, the same in every run.
fn random(seed: u64) -> impl FnMut() -> f64 {
    let mut state = seed;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[test]
fn a_driver_on_the_same_cpu_is_served_by_notifications() {
    for think_ns in [1_000, 3_000, 10_000, 40_000, 99_000] {
        let outcome = simulate(Window::default(), together(think_ns));
        assert!(outcome.vain_per_request() < 0.01, "{think_ns}: {outcome:?}");
        assert!(outcome.wasted() < 0.03, "{think_ns}: {outcome:?}");
        assert_eq!(outcome.caught, 0, "there is nothing to catch");
    }
}

#[test]
fn a_driver_on_another_cpu_is_caught_by_polling() {
    for think_ns in [100, 3_000, 15_000, 40_000, 80_000] {
        let outcome = simulate(Window::default(), apart(think_ns));
        assert!(outcome.caught_per_request() > 0.999, "{think_ns}: {outcome:?}");
    }
}

#[test]
fn a_driver_whose_gaps_vary_is_caught_by_polling_most_of_the_time() {
    for mean_ns in [5_000.0, 20_000.0] {
        let mut random = random(7);
        let outcome = simulate(Window::default(), |window_ns| {
            let think_ns = -mean_ns * (1.0 - random()).ln();
            apart(think_ns as u64)(window_ns)
        });
        assert!(outcome.caught_per_request() > 0.9, "{mean_ns}: {outcome:?}");
    }
}

/// A sleeping driver that is called may take the CPU at once, submit and sleep again: polling catches that. It pays
/// as long as it happens often enough.
#[test]
fn a_driver_that_sometimes_takes_the_cpu_at_once_is_polled_as_far_as_that_pays() {
    let outcome = |preempts: f64| {
        let mut random = random(11);
        simulate(Window::default(), |window_ns| {
            if window_ns > 0 && random() < preempts { 4_000 } else { window_ns + 4_000 }
        })
    };
    assert!(outcome(0.95).caught_per_request() > 0.85, "{:?}", outcome(0.95));
    assert!(outcome(0.25).vain_per_request() < 0.1, "{:?}", outcome(0.25));
}

#[test]
fn rare_requests_are_served_by_notifications_and_polling_comes_back_with_the_load() {
    let rare = simulate(Window::default(), |_| 10_000_000);
    assert_eq!((rare.window.ns(), rare.caught), (0, 0));
    assert!(rare.vain < 10, "{rare:?}");
    let busy = simulate(rare.window, apart(5_000));
    assert!(busy.caught_per_request() > 0.999, "{busy:?}");
}

#[test]
fn pauses_between_bursts_do_not_end_polling() {
    let mut request = 0;
    let bursts = simulate(Window::default(), |window_ns| {
        request += 1;
        if request % 50 == 0 { 10_000_000 } else { apart(5_000)(window_ns) }
    });
    assert!(bursts.caught_per_request() > 0.95, "{bursts:?}");
}

#[test]
fn polling_comes_back_when_the_driver_moves_to_another_cpu() {
    let shared = simulate(Window::default(), together(3_000));
    let moved = simulate(shared.window, apart(3_000));
    assert!(moved.caught_per_request() > 0.9, "{moved:?}");
    let back = simulate(moved.window, together(3_000));
    assert!(back.vain_per_request() < 0.01, "{back:?}");
}

#[test]
fn a_window_is_twice_the_gap_it_caught_and_no_longer_than_allowed() {
    let settled = |think_ns| simulate(Window::default(), apart(think_ns)).window.ns();
    assert_eq!(settled(3_000), WINDOW_NS_START);
    assert_eq!(settled(15_000), 2 * (15_000 + 8_000), "the first gap was one of a notification");
    assert_eq!(settled(WINDOW_NS_MAX - 1_000), WINDOW_NS_MAX);
    let busy = Window { ns: 80_000, ..Window::default() };
    assert_eq!(
        simulate(busy, apart(1_000)).window.ns(),
        80_000,
        "a busy queue does not lose what it learned"
    );
    assert_eq!(Window::default().after(u64::MAX).ns(), WINDOW_NS_START / 2);
}

#[test]
fn a_thread_that_lost_its_cpu_while_it_polled_sleeps_and_after_a_second_time_polls_no_more() {
    let once = Window::default().preempted(60_000);
    assert_eq!(once.ns(), WINDOW_NS_MAX, "it may have been an accident");
    let twice = once.preempted(4_000_000);
    assert_eq!(twice.ns(), 0);
    assert_eq!(twice.preempted(1), twice, "it did not poll");
    assert!(twice.after(3_000).after(3_000).after(3_000).ns() > 0, "polling is tried again");
}

//! Who goes first among the pollers of one thread.
//!
//! Quotas keep one queue from holding the thread for long, but a turn still has an order, and what the pollers
//! share (a backend's ring, another port's receive buffers) may be used up by those that go early. So the lead
//! rotates, and a poller whose backlog has not moved for too long takes it.

use crate::Ticks;

/// How long a backlog may stand still before its poller goes first. Some ten rounds of a thread with several busy
/// pollers: long enough that a backlog which is merely waiting its turn does not count.
pub const STALL_NS: u64 = 1_000_000;

/// What the order depends on, per poller.
#[derive(Clone, Copy, Debug)]
pub struct Standing {
    /// It reported more work than its budget allowed.
    pub more: bool,
    /// When it last got something done, or had nothing to do.
    pub moved_at: Ticks,
}

/// The index of the poller that leads the next round; the others follow in ring order. `lead` led the last one.
///
/// The longest stalled poller leads; if none is stalled, the one after `lead`. 0 if there are no pollers.
#[must_use]
pub fn next_lead(standings: impl ExactSizeIterator<Item = Standing>, lead: usize, now: Ticks) -> usize {
    let pollers = standings.len();
    let stalled = standings
        .enumerate()
        .filter(|(_, standing)| standing.more && now.since_ns(standing.moved_at) >= STALL_NS)
        .min_by_key(|(_, standing)| standing.moved_at);
    match stalled {
        Some((index, _)) => index,
        None if lead + 1 < pollers => lead + 1,
        None => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moving(moved_at: u64) -> Standing {
        Standing { more: true, moved_at: Ticks(moved_at) }
    }

    fn idle() -> Standing {
        Standing { more: false, moved_at: Ticks(0) }
    }

    #[test]
    fn the_lead_rotates_among_moving_pollers() {
        let now = Ticks(STALL_NS);
        let pollers = [moving(1), moving(2), idle()];
        assert_eq!(next_lead(pollers.into_iter(), 0, now), 1);
        assert_eq!(next_lead(pollers.into_iter(), 1, now), 2);
        assert_eq!(next_lead(pollers.into_iter(), 2, now), 0);
        assert_eq!(next_lead(pollers.into_iter(), 9, now), 0, "pollers were removed since");
        assert_eq!(next_lead([].into_iter(), 0, now), 0);
    }

    #[test]
    fn the_longest_stalled_backlog_leads_until_it_moves() {
        let now = Ticks(10 * STALL_NS);
        let pollers = [moving(10 * STALL_NS), moving(9 * STALL_NS), moving(8 * STALL_NS), idle()];
        for lead in 0..4 {
            assert_eq!(next_lead(pollers.into_iter(), lead, now), 2);
        }
    }

    #[test]
    fn a_poller_without_backlog_is_not_stalled_however_idle() {
        let now = Ticks(100 * STALL_NS);
        assert_eq!(next_lead([moving(now.0), idle()].into_iter(), 1, now), 0);
    }
}

//! The contract between an I/O thread and the work it runs.

use std::os::fd::RawFd;

/// A point in time, in nanoseconds of the I/O threads' common monotonic clock.
///
/// Read once per turn by the thread and handed to everything that runs in it, so that policies are functions of
/// their arguments and cost no clock read of their own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticks(pub u64);

impl Ticks {
    /// The time `ns` nanoseconds after this one.
    #[must_use]
    pub fn plus_ns(self, ns: u64) -> Self {
        Self(self.0.saturating_add(ns))
    }

    /// Nanoseconds from `earlier` to this time; 0 if `earlier` is later.
    #[must_use]
    pub fn since_ns(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// The most a poller may do in one turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Requests (or packets) to take from the driver.
    pub requests: u32,
    /// Bytes of payload to move; the request that crosses the line is still finished.
    pub bytes: u64,
}

/// What a poller did in one turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Requests taken plus completions delivered. 0 is an empty poll.
    pub done: u32,
    /// The budget ran out before the work did: call again soon, do not sleep.
    pub more: bool,
    /// Something (a rate limit, a coalescing window) is due at this time even if nothing else happens.
    pub wake_at: Option<Ticks>,
}

impl Work {
    /// Nothing was there to do.
    pub const NONE: Self = Self { done: 0, more: false, wake_at: None };
}

/// A source of work that an I/O thread polls. Built on its thread, used only there, dropped there.
///
/// No method blocks. The thread's life with a poller:
///
/// 1. `wake_fds` once, after it is added; the descriptors stay open for the poller's life.
/// 2. `disarm`, then `poll` again and again.
/// 3. To sleep: `arm` (every poller of the thread), one more `poll` round when one of them says that work
///    slipped in; on waking, `disarm` and poll again.
/// 4. To remove it: `drain` until it returns true, then drop.
///
/// A panic in any of them goes no further: the thread logs it, removes the poller as in step 4, with
/// `abandon` for `drain`, and serves the others. Only one that panics in `abandon` is dropped without.
pub trait Poller {
    /// Does at most `budget` of work and says what was done and whether more is waiting.
    fn poll(&mut self, now: Ticks, budget: Budget) -> Work;

    /// Switches on every notification that announces new work. Returns true if work arrived before the
    /// notifications were on; the thread then polls again instead of sleeping.
    ///
    /// Only work that the next poll would do counts. Requests held back until `wake_at` do not: the thread would
    /// poll and arm in circles.
    fn arm(&mut self) -> bool;

    /// Switches notifications off again, as far as the other side can be told.
    fn disarm(&mut self);

    /// Descriptors that become readable when there is work. They are watched edge-triggered and never read by the
    /// thread: a peer that shares them cannot block it. At most [`WAKE_FDS_MAX`](crate::WAKE_FDS_MAX): eventfds,
    /// pipes, sockets, character devices. Pass those that a peer sent through
    /// [`check_peer_fd`](crate::check_peer_fd) first.
    fn wake_fds(&self) -> Vec<RawFd>;

    // No method has a default: a poller that wraps another one and forgets to pass a call on does not compile.

    /// Whether something was begun that completes without the driver: the thread keeps apart how long that takes and how
    /// long requests take to come. Asked once each time that work ends. False for a poller that does all at once.
    fn awaits_completion(&self) -> bool;

    /// Takes no new requests, goes on completing those in flight, and returns true once none is left.
    fn drain(&mut self, now: Ticks) -> bool;

    /// Takes the place of `drain` after a panic, which may have lost what was in flight: waits for nobody's answer, only
    /// for what still works on the poller's memory, and tells the peer, if it can, that nothing more will come. The
    /// poller's own state may be inconsistent.
    fn abandon(&mut self) -> bool;
}

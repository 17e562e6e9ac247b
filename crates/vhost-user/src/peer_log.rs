//! Log lines that front ends cause, each kind with a limit.

use std::time::{Duration, Instant};

use reactor::LogLimit;

/// Kinds of lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A front end came.
    Came,
    /// One went, in peace or not.
    Went,
    /// One was turned away.
    TurnedAway,
    /// One could not be accepted.
    NotAccepted,
    /// A request was refused.
    Refused,
    /// Something else that a request was about.
    Noted,
}

/// The limits of one device.
#[derive(Debug)]
pub(crate) struct PeerLog([LogLimit; 6]);

impl PeerLog {
    pub(crate) const fn new() -> Self {
        Self([
            LogLimit::of("front ends connected"),
            LogLimit::of("front ends gone or disconnected"),
            LogLimit::of("front ends refused because the device is taken"),
            LogLimit::of("front ends that could not be accepted"),
            LogLimit::of("requests of a front end refused"),
            LogLimit::of("notes on requests of a front end"),
        ])
    }

    /// Whether one more line of this kind may be written.
    pub(crate) fn admits(&self, kind: Kind) -> bool {
        self.0[kind as usize].admits()
    }

    /// Writes how many lines were left out.
    pub(crate) fn settle(&self) {
        self.0.iter().for_each(LogLimit::settle);
    }

    /// When there is something to settle.
    pub(crate) fn settles_at(&self) -> Option<Instant> {
        /// Not a moment too early.
        const MARGIN: Duration = Duration::from_millis(10);
        Some(Instant::now() + self.0.iter().filter_map(LogLimit::settles_in).min()? + MARGIN)
    }
}

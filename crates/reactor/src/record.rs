//! What an I/O thread and the holders of a poller's handle both know about the poller.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::stats::PollerCounters;

/// Where a poller is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum PollerState {
    /// It is polled.
    Serving = 0,
    /// It takes no new requests and completes those in flight.
    Draining = 1,
    /// It panicked; what it had in flight is being completed, or was. The panic was logged.
    Failed = 2,
    /// It was drained and dropped.
    Removed = 3,
}

/// Written by the thread, read by anybody.
#[derive(Debug)]
pub(crate) struct Record {
    pub(crate) label: String,
    pub(crate) counters: PollerCounters,
    state: AtomicU8,
    gone: OnceLock<()>,
}

impl Record {
    pub(crate) fn new(label: String) -> Self {
        Self {
            label,
            counters: PollerCounters::default(),
            state: AtomicU8::new(PollerState::Serving as u8),
            gone: OnceLock::new(),
        }
    }

    pub(crate) fn state(&self) -> PollerState {
        match self.state.load(Ordering::Acquire) {
            0 => PollerState::Serving,
            1 => PollerState::Draining,
            2 => PollerState::Failed,
            _ => PollerState::Removed,
        }
    }

    /// Moves on to `state`. A poller that failed stays failed.
    pub(crate) fn advance(&self, state: PollerState) {
        if self.state() != PollerState::Failed {
            self.state.store(state as u8, Ordering::Release);
        }
    }

    /// Whether the poller was dropped.
    pub(crate) fn is_gone(&self) -> bool {
        self.gone.get().is_some()
    }

    /// Waits until the poller was dropped.
    pub(crate) fn wait_until_gone(&self) {
        self.gone.wait();
    }
}

/// Says that the poller is gone when it is dropped, so that no way of ending a thread leaves somebody waiting.
#[derive(Debug)]
pub(crate) struct Departure(pub(crate) std::sync::Arc<Record>);

impl Drop for Departure {
    fn drop(&mut self) {
        self.0.advance(PollerState::Removed);
        let _ = self.0.gone.set(());
    }
}

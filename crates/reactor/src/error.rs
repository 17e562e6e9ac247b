//! What can go wrong at the edge of the I/O threads.

use crate::epoll::WatchError;
use crate::placement::PlacementError;

/// Why an I/O thread or a poller on it could not be started or stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The machine cannot give what was asked for.
    #[error(transparent)]
    Placement(#[from] PlacementError),
    /// The operating system refused a thread or one of its descriptors.
    #[error("cannot start thread `{thread}`: {source}")]
    Start {
        /// The thread's name.
        thread: String,
        /// What it said.
        source: std::io::Error,
    },
    /// The thread cannot be woken for this poller, so the poller was not added.
    #[error("cannot add `{poller}` to I/O thread `{thread}`: {source}")]
    Watch {
        /// The poller's label.
        poller: String,
        /// The thread's name.
        thread: String,
        /// Which descriptor, and why.
        source: WatchError,
    },
    /// Building the poller, or asking it for its descriptors, panicked. The panic was logged.
    #[error("`{poller}` panicked while it was built on I/O thread `{thread}`")]
    Panicked {
        /// The poller's label.
        poller: String,
        /// The thread's name.
        thread: String,
    },
    /// The thread, or the pool, has stopped or is stopping.
    #[error("I/O thread `{thread}` has stopped")]
    Stopped {
        /// The thread's name.
        thread: String,
    },
    /// The call waits for an I/O thread, so an I/O thread must not make it.
    #[error("`{call}` waits for an I/O thread and was called on one")]
    OnIoThread {
        /// The function.
        call: &'static str,
    },
}

//! Pinned I/O threads and what runs on them.
//!
//! An I/O thread owns a set of [`Poller`]s (a virtqueue with its device, say) and is the only thread that ever
//! touches them: state belongs to one thread, other threads send it messages. The thread calls each poller in
//! turn with a [`Budget`], so that queues which share a thread share it fairly, and decides from what they
//! report whether to go on polling or to arm their notifications and sleep.

#![warn(missing_docs)]

mod poller;

pub use poller::{Budget, Poller, Ticks, Work};

//! Whole sessions: a server with its control thread and I/O threads on one side, an independent implementation of the
//! front end on the other, or one that says what no front end should.

#![allow(clippy::unwrap_used)]

mod blocked;
mod bring_up;
mod channel;
mod choice;
mod descriptors;
mod device;
mod fuse;
mod guest;
mod host;
mod hostile;
mod lease;
mod listener;
mod memory;
mod migration;
mod negotiation;
mod raw;

//! Whole sessions: a server with its control thread and I/O threads on one side, an independent implementation of the
//! front end on the other.

#![allow(dead_code)]
#![allow(clippy::unwrap_used, reason = "this is test code: a failure is the test's")]

mod bring_up;
mod device;
mod guest;
mod host;

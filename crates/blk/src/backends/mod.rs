//! Storage. [`null`] is the template: copying it is all it takes to begin a new backend.

pub mod file;
mod lock;
pub mod memory;
pub mod null;
pub mod qcow2;
#[cfg(feature = "fake")]
pub mod slow;
mod stepwise;

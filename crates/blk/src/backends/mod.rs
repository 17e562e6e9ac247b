//! Storage. [`null`] is the template: copying it is all it takes to begin a new backend.

pub mod file;
pub mod memory;
pub mod null;
mod stepwise;

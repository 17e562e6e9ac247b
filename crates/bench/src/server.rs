//! What is measured: a server that runs on one CPU, and what it uses there.

pub(crate) mod bare;
pub(crate) mod process;
mod spawn;
pub(crate) mod usage;

//! Benchmarks against other servers, `exitless bench blk`, and of virtual machines, `exitless bench vbmq`.
//!
//! Cases and peers are data (`bench/cases`, `bench/peers`). Every server, this project's too, is a process of its own
//! behind a vhost-user socket, started anew for each repetition on a CPU of its own, and driven from another CPU by
//! one load generator that shares no code with any server but the driver end of the rings. What is stored is read back
//! and compared first. Repetitions of all peers are interleaved, medians are shown, and all rows can be kept.
//!
//! How it is done and where it is biased is written down in `docs/benchmarks.md`.

#![warn(missing_docs)]

mod args;
mod backend;
mod case;
mod client;
mod cpus;
mod data;
mod fio;
mod histogram;
mod hop;
mod measure;
mod pattern;
mod peer;
mod progress;
mod report;
mod row;
mod run;
mod server;
mod signals;
mod vbmq;
mod windows;

pub use args::{Args, BlkArgs, VbmqArgs};
pub use run::run;

//! Hostile input, one function per surface: bytes in, nothing out, and no panic, hang or leak whatever the bytes.
//!
//! The functions serve the coverage-guided fuzzer (`fuzz_targets`) and the replay of its corpora by `cargo test`
//! (`tests/replay.rs`).

pub mod blk;
pub mod config;
mod input;
pub mod memory;
pub mod pci;
pub mod qcow2;
mod ranges;
pub mod record;
pub mod ring;
pub mod vhost_user;

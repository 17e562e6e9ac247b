//! Hostile input, one function per surface: bytes in, nothing out, and no panic, hang or leak whatever the bytes.
//!
//! The functions serve the coverage-guided fuzzer (`fuzz_targets`) and the replay of its corpora by `cargo test`
//! (`tests/replay.rs`).

mod input;
pub mod ring;

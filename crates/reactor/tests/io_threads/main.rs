//! Whole pools with real threads, and pollers that do what a device would, or should not.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fake;
mod life;
mod trouble;
mod wake;

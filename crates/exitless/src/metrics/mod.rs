//! Metrics for Prometheus and whatever understands its format: the figures of a machine, or of a service, over HTTP.
//!
//! Counters are in base units and count from the start; rates are the reader's to make.

mod address;
mod figures;
mod http;
mod server;
mod text;

pub use address::Address;
pub(crate) use figures::{of_machine, of_service};
pub(crate) use server::{MetricsSocket, MetricsThread};

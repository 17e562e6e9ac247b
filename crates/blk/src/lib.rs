//! virtio-blk: the device, and the storage behind it.
//!
//! The device ([`Blk`]) knows rings and requests; a [`Backend`] knows storage. Between them goes an [`Op`]: what
//! to do, where, and the [`Token`](virtio::ring::Token) of the chain whose buffers it is about, which comes back in a
//! [`Done`].
//!
//! A request's way, all of it on the I/O thread of its queue: the `worker` takes a burst of chains from the ring,
//! `request` checks each and makes an `Op` of it, the backend's [`Channel`] takes the burst, and what it says is
//! [`Done`] gets its status byte and goes back to the driver, again in a burst.

#![warn(missing_docs)]

mod backend;
pub mod backends;
pub mod config;
mod data;
mod device;
mod follow;
pub mod rate;
mod request;
pub mod spec;
mod stats;
mod worker;

pub use backend::{Backend, BackendError, Channel, ChannelBuilder, Done, Geometry, Op, OpKind, Status};
pub use device::{Blk, Options, OptionsError, ResizeError};
pub use rate::RateLimit;
pub use spec::{Spec, SpecError};
pub use stats::Counters;

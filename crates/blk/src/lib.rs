//! virtio-blk: the device, and the storage behind it.
//!
//! The device ([`device`]) knows rings and requests; a [`Backend`] knows storage. Between them goes an [`Op`]: what
//! to do, where, and the [`Token`](virtio::ring::Token) of the chain whose buffers it is about, which comes back in a
//! [`Done`].

#![warn(missing_docs)]

mod backend;
pub mod backends;

pub use backend::{Backend, BackendError, Channel, Done, Geometry, Op, OpKind, Status};

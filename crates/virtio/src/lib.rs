//! Virtqueues: guest memory, rings in both formats and from both ends, and the contract of a device.
//!
//! The other side of a ring is hostile and runs at the same time. Three rules follow, and the modules are cut
//! along them:
//!
//! * No Rust reference into guest memory exists. [`memory`] is the only room that touches it, through atomic words
//!   and copies with checked bounds; everything above it is safe code.
//! * A value is read from the ring once, checked, and then only the copy is used ([`ring`]).
//! * A broken ring is an error of that ring ([`RingError`]): its queue stops, nothing else does.
//!
//! Without the `std` feature the crate is the part that also runs inside a guest: memory given as ranges, rings,
//! no file descriptors.

#![cfg_attr(not(feature = "std"), no_std)]
#![warn(missing_docs)]

#[cfg(target_endian = "big")]
compile_error!("virtio 1.x rings are little-endian and this crate reads them without conversion");

extern crate alloc;

pub mod features;
pub mod memory;
pub mod ring;

pub use memory::{GuestAddr, Memory, MemoryError, Region, Segment};
pub use ring::{RingConfig, RingError, RingFormat, RingState};

#[cfg(feature = "std")]
mod call;
#[cfg(feature = "std")]
mod device;
#[cfg(feature = "fake")]
pub mod fake;
#[cfg(feature = "std")]
mod inflight;
#[cfg(feature = "std")]
mod kick;
#[cfg(feature = "std")]
mod queue;
#[cfg(feature = "std")]
mod queue_set;
#[cfg(feature = "std")]
mod ring_log;
#[cfg(feature = "std")]
mod stats;
#[cfg(feature = "std")]
mod unkicked;

#[cfg(feature = "std")]
pub use call::{Call, EventFdCall, Trust};
#[cfg(feature = "std")]
pub use device::{
    ConfigError, ConfigListener, Device, NotReady, NotSettled, PollerBuilder, SharedMemory, StateError,
};
#[cfg(feature = "std")]
pub use inflight::{Inflight, InflightError};
#[cfg(feature = "std")]
pub use kick::{Doorbell, Kick};
#[cfg(feature = "std")]
pub use queue::{ErrorHook, Queue, QueueConfig, QueueHandle};
#[cfg(feature = "std")]
pub use queue_set::{QueueSet, StartError};
#[cfg(feature = "std")]
pub use ring_log::UsedLog;
#[cfg(feature = "std")]
pub use stats::{QueueCounters, QueueStats};

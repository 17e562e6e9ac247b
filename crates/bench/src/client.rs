//! The load generator: a virtio driver without a virtual machine around it.
//!
//! It is the same for every server and shares no code with any: [`session`] speaks the vhost-user protocol,
//! [`lane`] owns one queue and its requests, [`load`] keeps a number of them in flight and measures, [`verify`] checks
//! that the data is right.

pub(crate) mod guest;
pub(crate) mod lane;
pub(crate) mod load;
pub(crate) mod session;
pub(crate) mod verify;

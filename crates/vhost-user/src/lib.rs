//! vhost-user: a virtio device on one side, the socket of a virtual machine monitor on the other.
//!
//! The monitor (the *front end*) connects, shares the guest's memory and the rings of its virtqueues as file
//! descriptors, and from then on the I/O threads work on the rings directly; the socket only carries control. This
//! crate is the *back end*: it speaks the protocol of QEMU's `docs/interop/vhost-user.rst` and starts and stops the
//! queues of any [`virtio::Device`] accordingly. It knows no device type.
//!
//! From the socket inwards:
//!
//! * `intake`: a thread for each connection, where descriptors are told apart and the bad ones stay.
//! * `wire`: bytes and descriptors to messages. Non-blocking, bounded, with a deadline.
//! * `request`: a message to a typed [`Request`](request::Request), or the reason why it is none. Pure.
//! * `session`: what a request does. A synchronous state machine without a socket; everything that one front end set
//!   up dies with it.
//! * `server`: the control thread of one device: socket, session, shutdown, configuration changes.
//!
//! The peer is hostile. It can lose its own connection and stop its own queues, nothing more.
//!
//! # What a running queue does not see
//!
//! Nothing about a running queue changes but its call. Every other change (memory, features, dirty log, address) stops
//! the queue, which completes what is in flight, makes the change, and starts it again where it stood. That costs
//! microseconds on events that happen a few times in a guest's life, and leaves no race to reason about.

#![warn(missing_docs)]

mod backend_channel;
mod bell;
mod device_state;
mod inflight;
mod intake;
mod lease;
mod listener;
mod log;
mod memory_table;
mod peer_log;
mod request;
mod server;
mod session;
mod vring;
mod wire;

pub use lease::LeaseError;
pub use listener::{ListenError, Listener};
pub use memory_table::MemoryTableError;
pub use request::{RequestError, RequestErrorKind};
pub use server::{Error, Options, Peer, QueueStatus, Server, ServerHandle, Status};
pub use session::SessionError;
pub use wire::WireError;

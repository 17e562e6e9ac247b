//! Pinned I/O threads and what runs on them.
//!
//! An I/O thread owns a set of [`Poller`]s (a virtqueue with its device, say) and is the only thread that ever
//! touches them: state belongs to one thread, other threads send it messages. The thread calls each poller in
//! turn with a [`Budget`], so that queues which share a thread share it fairly, and decides from what they
//! report whether to go on polling or to arm their notifications and sleep.
//!
//! A [`Pool`] has one thread per CPU it may use. A transport asks it for a [`Seat`] for each queue and has the
//! queue's poller built there; the [`PollerHandle`] it gets back kicks, watches and removes it.
//!
//! What is decided is a function of numbers and lives apart from what does it: [`policy`] (poll or sleep),
//! [`fair`] (who goes first), [`placement`] (which thread, which CPU).
//!
//! A poller does not block. The one kind of system call for which that is not in its hands, writing to a descriptor
//! that somebody hostile shares, goes through [`guarded`].
//!
//! Needs Linux 5.11 or later (`epoll_pwait2`).

#![warn(missing_docs)]

mod apart;
mod bell;
mod book;
mod clock;
mod cpulist;
mod cpus;
mod epoll;
mod error;
pub mod fair;
mod handle;
pub mod interrupts;
mod log_limit;
mod mailbox;
pub mod placement;
pub mod policy;
mod poller;
mod pool;
mod rate;
mod raw_fd;
mod record;
mod spare;
mod stats;
mod thread;
mod timer;
mod tsc;
mod watchdog;

pub use apart::{NotSpawned, spawn_apart};
pub use clock::Clock;
pub use cpulist::{CPUS_MAX, CpuList, CpuListError, format_cpus};
pub use cpus::{Cpu, Machine, Quota, cpus_of_process};
pub use epoll::{WAKE_FDS_MAX, WatchError, check_peer_fd};
pub use error::Error;
pub use handle::{PollerHandle, Seat};
pub use log_limit::LogLimit;
pub use policy::{Mode, ModeError};
pub use poller::{Budget, Poller, Ticks, Work};
pub use pool::{BUDGET_DEFAULT, Options, PollerReport, Pool, ThreadReport};
pub use rate::RateAccount;
pub use record::PollerState;
pub use spare::{helper_cpus, run_as_helper};
pub use stats::{PollerStats, ThreadStats};
pub use watchdog::guarded;

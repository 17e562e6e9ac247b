//! Holding on to a poller that runs on another thread.

use std::fmt;
use std::sync::Arc;

use crate::book::Lease;
use crate::policy::Mode;
use crate::record::{PollerState, Record};
use crate::stats::PollerStats;
use crate::thread::{Build, Message, Thread, must_not_be_io_thread};
use crate::{Error, Poller};

/// A place on an I/O thread, reserved for one poller.
#[must_use = "dropping a seat gives the place back"]
pub struct Seat {
    pub(crate) thread: Arc<Thread>,
    pub(crate) lease: Lease,
}

impl Seat {
    /// The mode the poller will run in: the one asked for, or hybrid where polling is not to be had.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.lease.mode()
    }

    /// The thread's name.
    #[must_use]
    pub fn thread_name(&self) -> &str {
        &self.thread.name
    }

    /// The CPU it is pinned to.
    #[must_use]
    pub fn cpu(&self) -> u32 {
        self.thread.cpu
    }

    /// Has `build` make a poller on the I/O thread, and returns when it is being polled. `label` names it in logs and
    /// statistics.
    ///
    /// # Errors
    /// [`Error::Watch`] if one of its wake descriptors cannot wake the thread (nothing is added),
    /// [`Error::Panicked`] if `build` panics, [`Error::Stopped`] if the pool stops, and [`Error::OnIoThread`] if
    /// called on an I/O thread.
    pub fn add(
        self,
        label: impl Into<String>,
        build: impl FnOnce() -> Box<dyn Poller> + Send + 'static,
    ) -> Result<PollerHandle, Error> {
        must_not_be_io_thread("Seat::add")?;
        let record = Arc::new(Record::new(label.into()));
        let build: Build = Box::new(build);
        self.thread.add(&record, self.lease.mode(), build)?;
        Ok(PollerHandle { thread: self.thread, record, lease: self.lease })
    }
}

impl fmt::Debug for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seat").field("thread", &self.thread.name).field("mode", &self.mode()).finish()
    }
}

/// A poller on its I/O thread. Dropping the handle removes the poller as [`remove`](Self::remove) does.
pub struct PollerHandle {
    thread: Arc<Thread>,
    record: Arc<Record>,
    lease: Lease,
}

impl PollerHandle {
    /// Removes the poller: it takes no new requests, completes those in flight, and is dropped on its thread. Returns
    /// after that, so that the memory it worked on may be unmapped. Waits as long as the requests in flight take.
    ///
    /// Removing a poller that failed, or whose pool has stopped, returns once it is gone, which may be at once.
    ///
    /// # Errors
    /// [`Error::OnIoThread`] if called on an I/O thread. The poller is removed all the same, but **later**.
    pub fn remove(self) -> Result<(), Error> {
        self.thread.tell(Message::Remove(self.record.clone()));
        must_not_be_io_thread("PollerHandle::remove")?;
        self.record.wait_until_gone();
        Ok(())
    }

    /// Kicks it in band: its thread polls it soon even if asleep, and what the caller wrote before is visible to
    /// that poll. Costs one atomic operation while the thread is awake, a system call if it sleeps.
    pub fn wake(&self) {
        self.thread.ring();
    }

    /// Changes its mode. Returns the mode it gets: hybrid instead of polling where no further thread may poll.
    /// Takes effect within a turn.
    pub fn set_mode(&self, mode: Mode) -> Mode {
        let granted = self.lease.change(mode);
        self.thread.tell(Message::SetMode(self.record.clone(), granted));
        granted
    }

    /// The mode it runs in.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.lease.mode()
    }

    /// Where it is in its life. A transport looks here to learn that a device's queue broke.
    #[must_use]
    pub fn state(&self) -> PollerState {
        self.record.state()
    }

    /// Its label.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.record.label
    }

    /// Its thread's name.
    #[must_use]
    pub fn thread_name(&self) -> &str {
        &self.thread.name
    }

    /// The CPU its thread is pinned to.
    #[must_use]
    pub fn cpu(&self) -> u32 {
        self.thread.cpu
    }

    /// What it did so far.
    #[must_use]
    pub fn stats(&self) -> PollerStats {
        self.record.counters.sample()
    }
}

impl Drop for PollerHandle {
    fn drop(&mut self) {
        if self.record.is_gone() {
            return;
        }
        self.thread.tell(Message::Remove(self.record.clone()));
        if must_not_be_io_thread("PollerHandle::drop").is_ok() {
            self.record.wait_until_gone();
        }
    }
}

impl fmt::Debug for PollerHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PollerHandle")
            .field("label", &self.record.label)
            .field("thread", &self.thread.name)
            .field("mode", &self.mode())
            .field("state", &self.state())
            .finish()
    }
}

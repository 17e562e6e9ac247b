//! The hold that running queues have on a file: the lock that keeps all others from using it.
//!
//! The first queue takes the lock and the last gives it back, so that a guest can be handed over between two services that
//! have the same image open. The lock is on a descriptor that every ring registers: if the process is killed, it lasts
//! until the kernel has carried out the last of its requests, and a successor waits for that. An old write cannot
//! overtake the successor's.
//!
//! An image that is locked from opening on keeps QEMU out all that time; the bytes for that are locked on the same
//! descriptor, for the same reason.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use super::{Lock, Opened};
use crate::backend::BackendError;
use crate::backends::lock;

/// How long a process that was killed may take to end: the memory of a large guest takes a while to unmap.
const END_WAIT: Duration = Duration::from_secs(1);

/// The holds there are.
#[derive(Debug, Default)]
pub(super) struct Users {
    count: usize,
    /// One of them left requests behind that it could not wait for.
    abandoned: bool,
}

/// A queue's hold on a file. Given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Hold(Arc<Opened>);

impl Hold {
    /// Takes a hold, and waits for up to `limit` for others to give up theirs.
    pub(crate) fn take(file: &Arc<Opened>, limit: Duration) -> Result<Self, BackendError> {
        let failed =
            |why: &dyn std::fmt::Display| BackendError(format!("locking {}: {why}", file.path.display()));
        // Nobody who must not wait meets somebody who does: there is no hold yet that an I/O thread could drop.
        let mut users = users(file);
        if users.abandoned {
            return Err(failed(
                &"requests of a queue that was stopped are still under way; restart the service",
            ));
        }
        if users.count == 0 && file.options.lock != Lock::Off {
            lock::wait(&file.path, limit, || begin(file)).map_err(|error| match error.kind() {
                io::ErrorKind::WouldBlock => failed(&"another process uses it (lock=off overrides)"),
                _ => failed(&error),
            })?;
        }
        users.count += 1;
        drop(users);
        Ok(Self(file.clone()))
    }

    /// The file.
    pub(crate) fn file(&self) -> &Arc<Opened> {
        &self.0
    }

    /// Notes that requests were left to the kernel: from now on, nobody in this process gets a hold.
    pub(super) fn abandon(&self) {
        users(&self.0).abandoned = true;
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut users = users(&self.0);
        users.count -= 1;
        if users.count == 0 && self.0.options.lock != Lock::Off {
            // Not left to the rings, which let go of their files some time after they are gone.
            let file = &self.0;
            let qemu =
                if file.options.lock == Lock::Late { lock::let_qemu_in(&file.buffered) } else { Ok(()) };
            complain(&file.path, lock::unlock(&file.buffered, lock::USE).and(qemu));
        }
    }
}

/// Locks a file for its first queue.
fn begin(file: &Opened) -> io::Result<()> {
    let write = !file.options.read_only;
    lock::lock(&file.buffered, lock::USE, write)?;
    if file.options.lock == Lock::On {
        return Ok(());
    }
    lock::keep_qemu_out(&file.buffered, write)
        .inspect_err(|_| complain(&file.path, lock::unlock(&file.buffered, lock::USE)))
}

/// Makes an image this process's own, until [`disown`]. `owner` is a descriptor for the lock alone: it goes with this
/// process, whatever the kernel still does for a ring. Where another service has the image, that is soon clear: one that
/// was killed ends soon. What the kernel still does for that is waited for longer.
pub(crate) fn own(owner: &OwnedFd, buffered: &OwnedFd, path: &Path, write: bool) -> io::Result<()> {
    lock::wait(path, END_WAIT, || lock::lock(owner, lock::OWNERSHIP, write))?;
    lock::wait(path, lock::WAIT, || lock::test(owner, lock::USE, write))?;
    lock::wait(path, END_WAIT, || lock::keep_qemu_out(buffered, write))?;
    lock::wait(path, END_WAIT, || lock::lock(buffered, lock::GUARD, write))
}

/// Gives up an image, before the rings do that still know the file.
pub(super) fn disown(buffered: &OwnedFd, path: &Path) {
    // In this order: whoever sees the guard finds QEMU kept out.
    let unguarded = lock::unlock(buffered, lock::GUARD);
    complain(path, unguarded.and_then(|()| lock::let_qemu_in(buffered)));
}

fn complain(path: &Path, unlocked: io::Result<()>) {
    if let Err(error) = unlocked {
        tracing::warn!(path = %path.display(), %error, "not unlocked");
    }
}

fn users(file: &Opened) -> MutexGuard<'_, Users> {
    file.users.lock().unwrap_or_else(PoisonError::into_inner)
}

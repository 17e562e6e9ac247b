//! The hold that running queues have on a file: the lock that keeps all others from using it.
//!
//! The first queue takes the lock and the last gives it back, so that a guest can be handed over between two services that
//! have the same image open. The lock is on a descriptor that every ring registers: if the process is killed, it lasts
//! until the kernel has carried out the last of its requests, and a successor waits for that. An old write cannot
//! overtake the successor's.

use std::io;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use super::{Lock, Opened};
use crate::backend::BackendError;
use crate::backends::lock;

/// The holds there are.
#[derive(Debug, Default)]
pub(super) struct Users {
    count: usize,
    /// One of them left requests behind that it could not wait for.
    abandoned: bool,
}

/// A queue's hold on a file. Given back when it is dropped.
#[derive(Debug)]
pub(super) struct Hold(Arc<Opened>);

impl Hold {
    /// Takes a hold, and waits for up to `limit` for others to give up theirs.
    pub(super) fn take(file: &Arc<Opened>, limit: Duration) -> Result<Self, BackendError> {
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
            let attempt = || lock::lock(&file.buffered, lock::USE, !file.options.read_only);
            lock::wait(&file.path, limit, attempt).map_err(|error| match error.kind() {
                io::ErrorKind::WouldBlock => failed(&"another process uses it (lock=off overrides)"),
                _ => failed(&error),
            })?;
        }
        users.count += 1;
        drop(users);
        Ok(Self(file.clone()))
    }

    /// The file.
    pub(super) fn file(&self) -> &Arc<Opened> {
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
            if let Err(error) = lock::unlock(&self.0.buffered, lock::USE) {
                tracing::warn!(path = %self.0.path.display(), %error, "not unlocked");
            }
        }
    }
}

fn users(file: &Opened) -> MutexGuard<'_, Users> {
    file.users.lock().unwrap_or_else(PoisonError::into_inner)
}

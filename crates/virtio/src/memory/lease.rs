//! The right to work on a guest's memory, as a file that carries a lock.
//!
//! A process can be killed while the kernel still works for it: reads that were handed to io_uring arrive in guest memory
//! when their process is gone. A successor that takes up the same requests must not meet them. So the transport locks a
//! file that it shares with its successor, and whoever hands memory to the kernel hands this descriptor along: the lock
//! belongs to the open file, which lives until the kernel, too, has let go of it.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

/// A descriptor of the file with the lock. Clones share it; it is closed with the last of them.
#[derive(Clone)]
pub struct Lease(Arc<dyn AsFd + Send + Sync>);

impl Lease {
    /// Shares `file`, which has its lock.
    #[must_use]
    pub fn new(file: impl AsFd + Send + Sync + 'static) -> Self {
        Self(Arc::new(file))
    }
}

impl AsFd for Lease {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Lease").field(&self.as_fd().as_raw_fd()).finish()
    }
}

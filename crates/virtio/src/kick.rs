//! How the driver says that there are requests.

use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

/// How the driver says that there are requests.
#[derive(Debug)]
pub enum Kick {
    /// A descriptor becomes readable.
    Fd(OwnedFd),
    /// The same, and the transport can spare the driver the cost of kicks that nobody waits for.
    Doorbell(Arc<dyn Doorbell>),
    /// The transport hears of it, and calls [`crate::QueueSet::wake`].
    Wake,
    /// It does not: where the queue is not polled for good, it is looked at by a timer.
    Never,
}

/// A doorbell that can be made to cost its driver nothing while nobody listens.
///
/// A write that the transport notices (an exit of a virtual machine) costs the driver microseconds. While the queue is
/// polled nobody needs it, yet a driver may not know, or not care. So the thread that polls says what it is about to
/// do, and the doorbell decides whether a change of its ways is worth the price.
///
/// All methods are called by the queue's I/O thread. None blocks for longer than a change takes.
pub trait Doorbell: fmt::Debug + Send + Sync {
    /// Becomes readable by a write that came since [`Doorbell::listen`].
    fn fd(&self) -> BorrowedFd<'_>;

    /// The thread polls: it has just woken, or has been polling for a while. Writes need not be noticed from here on.
    fn awake(&self);

    /// The thread is about to sleep. When this returns, every write makes the descriptor readable; true if one came
    /// before and did not.
    ///
    /// The caller looks at the ring afterwards: what a write that came before was about is there to be seen.
    fn listen(&self) -> bool;
}

impl Kick {
    /// Another handle of the same.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        Ok(match self {
            Self::Fd(fd) => Self::Fd(fd.try_clone()?),
            Self::Doorbell(doorbell) => Self::Doorbell(doorbell.clone()),
            Self::Wake => Self::Wake,
            Self::Never => Self::Never,
        })
    }

    /// The descriptor that becomes readable.
    pub(crate) fn fd(&self) -> Option<RawFd> {
        match self {
            Self::Fd(fd) => Some(fd.as_raw_fd()),
            Self::Doorbell(doorbell) => Some(doorbell.fd().as_raw_fd()),
            Self::Wake | Self::Never => None,
        }
    }

    #[cold]
    #[inline(never)]
    pub(crate) fn awake(&self) {
        if let Self::Doorbell(doorbell) = self {
            doorbell.awake();
        }
    }

    pub(crate) fn listen(&self) -> bool {
        matches!(self, Self::Doorbell(doorbell) if doorbell.listen())
    }
}

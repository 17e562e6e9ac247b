//! How a used buffer is announced to the driver.

use std::os::fd::OwnedFd;

/// Announces used buffers of one queue: an eventfd, a message, an interrupt of the monitor.
pub trait Call: Send + Sync {
    /// Announces that buffers were used. Must not block; returns false if the driver cannot be reached.
    fn call(&self) -> bool;
}

/// Announces by adding 1 to an eventfd, or by one 8-byte message to a pipe.
#[derive(Debug)]
pub struct EventFdCall(OwnedFd);

impl EventFdCall {
    /// Wraps the descriptor that the driver's side listens on, and makes it non-blocking: a listener that lets it
    /// fill up has its call pending anyway.
    ///
    /// # Errors
    /// The descriptor's flags cannot be set.
    pub fn new(fd: OwnedFd) -> std::io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
        Ok(Self(fd))
    }
}

impl Call for EventFdCall {
    fn call(&self) -> bool {
        matches!(rustix::io::write(&self.0, &1u64.to_ne_bytes()), Ok(_) | Err(rustix::io::Errno::AGAIN))
    }
}

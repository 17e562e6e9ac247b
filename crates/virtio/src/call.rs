//! How a used buffer is announced to the driver.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::OFlags;
use rustix::io::Errno;

/// Announces used buffers of one queue: an eventfd, a message, an interrupt of the monitor.
pub trait Call: Send + Sync {
    /// Announces that buffers were used. Must not block; returns false if the driver cannot be reached.
    fn call(&self) -> bool;

    /// Whether the driver cannot be reached because its side made a call block. Its queue is to stop.
    fn is_hostile(&self) -> bool {
        false
    }
}

/// Whether a peer's descriptors may be used: until the first call on one of them blocks.
///
/// Shared by all descriptors of one peer, so that it can block a thread once, not once for each of them.
#[derive(Clone, Debug, Default)]
pub struct Trust(Arc<AtomicBool>);

impl Trust {
    /// Whether a call has blocked.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// Makes a system call that does not wait, unless the peer has made its descriptor blocking again.
    ///
    /// # Errors
    /// `ETIMEDOUT` if it blocked, or an earlier one had; nothing was done. `EAGAIN` and others as the call has them.
    pub fn attempt(&self, call: impl FnOnce() -> Result<usize, Errno>) -> Result<usize, Errno> {
        if self.is_lost() {
            return Err(Errno::TIMEDOUT);
        }
        match reactor::guarded(call) {
            // Only a call that waits is interrupted, and this one had no business to wait.
            Err(Errno::INTR) => {
                self.0.store(true, Ordering::Release);
                Err(Errno::TIMEDOUT)
            }
            result => result,
        }
    }
}

/// Announces by adding 1 to an eventfd, or by one 8-byte message to a pipe.
#[derive(Debug)]
pub struct EventFdCall {
    fd: OwnedFd,
    trust: Trust,
}

impl EventFdCall {
    /// Wraps the descriptor that the driver's side listens on, and makes it non-blocking: a listener that lets it
    /// fill up has its call pending anyway. A listener that makes it blocking again loses our `trust`.
    ///
    /// # Errors
    /// The descriptor's flags cannot be set.
    pub fn new(fd: OwnedFd, trust: Trust) -> std::io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        Ok(Self { fd, trust })
    }
}

impl Call for EventFdCall {
    fn call(&self) -> bool {
        let written = self.trust.attempt(|| rustix::io::write(&self.fd, &1u64.to_ne_bytes()));
        matches!(written, Ok(_) | Err(Errno::AGAIN))
    }

    fn is_hostile(&self) -> bool {
        self.trust.is_lost()
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    /// The two ends of what a listener hands out.
    fn shared_eventfd() -> (OwnedFd, OwnedFd) {
        let ours = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        (ours.try_clone().unwrap(), ours)
    }

    #[test]
    fn a_full_descriptor_has_its_call_pending() {
        let (theirs, ours) = shared_eventfd();
        let call = EventFdCall::new(ours, Trust::default()).unwrap();
        rustix::io::write(&theirs, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        assert!(call.call());
        assert!(!call.is_hostile());
    }

    /// A pipe of another user's cannot be opened anew, and is used as it came.
    #[test]
    fn pipes_and_sockets_that_block_are_found_out_too() {
        let (_reader, pipe) = rustix::pipe::pipe().unwrap();
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        for theirs in [pipe, socket.into()] {
            let call = EventFdCall::new(theirs.try_clone().unwrap(), Trust::default()).unwrap();
            while rustix::io::write(&theirs, &[0; 8]).is_ok() {}
            assert!(call.call());
            rustix::fs::fcntl_setfl(&theirs, OFlags::empty()).unwrap();
            assert!(!call.call() && call.is_hostile());
        }
    }

    #[test]
    fn a_listener_whose_descriptor_blocks_is_not_called_again_on_any() {
        let trust = Trust::default();
        let [(theirs, ours), (other, our_other)] = [shared_eventfd(), shared_eventfd()];
        let call = EventFdCall::new(ours, trust.clone()).unwrap();
        let other_call = EventFdCall::new(our_other, trust).unwrap();
        assert!(call.call() && other_call.call());
        rustix::fs::fcntl_setfl(&theirs, OFlags::empty()).unwrap();
        assert!(call.call(), "blocking, but there is room");
        rustix::io::write(&theirs, &(u64::MAX - 3).to_ne_bytes()).unwrap();
        assert!(!call.call());
        assert!(call.is_hostile() && other_call.is_hostile());
        assert!(!other_call.call());
        let mut count = [0; 8];
        rustix::io::read(&other, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 1, "nothing was written any more");
    }
}

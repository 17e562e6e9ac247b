//! How other threads talk to an I/O thread.
//!
//! The thread owns its state, so everything that others want done to it arrives as a message. An awake thread
//! pays one load per turn for this; a sleeping one is woken through an eventfd. See `bell` for why no wake-up is
//! lost.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, mpsc};

use rustix::event::{EventfdFlags, eventfd};

use crate::bell::Bell;

/// The senders' end. Shared by every handle of the thread.
pub(crate) struct Outbox<T> {
    queue: mpsc::Sender<T>,
    doorbell: Arc<Doorbell>,
}

/// The I/O thread's end. Dropping it drops every message that was not read, and fails later sends.
pub(crate) struct Inbox<T> {
    queue: mpsc::Receiver<T>,
    doorbell: Arc<Doorbell>,
}

struct Doorbell {
    bell: Bell,
    eventfd: OwnedFd,
}

/// Makes a mailbox.
pub(crate) fn mailbox<T>() -> rustix::io::Result<(Outbox<T>, Inbox<T>)> {
    let eventfd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let doorbell = Arc::new(Doorbell { bell: Bell::new(), eventfd });
    let (sender, receiver) = mpsc::channel();
    Ok((Outbox { queue: sender, doorbell: doorbell.clone() }, Inbox { queue: receiver, doorbell }))
}

impl<T> Outbox<T> {
    /// Delivers `message` and sees to it that the thread reads it soon. If the thread has ended, or ends before it
    /// reads it, the message is dropped.
    pub(crate) fn send(&self, message: T) {
        if self.queue.send(message).is_ok() {
            self.ring();
        }
    }

    /// Makes the thread take a turn soon even if it sleeps, without a message. Costs one atomic operation while the
    /// thread is awake.
    pub(crate) fn ring(&self) {
        if self.doorbell.bell.ring() {
            // It can only fail when the counter is full, after 2^64 rings: the thread never reads it, because
            // epoll reports each write to it as an edge.
            let _ = rustix::io::write(&self.doorbell.eventfd, &1_u64.to_ne_bytes());
        }
    }
}

impl<T> Inbox<T> {
    /// Whether anybody sent or rang. One load.
    #[inline]
    pub(crate) fn is_rung(&self) -> bool {
        self.doorbell.bell.is_rung()
    }

    /// Takes note of the rings so far; then [`next`](Self::next) finds every message they announced.
    pub(crate) fn answer(&self) {
        self.doorbell.bell.answer();
    }

    /// The next message, if there is one.
    pub(crate) fn next(&self) -> Option<T> {
        self.queue.try_recv().ok()
    }

    /// Announces sleep; false if somebody rang and the thread must look again.
    pub(crate) fn try_sleep(&self) -> bool {
        self.doorbell.bell.try_sleep()
    }

    /// Ends what a successful [`try_sleep`](Self::try_sleep) began.
    pub(crate) fn awake(&self) {
        self.doorbell.bell.awake();
    }
}

impl<T> AsFd for Inbox<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.doorbell.eventfd.as_fd()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_in_order_and_announced() {
        let (outbox, inbox) = mailbox().unwrap();
        assert!(!inbox.is_rung());
        outbox.send(1);
        outbox.send(2);
        assert!(inbox.is_rung());
        inbox.answer();
        assert_eq!((inbox.next(), inbox.next(), inbox.next()), (Some(1), Some(2), None));
    }

    #[test]
    fn the_eventfd_is_written_only_for_a_sleeping_thread() {
        let (outbox, inbox) = mailbox::<()>().unwrap();
        let written = || rustix::io::read(inbox.as_fd(), &mut [0_u8; 8]).is_ok();
        outbox.ring();
        assert!(!written());
        inbox.answer();
        assert!(inbox.try_sleep());
        outbox.ring();
        outbox.ring();
        assert!(written());
        inbox.awake();
    }

    #[test]
    fn a_message_to_a_thread_that_ended_is_dropped() {
        let (outbox, inbox) = mailbox::<Arc<()>>().unwrap();
        let message = Arc::new(());
        outbox.send(message.clone());
        drop(inbox);
        outbox.send(message.clone());
        assert_eq!(Arc::strong_count(&message), 1);
    }
}

//! Doorbells: how a driver's kick reaches the I/O thread of its queue (virtio 1.2, sections 4.1.4.4 and 4.1.5.2).
//!
//! Each queue has an eventfd for as long as the device lives, and a page in a BAR. While the queue runs and the BAR is
//! somewhere, the machine is asked to signal the eventfd for writes to that page; a write that arrives here all the same
//! signals it by hand.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use virtio::GuestAddr;

use super::layout::NOTIFY_BYTES;
use crate::pci::{Doorbells, Registration};

#[derive(Default)]
struct Bell {
    /// The queue runs, or is about to.
    is_open: bool,
    registration: Option<Registration>,
}

struct State {
    /// Where the BAR is.
    at: Option<GuestAddr>,
    bells: Vec<Bell>,
    /// It has been said that registering fails.
    warned: bool,
}

/// The doorbells of one device.
pub(crate) struct Bells {
    doorbells: Arc<dyn Doorbells>,
    kicks: Vec<OwnedFd>,
    state: Mutex<State>,
}

impl Bells {
    pub(crate) fn new(queues: u16, doorbells: Arc<dyn Doorbells>) -> io::Result<Self> {
        let make = |_| eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC);
        let kicks = (0..queues).map(make).collect::<Result<Vec<_>, _>>()?;
        let bells = kicks.iter().map(|_| Bell::default()).collect();
        Ok(Self { doorbells, kicks, state: Mutex::new(State { at: None, bells, warned: false }) })
    }

    /// What the queue's thread waits for.
    pub(crate) fn kick(&self, queue: u16) -> io::Result<OwnedFd> {
        match self.kicks.get(usize::from(queue)) {
            Some(kick) => kick.try_clone(),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// The driver wrote to the BAR, and nobody else took the write.
    pub(crate) fn write(&self, offset: u64) {
        let queue = usize::try_from(offset / NOTIFY_BYTES).ok();
        if let Some(kick) = queue.and_then(|queue| self.kicks.get(queue))
            && offset.is_multiple_of(NOTIFY_BYTES)
        {
            // A full counter means that a kick is pending.
            let _ = rustix::io::write(kick, &1u64.to_ne_bytes());
        }
    }

    /// The queue is about to run.
    pub(crate) fn open(&self, queue: u16) {
        let mut state = self.state();
        if let Some(bell) = state.bells.get_mut(usize::from(queue)) {
            bell.is_open = true;
            self.register(&mut state, queue);
        }
    }

    /// The queue has stopped.
    pub(crate) fn close(&self, queue: u16) {
        if let Some(bell) = self.state().bells.get_mut(usize::from(queue)) {
            *bell = Bell::default();
        }
    }

    /// The BAR has moved.
    pub(crate) fn place(&self, at: Option<GuestAddr>) {
        let mut state = self.state();
        state.at = at;
        state.bells.iter_mut().for_each(|bell| bell.registration = None);
        for queue in 0..self.kicks.len() as u16 {
            self.register(&mut state, queue);
        }
    }

    fn register(&self, state: &mut State, queue: u16) {
        let State { at, bells, warned } = state;
        let (Some(bar), Some(bell)) = (*at, bells.get_mut(usize::from(queue))) else { return };
        let Some(kick) = self.kicks.get(usize::from(queue)) else { return };
        if !bell.is_open || bell.registration.is_some() {
            return;
        }
        let addr = GuestAddr(bar.0 + u64::from(queue) * NOTIFY_BYTES);
        match self.doorbells.register(queue, addr, kick.as_fd()) {
            Ok(registration) => bell.registration = Some(registration),
            Err(error) if !std::mem::replace(warned, true) => {
                tracing::warn!(queue, %addr, %error, "kicks take the slow way: the doorbell is not to be had");
            }
            Err(error) => tracing::debug!(queue, %addr, %error, "no doorbell"),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::BorrowedFd;

    use super::*;

    /// Where doorbells are registered now.
    #[derive(Clone, Default)]
    struct Board(Arc<Mutex<Vec<(u16, u64)>>>);

    struct Entry(Board, (u16, u64));

    impl Drop for Entry {
        fn drop(&mut self) {
            self.0.0.lock().unwrap().retain(|entry| *entry != self.1);
        }
    }

    impl Doorbells for Board {
        fn register(&self, queue: u16, addr: GuestAddr, _kick: BorrowedFd<'_>) -> io::Result<Registration> {
            let mut entries = self.0.lock().unwrap();
            if entries.iter().any(|(_, at)| *at == addr.0) || addr.0 >= 0xd000_0000 {
                return Err(io::ErrorKind::AddrInUse.into());
            }
            entries.push((queue, addr.0));
            Ok(Box::new(Entry(self.clone(), (queue, addr.0))))
        }
    }

    impl Board {
        fn entries(&self) -> Vec<(u16, u64)> {
            self.0.lock().unwrap().clone()
        }
    }

    fn count(bells: &Bells, queue: u16) -> u64 {
        let mut value = [0; 8];
        match rustix::io::read(bells.kick(queue).unwrap(), &mut value) {
            Ok(_) => u64::from_ne_bytes(value),
            Err(_) => 0,
        }
    }

    #[test]
    fn a_running_queue_has_its_page_registered_wherever_the_bar_goes() {
        let board = Board::default();
        let bells = Bells::new(3, Arc::new(board.clone())).unwrap();
        bells.open(1);
        assert_eq!(board.entries(), []);
        bells.place(Some(GuestAddr(0xc000_0000)));
        assert_eq!(board.entries(), [(1, 0xc000_1000)]);
        bells.open(2);
        bells.open(2);
        bells.place(Some(GuestAddr(0xc010_0000)));
        assert_eq!(board.entries(), [(1, 0xc010_1000), (2, 0xc010_2000)]);
        bells.close(1);
        assert_eq!(board.entries(), [(2, 0xc010_2000)]);
        bells.place(None);
        assert_eq!(board.entries(), []);
        bells.place(Some(GuestAddr(0xd000_0000)));
        assert_eq!(board.entries(), [], "refused");
        bells.place(Some(GuestAddr(0xc000_0000)));
        assert_eq!(board.entries(), [(2, 0xc000_2000)]);
        drop(bells);
        assert_eq!(board.entries(), []);
    }

    #[test]
    fn a_write_that_arrives_here_kicks() {
        let bells = Bells::new(2, Arc::new(Board::default())).unwrap();
        for offset in [0x1000, 0x1000, 0x1002, 1, 0x2000, u64::MAX, !0xfff] {
            bells.write(offset);
        }
        assert_eq!((count(&bells, 0), count(&bells, 1)), (0, 2));
        assert!(bells.kick(2).is_err());
    }
}

//! Doorbells: how a driver's kick reaches the I/O thread of its queue (virtio 1.2, sections 4.1.4.4 and 4.1.5.2).
//!
//! Each queue has a bell for as long as the device lives, and a page in a BAR. While the queue runs and the BAR is
//! somewhere, the bell is placed there, and the machine signals its descriptor for writes to the page; a write that
//! arrives here all the same signals it by hand.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use virtio::{GuestAddr, Kick};

use super::layout::NOTIFY_BYTES;
use crate::pci::{Bell, Doorbells};

#[derive(Clone, Copy, Default)]
struct State {
    /// The queue runs, or is about to.
    is_open: bool,
    is_placed: bool,
}

struct States {
    /// Where the BAR is.
    at: Option<GuestAddr>,
    /// By queue.
    bells: Vec<State>,
    /// It has been said that one cannot be placed.
    warned: bool,
}

/// The doorbells of one device.
pub(crate) struct Bells {
    bells: Vec<Arc<dyn Bell>>,
    states: Mutex<States>,
}

impl Bells {
    pub(crate) fn new(queues: u16, doorbells: &dyn Doorbells) -> io::Result<Self> {
        let make = |queue| doorbells.bell(queue, eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
        let bells = (0..queues).map(make).collect::<io::Result<Vec<_>>>()?;
        let states = States { at: None, bells: vec![State::default(); bells.len()], warned: false };
        Ok(Self { bells, states: Mutex::new(states) })
    }

    /// How the driver kicks a queue; None if there is no such queue.
    pub(crate) fn kick(&self, queue: u16) -> Option<Kick> {
        Some(Kick::Doorbell(self.bells.get(usize::from(queue))?.clone()))
    }

    /// The driver wrote to the BAR, and nobody else took the write.
    pub(crate) fn write(&self, offset: u64) {
        let queue = usize::try_from(offset / NOTIFY_BYTES).ok();
        if let Some(bell) = queue.and_then(|queue| self.bells.get(queue))
            && offset.is_multiple_of(NOTIFY_BYTES)
        {
            // A full counter means that a kick is pending.
            let _ = rustix::io::write(bell.fd(), &1u64.to_ne_bytes());
        }
    }

    /// The queue is about to run.
    pub(crate) fn open(&self, queue: u16) {
        let mut states = self.states();
        if let Some(state) = states.bells.get_mut(usize::from(queue)) {
            state.is_open = true;
            self.settle(&mut states, queue);
        }
    }

    /// The queue has stopped.
    pub(crate) fn close(&self, queue: u16) {
        let mut states = self.states();
        if let Some(state) = states.bells.get_mut(usize::from(queue)) {
            state.is_open = false;
            self.remove(&mut states, queue);
        }
    }

    /// The BAR has moved.
    pub(crate) fn place(&self, at: Option<GuestAddr>) {
        let mut states = self.states();
        let queues = 0..self.bells.len() as u16;
        // All leave before the first arrives: places of different queues may be the same.
        queues.clone().for_each(|queue| self.remove(&mut states, queue));
        states.at = at;
        queues.for_each(|queue| self.settle(&mut states, queue));
    }

    fn settle(&self, states: &mut States, queue: u16) {
        let States { at, bells, warned } = states;
        let index = usize::from(queue);
        let (Some(bar), Some(bell), Some(state)) = (*at, self.bells.get(index), bells.get_mut(index)) else {
            return;
        };
        if !state.is_open || state.is_placed {
            return;
        }
        let addr = GuestAddr(bar.0 + u64::from(queue) * NOTIFY_BYTES);
        match bell.place(addr) {
            Ok(()) => state.is_placed = true,
            Err(error) if !std::mem::replace(warned, true) => {
                tracing::warn!(queue, %addr, %error, "kicks take the slow way: the doorbell cannot be placed");
            }
            Err(error) => tracing::debug!(queue, %addr, %error, "the doorbell cannot be placed"),
        }
    }

    fn remove(&self, states: &mut States, queue: u16) {
        let index = usize::from(queue);
        if let (Some(bell), Some(state)) = (self.bells.get(index), states.bells.get_mut(index))
            && std::mem::take(&mut state.is_placed)
        {
            bell.remove();
        }
    }

    fn states(&self) -> MutexGuard<'_, States> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Bells {
    fn drop(&mut self) {
        // Queues hold on to their bells a little longer.
        self.place(None);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

    use super::*;

    /// Where doorbells are now.
    #[derive(Clone, Debug, Default)]
    struct Board(Arc<Mutex<Vec<(u16, u64)>>>);

    #[derive(Debug)]
    struct Entry {
        board: Board,
        queue: u16,
        kick: OwnedFd,
    }

    impl virtio::Doorbell for Entry {
        fn fd(&self) -> BorrowedFd<'_> {
            self.kick.as_fd()
        }

        fn awake(&self) {}

        fn listen(&self) -> bool {
            false
        }
    }

    impl Bell for Entry {
        fn place(&self, addr: GuestAddr) -> io::Result<()> {
            let mut entries = self.board.0.lock().unwrap();
            assert!(entries.iter().all(|(queue, at)| *queue != self.queue && *at != addr.0));
            if addr.0 >= 0xd000_0000 {
                return Err(io::ErrorKind::AddrInUse.into());
            }
            entries.push((self.queue, addr.0));
            Ok(())
        }

        fn remove(&self) {
            let mut entries = self.board.0.lock().unwrap();
            assert!(entries.iter().any(|(queue, _)| *queue == self.queue));
            entries.retain(|(queue, _)| *queue != self.queue);
        }
    }

    impl Doorbells for Board {
        fn bell(&self, queue: u16, kick: OwnedFd) -> io::Result<Arc<dyn Bell>> {
            Ok(Arc::new(Entry { board: self.clone(), queue, kick }))
        }
    }

    impl Board {
        fn entries(&self) -> Vec<(u16, u64)> {
            self.0.lock().unwrap().clone()
        }
    }

    fn count(bells: &Bells, queue: usize) -> u64 {
        let mut value = [0; 8];
        match rustix::io::read(bells.bells[queue].fd(), &mut value) {
            Ok(_) => u64::from_ne_bytes(value),
            Err(_) => 0,
        }
    }

    #[test]
    fn a_running_queue_has_its_bell_wherever_the_bar_goes() {
        let board = Board::default();
        let bells = Bells::new(3, &board).unwrap();
        bells.open(1);
        assert_eq!(board.entries(), []);
        bells.place(Some(GuestAddr(0xc000_0000)));
        assert_eq!(board.entries(), [(1, 0xc000_1000)]);
        bells.open(2);
        bells.open(2);
        bells.place(Some(GuestAddr(0xc000_1000)));
        assert_eq!(board.entries(), [(1, 0xc000_2000), (2, 0xc000_3000)]);
        bells.close(1);
        bells.close(1);
        assert_eq!(board.entries(), [(2, 0xc000_3000)]);
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
        let bells = Bells::new(2, &Board::default()).unwrap();
        for offset in [0x1000, 0x1000, 0x1002, 1, 0x2000, u64::MAX, !0xfff] {
            bells.write(offset);
        }
        assert_eq!((count(&bells, 0), count(&bells, 1)), (0, 2));
        assert!(bells.kick(2).is_none());
    }
}

//! Who sits where in a pool, so that the next one can be placed.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::placement::{self, Layout, Load};
use crate::policy::Mode;
use crate::thread::Thread;

/// The pool's seats. Guarded by one lock that no data path takes.
#[derive(Debug)]
pub(crate) struct Book {
    pub(crate) layout: Layout,
    pub(crate) threads: Vec<Option<Arc<Thread>>>,
    pub(crate) stopped: bool,
    loads: Vec<Load>,
    groups: HashMap<String, Group>,
}

#[derive(Debug)]
struct Group {
    seat: usize,
    members: usize,
}

impl Book {
    pub(crate) fn new(layout: Layout) -> Self {
        let seats = layout.seats.len();
        Self {
            layout,
            threads: vec![None; seats],
            stopped: false,
            loads: vec![Load::default(); seats],
            groups: HashMap::new(),
        }
    }
}

pub(crate) fn lock(book: &Mutex<Book>) -> MutexGuard<'_, Book> {
    book.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One queue's entry in the book; struck out when dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    book: Arc<Mutex<Book>>,
    group: String,
    seat: usize,
    mode: Mutex<Mode>,
}

impl Lease {
    /// Enters a queue of `group`, on the thread of its group if that has one.
    pub(crate) fn take(book: &Arc<Mutex<Book>>, group: &str, mode: Mode, taken: &[u32]) -> Self {
        let mut pages = lock(book);
        let Book { layout, loads, groups, .. } = &mut *pages;
        let (seat, mode) = match groups.get(group) {
            Some(&Group { seat, .. }) => (seat, placement::grant(layout, loads, seat, mode)),
            None => {
                let choice = placement::choose(layout, loads, mode, taken);
                (choice.seat, choice.mode)
            }
        };
        groups.entry(group.to_owned()).or_insert(Group { seat, members: 0 }).members += 1;
        loads[seat].queues += 1;
        loads[seat].polled += usize::from(mode == Mode::Poll);
        Self { book: book.clone(), group: group.to_owned(), seat, mode: Mutex::new(mode) }
    }

    pub(crate) fn seat(&self) -> usize {
        self.seat
    }

    pub(crate) fn mode(&self) -> Mode {
        *self.mode.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for another mode; returns the one granted.
    pub(crate) fn change(&self, wanted: Mode) -> Mode {
        let mut pages = lock(&self.book);
        let mut mode = self.mode.lock().unwrap_or_else(PoisonError::into_inner);
        let Book { layout, loads, .. } = &mut *pages;
        loads[self.seat].polled -= usize::from(*mode == Mode::Poll);
        *mode = placement::grant(layout, loads, self.seat, wanted);
        loads[self.seat].polled += usize::from(*mode == Mode::Poll);
        *mode
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let polled = usize::from(self.mode() == Mode::Poll);
        let mut pages = lock(&self.book);
        let Book { loads, groups, .. } = &mut *pages;
        loads[self.seat].queues -= 1;
        loads[self.seat].polled -= polled;
        if let Some(group) = groups.get_mut(&self.group) {
            group.members -= 1;
            if group.members == 0 {
                groups.remove(&self.group);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn book(seats: usize, pollers_max: usize) -> Arc<Mutex<Book>> {
        let seats = (0..seats as u32).collect();
        Arc::new(Mutex::new(Book::new(Layout { seats, pollers_max, warnings: Vec::new() })))
    }

    #[test]
    fn a_group_keeps_its_seat_until_its_last_member_leaves() {
        let book = book(2, 2);
        let first = Lease::take(&book, "net0/0", Mode::Hybrid, &[]);
        let second = Lease::take(&book, "net0/0", Mode::Hybrid, &[]);
        assert_eq!((first.seat(), second.seat()), (0, 0));
        drop(first);
        assert_eq!(Lease::take(&book, "net0/0", Mode::Hybrid, &[]).seat(), 0);
        assert_eq!(Lease::take(&book, "disk0/0", Mode::Hybrid, &[]).seat(), 1);
        drop(second);
        assert!(lock(&book).groups.is_empty());
        assert_eq!(lock(&book).loads, [Load::default(); 2]);
    }

    #[test]
    fn polling_is_granted_and_returned() {
        let book = book(2, 1);
        let first = Lease::take(&book, "a", Mode::Poll, &[]);
        let second = Lease::take(&book, "b", Mode::Hybrid, &[]);
        assert_eq!(first.mode(), Mode::Poll);
        assert_eq!(second.change(Mode::Poll), Mode::Hybrid, "the only polling thread is the other");
        assert_eq!(first.change(Mode::Notify), Mode::Notify);
        assert_eq!(second.change(Mode::Poll), Mode::Poll);
        drop((first, second));
        assert_eq!(lock(&book).loads, [Load::default(); 2]);
    }
}

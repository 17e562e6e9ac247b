//! Freed clusters on their way to be used again.
//!
//! The entry that held them is gone from the file and the map. First every thread that may still read or write there on
//! the word of the older map must be done, then the space is given back, then a barrier makes all that durable. Only after
//! that may they be used for something else.

use std::collections::VecDeque;

use super::barrier::Then;
use super::pending::Freed;
use super::{Command, Engine, Io};

/// Freed clusters that wait for a barrier of their own.
const WAITING_MAX: usize = 256;

/// Freed clusters, by what they wait for.
#[derive(Debug)]
pub(super) struct Limbo {
    /// See [`WAITING_MAX`].
    waiting_max: usize,
    /// Threads, with the epoch in which they were freed.
    threads: VecDeque<(u64, Freed)>,
    /// Their space to be given back: a ticket for each command.
    punching: Vec<(u64, Freed)>,
    /// A barrier: in which order they came, whether they read as zeros.
    barrier: VecDeque<(u64, Freed, bool)>,
    /// The number of the last that came.
    last: u64,
    /// The last that a barrier was asked for.
    asked: u64,
}

impl Default for Limbo {
    fn default() -> Self {
        Self {
            waiting_max: WAITING_MAX,
            threads: VecDeque::new(),
            punching: Vec::new(),
            barrier: VecDeque::new(),
            last: 0,
            asked: 0,
        }
    }
}

impl Engine {
    /// Lets freed clusters be used again when there are this many: soon, so that a short test sees what comes of it.
    pub fn reuse_after(&mut self, clusters: usize) {
        self.limbo.waiting_max = clusters;
    }

    /// An entry that is gone held these.
    pub(super) fn free(&mut self, freed: Freed) {
        if freed != Freed::Nothing {
            let epoch = self.readers.end_epoch();
            self.limbo.threads.push_back((epoch, freed));
        }
    }

    /// Moves what can go on.
    pub(super) fn move_limbo(&mut self) {
        if self.limbo.threads.is_empty() && self.limbo.barrier.is_empty() {
            return;
        }
        let oldest = self.readers.oldest();
        while self.limbo.threads.front().is_some_and(|&(epoch, _)| epoch < oldest) {
            let Some((_, freed)) = self.limbo.threads.pop_front() else { break };
            match freed {
                Freed::Owned { first } if self.environment.punch => {
                    let ticket = self.id();
                    self.limbo.punching.push((ticket, freed));
                    let (offset, len) = (first << self.layout.cluster_bits, self.layout.cluster_bytes());
                    self.command(Io::Punch { ticket }, |io| Command::Punch { io, offset, len });
                }
                _ => self.limbo_barrier(freed, false),
            }
        }
        if self.limbo.barrier.len() >= self.limbo.waiting_max || self.alloc.is_closing() {
            self.flush_limbo();
        }
    }

    /// Asks for a barrier for all that wait for one.
    pub(super) fn flush_limbo(&mut self) {
        if self.limbo.asked < self.limbo.last {
            self.limbo.asked = self.limbo.last;
            self.after_barrier(Then::Limbo { upto: self.limbo.last });
        }
    }

    pub(super) fn punched(&mut self, ticket: u64, ok: bool) {
        if let Some(at) = self.limbo.punching.iter().position(|&(other, _)| other == ticket) {
            let (_, freed) = self.limbo.punching.swap_remove(at);
            self.limbo_barrier(freed, ok && self.environment.fresh_is_zero);
        }
    }

    fn limbo_barrier(&mut self, freed: Freed, zeroed: bool) {
        self.limbo.last += 1;
        self.limbo.barrier.push_back((self.limbo.last, freed, zeroed));
    }

    /// A barrier is over that began after the clusters up to number `upto` came.
    pub(super) fn limbo_durable(&mut self, upto: u64, ok: bool) {
        if !ok {
            // Whether their references are gone will never be known: the clusters stay as they are.
            self.limbo.barrier.retain(|&(number, ..)| number > upto);
            return;
        }
        while self.limbo.barrier.front().is_some_and(|&(number, ..)| number <= upto) {
            let Some((_, freed, zeroed)) = self.limbo.barrier.pop_front() else { break };
            match freed {
                Freed::Nothing => {}
                Freed::Owned { first } if self.alloc.keep(first, zeroed) => {}
                Freed::Owned { first } => self.decrease(first),
                Freed::Shared { first, count } => {
                    for cluster in first..first + count {
                        self.decrease(cluster);
                    }
                }
            }
        }
    }
}

//! Host clusters for data and tables.
//!
//! Clusters are reserved in runs: their refcounts are set and made durable before the first is used, so that an
//! allocation costs neither a write nor a barrier. Reservations grow while the image does. A crash leaks what was
//! reserved and not used.

use std::collections::{HashSet, VecDeque};

use super::barrier::Then;
use super::piece::Piece;
use super::{Command, Engine, Io};
use crate::layout::Layout;
use crate::refcount;

/// Clusters of the first reservation.
const RESERVE_MIN: u64 = 16;
/// The most of any, in clusters and in bytes.
const RESERVE_MAX: u64 = 1024;
const RESERVE_BYTES_MAX: u64 = 64 << 20;
/// Pieces that a reservation may consist of.
const RUNS_MAX: usize = 64;
/// Freed clusters that are kept for use without going through the refcounts.
const POOL_MAX: usize = 1024;
/// Host clusters lie below 2^56 bytes.
const HOST_BITS: u32 = 56;

/// Clusters in a row.
#[derive(Clone, Copy, Debug)]
struct Run {
    start: u64,
    count: u64,
    /// They read as zeros, now and after a crash.
    zeroed: bool,
}

/// A reservation that is being made.
#[derive(Debug, Default)]
struct Reservation {
    /// Its clusters, once they are chosen.
    runs: Vec<Run>,
    /// What of it is on its way to the file.
    writes: usize,
    failed: bool,
    /// So many clusters in a row, for which the search goes on at this one.
    row: Option<(u64, u64)>,
}

/// Who waits for clusters.
#[derive(Debug)]
pub(super) enum Waiter {
    Piece(Piece),
    Table(u64),
    /// So many in a row.
    Row(u64),
}

/// Clusters that may be used, and the search for more.
#[derive(Debug)]
pub(super) struct Allocator {
    runs: VecDeque<Run>,
    /// Freed clusters whose refcount is still one, and whether they read as zeros.
    pool: VecDeque<(u64, bool)>,
    /// Where the search for free clusters goes on.
    pub(super) cursor: u64,
    /// From here on no cluster was ever used.
    fresh_from: u64,
    target: u64,
    target_max: u64,
    /// A reservation that is being made.
    reserving: Option<Reservation>,
    /// Length of the file in clusters, made so by reservations.
    file_end: u64,
    waiting: Vec<Waiter>,
    /// Clusters that hold metadata, whatever their refcounts say.
    metadata: HashSet<u64>,
    /// The refcount structures in the file may differ from those here.
    broken: bool,
    closing: bool,
}

impl Allocator {
    pub(super) fn new(layout: &Layout, file_bytes: u64) -> Self {
        Self {
            runs: VecDeque::new(),
            pool: VecDeque::new(),
            cursor: 0,
            fresh_from: layout.clusters(file_bytes),
            target: RESERVE_MIN,
            target_max: RESERVE_MAX.min(RESERVE_BYTES_MAX >> layout.cluster_bits).max(RESERVE_MIN),
            reserving: None,
            file_end: file_bytes >> layout.cluster_bits,
            waiting: Vec::new(),
            metadata: HashSet::new(),
            broken: false,
            closing: false,
        }
    }

    pub(super) fn wait(&mut self, waiter: Waiter) {
        self.waiting.push(waiter);
    }

    /// `cluster` holds metadata.
    pub(super) fn is_metadata(&mut self, cluster: u64) {
        self.metadata.insert(cluster);
    }

    /// `cluster` no longer holds metadata.
    pub(super) fn no_metadata(&mut self, cluster: u64) {
        self.metadata.remove(&cluster);
    }

    /// The clusters up to `end` may have been used.
    pub(super) fn used_up_to(&mut self, end: u64) {
        self.fresh_from = self.fresh_from.max(end);
    }

    /// A freed cluster with a refcount of one; false if it is not kept.
    pub(super) fn keep(&mut self, cluster: u64, zeroed: bool) -> bool {
        let keep = self.pool.len() < POOL_MAX && !self.closing;
        if keep {
            self.pool.push_back((cluster, zeroed));
        }
        keep
    }

    /// A cluster is free according to its refcount.
    pub(super) fn is_free(&mut self, cluster: u64) {
        self.cursor = self.cursor.min(cluster);
    }

    /// The image is about to be left in order.
    pub(super) fn is_closing(&self) -> bool {
        self.closing
    }

    fn left(&self) -> u64 {
        self.runs.iter().map(|run| run.count).sum()
    }
}

impl Engine {
    /// A cluster, and whether it reads as zeros. `None` if one can be had only later.
    pub(super) fn allocate(&mut self) -> Option<(u64, bool)> {
        if let Some(kept) = self.alloc.pool.pop_front() {
            return Some(kept);
        }
        let taken = self.alloc.runs.front_mut().map(|run| {
            let cluster = run.start;
            run.start += 1;
            run.count -= 1;
            (cluster, run.zeroed)
        });
        if self.alloc.runs.front().is_some_and(|run| run.count == 0) {
            self.alloc.runs.pop_front();
        }
        if self.alloc.left() <= self.alloc.target / 4 {
            self.reserve();
        }
        taken
    }

    pub(super) fn wait_for_clusters(&mut self, piece: Piece) {
        self.alloc.wait(Waiter::Piece(piece));
        self.reserve();
    }

    /// Begins a reservation, unless one is being made.
    pub(super) fn reserve(&mut self) {
        if self.alloc.reserving.is_some() {
            return;
        }
        let row = self.alloc.waiting.iter().find_map(|waiter| match waiter {
            Waiter::Row(count) => Some((*count, self.alloc.cursor)),
            _ => None,
        });
        self.alloc.reserving = Some(Reservation { row, ..Reservation::default() });
        self.reserve_more();
    }

    /// Goes on with a reservation whose clusters are not chosen yet.
    pub(super) fn reserve_more(&mut self) {
        let per_block = self.layout.refcounts_per_block();
        loop {
            let row = self.alloc.reserving.as_ref().and_then(|reservation| reservation.row);
            let cursor = row.map_or(self.alloc.cursor, |(_, cursor)| cursor);
            let beyond = cursor >= 1 << (HOST_BITS - self.layout.cluster_bits);
            // A row does not reach from one block to the next, and a new block holds itself.
            let too_long = row.is_some_and(|(count, _)| count >= per_block);
            if self.alloc.broken || self.alloc.closing || beyond || too_long {
                return self.reserved(false);
            }
            let block = cursor / per_block;
            if !self.refcounts.exists(block) {
                return self.make_refcount_block(block);
            }
            let order = self.layout.refcount_order;
            let Some(bytes) = self.refcount_block(block) else { return };
            let free = |index: &u64| refcount::get(bytes, order, *index as usize) == 0;
            let found = (cursor % per_block..per_block).filter(free).map(|index| block * per_block + index);
            let found: Vec<_> = found.collect();
            let (runs, next) = match row {
                None => self.choose(found, self.alloc.target),
                Some((count, _)) => (self.choose_row(found, count), (block + 1) * per_block),
            };
            let next = if runs.is_empty() { (block + 1) * per_block } else { next };
            match self.alloc.reserving.as_mut().and_then(|reservation| reservation.row.as_mut()) {
                Some((_, cursor)) => *cursor = next,
                None => self.alloc.cursor = next,
            }
            if !runs.is_empty() {
                return self.write_reservation(block, runs);
            }
        }
    }

    fn write_reservation(&mut self, block: u64, runs: Vec<Run>) {
        for run in &runs {
            self.set_refcounts(block, run.start % self.layout.refcounts_per_block(), run.count);
            self.alloc.used_up_to(run.start + run.count);
        }
        let end = runs.last().map_or(0, |run| run.start + run.count);
        // Whoever finds a mapping in the file after a crash finds its cluster in the file too.
        let longer = end > self.alloc.file_end;
        if let Some(reservation) = &mut self.alloc.reserving {
            reservation.runs = runs;
            reservation.writes = 1 + usize::from(longer);
        }
        if longer {
            self.alloc.file_end = end;
            let bytes = end << self.layout.cluster_bits;
            self.command(Io::Extend, |io| Command::Extend { io, bytes });
        }
        self.write_refcount_block(block, true);
    }

    /// The first `count` in a row among the free clusters found.
    fn choose_row(&self, found: Vec<u64>, count: u64) -> Vec<Run> {
        let usable = |cluster: &u64| *cluster != 0 && !self.alloc.metadata.contains(cluster);
        let found: Vec<_> = found.into_iter().filter(usable).collect();
        let row = found.windows(count as usize).find(|row| row[row.len() - 1] - row[0] == count - 1);
        row.map(|row| Run { start: row[0], count, zeroed: false }).into_iter().collect()
    }

    /// Up to `target` of the free clusters found, in runs; and where the search goes on.
    fn choose(&self, found: Vec<u64>, target: u64) -> (Vec<Run>, u64) {
        let mut runs: Vec<Run> = Vec::new();
        let (mut left, mut next) = (target, self.alloc.cursor);
        for cluster in found {
            if left == 0 {
                break;
            }
            // Refcounts that do not count metadata are wrong: nothing may be written there.
            if cluster == 0 || self.alloc.metadata.contains(&cluster) {
                continue;
            }
            let zeroed = cluster >= self.alloc.fresh_from && self.environment.fresh_is_zero;
            let full = runs.len() == RUNS_MAX;
            match runs.last_mut() {
                Some(run) if run.start + run.count == cluster && run.zeroed == zeroed => run.count += 1,
                _ if full => break,
                _ => runs.push(Run { start: cluster, count: 1, zeroed }),
            }
            (left, next) = (left - 1, cluster + 1);
        }
        (runs, next)
    }

    /// A part of a reservation is in the file, or is not.
    pub(super) fn reservation_written(&mut self, ok: bool) {
        let Some(reservation) = &mut self.alloc.reserving else { return };
        reservation.writes -= 1;
        reservation.failed |= !ok;
        if reservation.writes > 0 {
            return;
        }
        if reservation.failed {
            // How long the file is now is not known.
            self.alloc.file_end = 0;
            return self.reserved(false);
        }
        self.after_barrier(Then::Reserved);
    }

    /// A reservation is durable, or failed.
    pub(super) fn reserved(&mut self, ok: bool) {
        let Reservation { runs, row, .. } = self.alloc.reserving.take().unwrap_or_default();
        if row.is_some() {
            self.alloc.waiting.retain(|waiter| !matches!(waiter, Waiter::Row(_)));
            self.row_reserved(runs.first().map(|run| run.start).filter(|_| ok));
            if !self.alloc.waiting.is_empty() {
                self.reserve();
            }
            return;
        }
        if ok {
            self.alloc.runs.extend(runs);
            self.alloc.target = (self.alloc.target * 2).min(self.alloc.target_max);
        }
        let (rows, waiting): (Vec<_>, Vec<_>) = std::mem::take(&mut self.alloc.waiting)
            .into_iter()
            .partition(|waiter| matches!(waiter, Waiter::Row(_)));
        self.alloc.waiting = rows;
        for waiter in waiting {
            match waiter {
                Waiter::Piece(piece) if ok => self.restart.push_back(piece),
                Waiter::Piece(piece) => self.fail(piece),
                Waiter::Table(l1_index) if ok => self.place_table(l1_index),
                Waiter::Table(l1_index) => self.fail_table(l1_index),
                Waiter::Row(_) => {}
            }
        }
        if !self.alloc.waiting.is_empty() {
            self.reserve();
        }
    }

    /// No cluster is allocated from now on: what the file says of refcounts is not known any more.
    pub(super) fn refcounts_broken(&mut self) {
        self.alloc.broken = true;
    }

    /// Gives back what was reserved and not used, before an orderly end. The file is as it should be when no command is
    /// under way any more and a barrier has followed.
    pub fn close(&mut self) {
        self.alloc.closing = true;
        let runs: Vec<_> = self.alloc.runs.drain(..).collect();
        let unused = runs.into_iter().flat_map(|run| run.start..run.start + run.count);
        let kept: Vec<_> = self.alloc.pool.drain(..).map(|(cluster, _)| cluster).collect();
        for cluster in unused.chain(kept).collect::<Vec<_>>() {
            self.decrease(cluster);
        }
        self.run();
    }

    /// Clusters may be allocated again, after all.
    pub fn reopen(&mut self) {
        self.alloc.closing = false;
        self.run();
    }
}

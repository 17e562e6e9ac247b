//! L2 tables: made where there is none, copied where a snapshot shares it. A table is durable before the L1 entry that
//! names it is written.

use std::collections::HashMap;

use super::alloc::Waiter;
use super::barrier::Then;
use super::pending::Freed;
use super::piece::Piece;
use super::{Engine, Io, to_bytes, to_words};
use crate::entry::L1Entry;

/// Unit in which the L1 table and the refcount table are written, in bytes.
pub(super) const SECTOR_BYTES: u64 = 512;
/// Entries in one.
const SECTOR_ENTRIES: u64 = SECTOR_BYTES / 8;

/// An L2 table that is being made.
#[derive(Debug)]
struct Job {
    /// Its host cluster; `None` while there is none.
    cluster: Option<u64>,
    /// Its content; `None` while that is not read.
    words: Option<Vec<u64>>,
    waiting: Vec<Piece>,
}

/// The L2 tables that are being made, and the L1 table.
#[derive(Debug, Default)]
pub(super) struct Tables {
    jobs: HashMap<u64, Job>,
    /// L1 entries to be written: index, host cluster.
    ready: Vec<(u64, u64)>,
    writing: Vec<(u64, u64)>,
    /// Which L1 table the header names is not known: its entries are not changed any more.
    broken: bool,
}

impl Tables {
    pub(super) fn is_broken(&self) -> bool {
        self.broken
    }

    pub(super) fn set_broken(&mut self) {
        self.broken = true;
    }

    pub(super) fn is_writing_l1(&self) -> bool {
        !self.writing.is_empty()
    }

    /// Takes those that would be written next.
    pub(super) fn waiting_for_l1(&mut self) -> Vec<u64> {
        self.ready.drain(..).map(|(l1_index, _)| l1_index).collect()
    }
}

impl Engine {
    /// `piece` goes on when the L1 entry names a table of the image's own.
    pub(super) fn make_table(&mut self, l1_index: u64, piece: Piece) {
        if self.tables.broken {
            return self.fail(piece);
        }
        if let Some(job) = self.tables.jobs.get_mut(&l1_index) {
            return job.waiting.push(piece);
        }
        let old = self.map.l1(l1_index).table();
        let words =
            if old.is_some() { None } else { Some(vec![0; self.layout.cluster_bytes() as usize / 8]) };
        self.tables.jobs.insert(l1_index, Job { cluster: None, words, waiting: vec![piece] });
        if let Some(old) = old {
            self.read(Io::TableRead { l1_index }, old, self.layout.cluster_bytes());
        }
        self.place_table(l1_index);
    }

    /// Looks for a cluster for a table.
    pub(super) fn place_table(&mut self, l1_index: u64) {
        if !self.tables.jobs.contains_key(&l1_index) {
            return;
        }
        match self.allocate() {
            None => {
                self.alloc.wait(Waiter::Table(l1_index));
                // The one that was tried just now may have failed at once, before anybody waited for it.
                self.reserve();
            }
            Some((cluster, _)) => {
                if let Some(job) = self.tables.jobs.get_mut(&l1_index) {
                    job.cluster = Some(cluster);
                }
                self.write_table(l1_index);
            }
        }
    }

    pub(super) fn table_read(&mut self, l1_index: u64, ok: bool, data: &[u8]) {
        if !ok {
            return self.fail_table(l1_index);
        }
        if let Some(job) = self.tables.jobs.get_mut(&l1_index) {
            job.words = Some(to_words(data));
            self.write_table(l1_index);
        }
    }

    /// Writes a table that has a place and a content.
    fn write_table(&mut self, l1_index: u64) {
        let Some(Job { cluster: Some(cluster), words: Some(words), .. }) = self.tables.jobs.get(&l1_index)
        else {
            return;
        };
        let (offset, data) = (cluster << self.layout.cluster_bits, to_bytes(words));
        self.write_metadata(Io::TableWrite { l1_index }, offset, data);
    }

    pub(super) fn table_written(&mut self, l1_index: u64, ok: bool) {
        if ok {
            self.after_barrier(Then::Table { l1_index });
        } else {
            self.fail_table(l1_index);
        }
    }

    pub(super) fn table_durable(&mut self, l1_index: u64, ok: bool) {
        match self.tables.jobs.get(&l1_index) {
            Some(Job { cluster: Some(cluster), .. }) if ok && !self.tables.broken => {
                self.tables.ready.push((l1_index, *cluster))
            }
            _ => self.fail_table(l1_index),
        }
    }

    /// Writes L1 entries, those of one sector at a time.
    pub(super) fn write_l1(&mut self) {
        if self.tables.is_writing_l1() || self.tables.ready.is_empty() || self.l1_is_frozen() {
            return;
        }
        let sector = self.tables.ready[0].0 / SECTOR_ENTRIES;
        let (now, later) = std::mem::take(&mut self.tables.ready)
            .into_iter()
            .partition(|(index, _)| index / SECTOR_ENTRIES == sector);
        (self.tables.writing, self.tables.ready) = (now, later);
        let first = sector * SECTOR_ENTRIES;
        let mut words: Vec<_> = (first..first + SECTOR_ENTRIES).map(|index| self.map.l1(index).0).collect();
        for (index, cluster) in &self.tables.writing {
            words[(index - first) as usize] = L1Entry::owned(cluster << self.layout.cluster_bits).0;
        }
        let offset = self.header.l1_offset + sector * SECTOR_BYTES;
        self.write_metadata(Io::L1Write, offset, to_bytes(&words));
    }

    pub(super) fn l1_written(&mut self, ok: bool) {
        for (l1_index, cluster) in std::mem::take(&mut self.tables.writing) {
            if !ok {
                self.fail_table(l1_index);
                continue;
            }
            let old = self.map.l1(l1_index).table();
            self.map.set_l1(l1_index, L1Entry::owned(cluster << self.layout.cluster_bits));
            self.alloc.is_metadata(cluster);
            if let Some(old) = old {
                self.free(Freed::Shared { first: old >> self.layout.cluster_bits, count: 1 });
            }
            let Some(job) = self.tables.jobs.remove(&l1_index) else { continue };
            let words = job.words.unwrap_or_default();
            let per_slice = self.layout.slice_bytes() as usize / 8;
            for piece in job.waiting {
                // What was just written need not be read.
                let slice = self.map.slice_of(piece.guest_offset());
                let at = (slice * per_slice as u64) as usize % words.len().max(1);
                if let Some(words) = words.get(at..at + per_slice)
                    && !self.map.has(slice)
                {
                    self.fill_slice(slice, words);
                }
                self.restart.push_back(piece);
            }
        }
    }

    /// The table does not come to be. Its cluster is never used again: an L1 entry in the file may name it.
    pub(super) fn fail_table(&mut self, l1_index: u64) {
        if let Some(job) = self.tables.jobs.remove(&l1_index) {
            for piece in job.waiting {
                self.fail(piece);
            }
        }
    }
}

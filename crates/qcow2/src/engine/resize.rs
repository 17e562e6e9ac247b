//! A larger disk: an L1 table with room for it, then the size in the header.

use super::alloc::Waiter;
use super::barrier::Then;
use super::head::HeaderChange;
use super::pending::Freed;
use super::{Engine, Io, Reply, Ticket, to_bytes};
use crate::header::{Header, L1_BYTES_MAX};

/// An L1 table that is being moved.
#[derive(Debug)]
pub(super) struct Move {
    ticket: Ticket,
    entries: u64,
    /// Its new place, once that is reserved: a cluster.
    to: Option<u64>,
    /// Its content is on its way there: entries may not change.
    copying: bool,
}

impl Engine {
    /// The tables are to have room for a disk of `bytes` bytes. Answered by `Done` or `Failed`.
    pub fn make_room(&mut self, ticket: Ticket, bytes: u64) {
        let entries = self.layout.l1_entries(bytes);
        if entries <= self.header.l1_entries {
            self.reply(ticket, Reply::Done);
        } else if entries * 8 > L1_BYTES_MAX || self.moving.is_some() || self.tables.is_broken() {
            self.reply(ticket, Reply::Failed);
        } else {
            self.moving = Some(Move { ticket, entries, to: None, copying: false });
            self.reserve_row(self.layout.clusters(entries * 8));
        }
        self.run();
    }

    /// The disk is to have `bytes` bytes, for which there is room. What the tables map there is what the guest will read:
    /// where a backing file reaches beyond the old end, the caller has zeroed it, and so has it what a smaller disk does not
    /// show any more. Answered by `Done`, when the size is durable, or `Failed`.
    pub fn set_size(&mut self, ticket: Ticket, bytes: u64) {
        if self.layout.l1_entries(bytes) > self.header.l1_entries {
            self.reply(ticket, Reply::Failed);
        } else {
            // What hides the backing file must not come after the size.
            self.after_barrier(Then::Size { bytes, ticket });
        }
        self.run();
    }

    pub(super) fn size_may_change(&mut self, bytes: u64, ticket: Ticket, ok: bool) {
        if ok {
            self.change_header(HeaderChange::Size { bytes, ticket });
        } else {
            self.reply(ticket, Reply::Failed);
        }
    }

    /// The clusters for the L1 table are reserved, or cannot be had.
    pub(super) fn row_reserved(&mut self, first: Option<u64>) {
        match (&mut self.moving, first) {
            (Some(moving), Some(first)) => moving.to = Some(first),
            _ => self.end_move(false),
        }
    }

    /// Whether entries of the L1 table must stay as they are.
    pub(super) fn l1_is_frozen(&self) -> bool {
        self.moving.as_ref().is_some_and(|moving| moving.to.is_some())
    }

    /// Copies the L1 table once no entry of it is being written.
    pub(super) fn copy_l1(&mut self) {
        let writing = self.tables.is_writing_l1();
        let Some(moving) = &mut self.moving else { return };
        let Some(to) = moving.to.filter(|_| !moving.copying && !writing) else { return };
        moving.copying = true;
        let bytes = self.layout.clusters(moving.entries * 8) << self.layout.cluster_bits;
        let mut words: Vec<_> = (0..moving.entries).map(|index| self.map.l1(index).0).collect();
        words.resize(bytes as usize / 8, 0);
        self.write_metadata(Io::L1Copy, to << self.layout.cluster_bits, to_bytes(&words));
    }

    pub(super) fn l1_copied(&mut self, ok: bool) {
        if ok {
            self.after_barrier(Then::L1Copy);
        } else {
            self.end_move(false);
        }
    }

    pub(super) fn l1_copy_durable(&mut self, ok: bool) {
        match &self.moving {
            Some(Move { entries, to: Some(to), .. }) if ok => {
                let (offset, entries) = (to << self.layout.cluster_bits, *entries);
                self.change_header(HeaderChange::L1 { offset, entries });
            }
            _ => self.end_move(false),
        }
    }

    /// The header names the new L1 table; or nobody knows which it names.
    pub(super) fn l1_moved(&mut self, ok: bool, old: &Header) {
        if ok {
            let first = old.l1_offset >> self.layout.cluster_bits;
            for cluster in first..first + self.layout.clusters(old.l1_entries * 8) {
                self.alloc.no_metadata(cluster);
                self.free(Freed::Owned { first: cluster });
            }
            let first = self.header.l1_offset >> self.layout.cluster_bits;
            for cluster in first..first + self.layout.clusters(self.header.l1_entries * 8) {
                self.alloc.is_metadata(cluster);
            }
        } else {
            self.tables.set_broken();
            for l1_index in self.tables.waiting_for_l1() {
                self.fail_table(l1_index);
            }
        }
        self.end_move(ok);
    }

    fn end_move(&mut self, ok: bool) {
        if let Some(Move { ticket, .. }) = self.moving.take() {
            self.reply(ticket, if ok { Reply::Done } else { Reply::Failed });
        }
    }

    /// Reserves `count` clusters in a row.
    fn reserve_row(&mut self, count: u64) {
        self.alloc.wait(Waiter::Row(count));
        self.reserve();
    }
}

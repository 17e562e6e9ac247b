//! Barriers: at most one is under way, and everything that asks meanwhile shares the next.

use super::slices::Change;
use super::{Command, Engine, Io, Ticket};

/// What goes on when a barrier is over.
#[derive(Debug)]
pub(super) enum Then {
    /// A mapping whose data are durable now.
    Map(Change),
    /// An L2 table whose content is durable now.
    Table { l1_index: u64 },
    /// Clusters whose refcounts are durable now.
    Reserved,
    /// A step of growing the refcount structures.
    RefcountsGrow,
    /// A copy of the L1 table.
    L1Copy,
    /// Everything that a larger disk shows.
    Size { bytes: u64, ticket: Ticket },
    /// A changed header.
    Header,
    /// Clusters whose references are durably gone.
    Limbo { upto: u64 },
}

/// The barriers of an image file.
#[derive(Debug, Default)]
pub(super) struct Barrier {
    under_way: Option<Vec<Then>>,
    next: Vec<Then>,
}

impl Engine {
    /// `then` goes on after a barrier that begins now or later.
    pub(super) fn after_barrier(&mut self, then: Then) {
        self.barrier.next.push(then);
    }

    pub(super) fn start_barrier(&mut self) {
        if self.barrier.under_way.is_none() && !self.barrier.next.is_empty() {
            self.barrier.under_way = Some(std::mem::take(&mut self.barrier.next));
            self.command(Io::Sync, |io| Command::Sync { io });
        }
    }

    pub(super) fn synced(&mut self, ok: bool) {
        for then in self.barrier.under_way.take().into_iter().flatten() {
            match then {
                Then::Map(change) if ok => self.map_cluster(change),
                Then::Map(change) => self.never_mapped(change),
                Then::Table { l1_index } => self.table_durable(l1_index, ok),
                Then::Reserved => self.reserved(ok),
                Then::RefcountsGrow => self.refcounts_grow_durable(ok),
                Then::L1Copy => self.l1_copy_durable(ok),
                Then::Size { bytes, ticket } => self.size_may_change(bytes, ticket, ok),
                Then::Header => self.header_durable(ok),
                Then::Limbo { upto } => self.limbo_durable(upto, ok),
            }
        }
    }
}

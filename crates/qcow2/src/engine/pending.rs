//! Clusters whose mapping is about to change: data and copies on their way to the host cluster, then the entry.
//!
//! The first write to a cluster decides where it goes and fills what it does not cover. Others that come meanwhile join
//! it once the filling is over, and are answered when their data and the entry are in the file.

use super::barrier::Then;
use super::piece::Piece;
use super::slices::Change;
use super::{Command, Engine, GrantId, Io, Reply, Ticket};
use crate::entry::L2Entry;

/// Contents of a part of a cluster that no write brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// What the guest reads there now.
    Guest,
    /// Zeros, over whatever the host cluster held.
    Zeros,
}

/// A part of a cluster to be filled.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fill {
    /// Offset in the cluster in bytes.
    pub(super) within: u64,
    pub(super) len: u64,
    pub(super) source: Source,
}

/// Clusters that an entry held and no longer does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Freed {
    Nothing,
    /// One whose refcount was one.
    Owned {
        first: u64,
    },
    /// Some whose refcounts go down.
    Shared {
        first: u64,
        count: u64,
    },
}

/// How a write to a cluster is carried out.
#[derive(Debug)]
pub(super) struct Plan {
    /// The new entry.
    pub(super) entry: L2Entry,
    /// Offset of the host cluster in bytes.
    pub(super) host: u64,
    /// The same, if it was allocated for this.
    pub(super) allocated: Option<u64>,
    /// The range of the cluster, in bytes, that is data when this is done and may be written meanwhile.
    pub(super) covered: (u64, u64),
    pub(super) fills: Vec<Fill>,
    /// Where data do not get before a crash, the entry would show something else than was there: they must be durable
    /// before it is written.
    pub(super) barrier: bool,
    pub(super) freed: Freed,
}

/// A cluster whose mapping is about to change.
#[derive(Debug)]
pub(super) struct Pending {
    entry: L2Entry,
    host: u64,
    allocated: Option<u64>,
    covered: (u64, u64),
    freed: Freed,
    /// Copies, and the first write, that are not over.
    filling: usize,
    /// See [`Plan`].
    barrier: bool,
    failed: bool,
    /// Copies are under way: other writes wait.
    copying: bool,
    /// Answered when the entry is written.
    answers: Vec<Ticket>,
    /// Looked at again when this is over.
    waiting: Vec<Piece>,
    /// Requests that zero several clusters: answered when the last of these is done.
    group: Option<u64>,
}

/// Data on their way to a cluster whose mapping is about to change.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grant {
    ticket: Ticket,
    cluster: u64,
    /// The write that the cluster was allocated for.
    first: bool,
    /// Which change of the cluster's mapping it belongs to.
    host: u64,
}

impl Engine {
    /// Begins the first write to a cluster.
    pub(super) fn begin_write(&mut self, cluster: u64, plan: Plan, piece: Piece) {
        let Piece::Write { ticket, guest_offset, .. } = piece else { return };
        self.pin_slice(cluster / self.layout.slice_entries());
        let Plan { entry, host, allocated, covered, fills, barrier, freed } = plan;
        let pending = Pending {
            entry,
            host,
            allocated,
            covered,
            freed,
            filling: 1 + fills.len(),
            barrier,
            failed: false,
            copying: !fills.is_empty(),
            answers: Vec::new(),
            waiting: Vec::new(),
            group: None,
        };
        self.pending.insert(cluster, pending);
        for Fill { within, len, source } in fills {
            let guest_offset = (cluster << self.layout.cluster_bits) + within;
            let (to, zero) = (host + within, source == Source::Zeros);
            self.command(Io::Copy { cluster }, |io| Command::Copy { io, guest_offset, len, to, zero });
        }
        self.grant(ticket, cluster, host, self.layout.in_cluster(guest_offset), true);
    }

    fn grant(&mut self, ticket: Ticket, cluster: u64, host: u64, within: u64, first: bool) {
        let grant = self.id();
        self.grants.insert(grant, Grant { ticket, cluster, first, host });
        self.reply(ticket, Reply::Write { grant, offset: host + within });
    }

    /// Another write to a cluster whose mapping is about to change.
    pub(super) fn join(&mut self, cluster: u64, within: u64, len: u64, piece: Piece) {
        let Some(pending) = self.pending.get_mut(&cluster) else { return };
        let covered = pending.covered.0 <= within && within + len <= pending.covered.1;
        if covered && !pending.copying && !pending.failed {
            let host = pending.host;
            self.grant(piece.ticket(), cluster, host, within, false);
        } else {
            pending.waiting.push(piece);
        }
    }

    pub(super) fn wait_for_cluster(&mut self, cluster: u64, piece: Piece) {
        match self.pending.get_mut(&cluster) {
            Some(pending) => pending.waiting.push(piece),
            None => self.restart.push_back(piece),
        }
    }

    /// A copy into a cluster is over.
    pub(super) fn copied(&mut self, cluster: u64, ok: bool) {
        if let Some(pending) = self.pending.get_mut(&cluster) {
            pending.failed |= !ok;
        }
        self.filled(cluster);
    }

    /// A granted write is over.
    pub(super) fn data_written(&mut self, grant: GrantId, ok: bool) {
        let Some(Grant { ticket, cluster, first, host }) = self.grants.remove(&grant) else { return };
        match self.pending.get_mut(&cluster) {
            Some(pending) if pending.host == host && pending.filling > 0 && first => {
                pending.failed |= !ok;
                if ok {
                    pending.answers.push(ticket);
                } else {
                    self.reply(ticket, Reply::Failed);
                }
                self.filled(cluster);
            }
            Some(pending) if pending.host == host => {
                if ok {
                    pending.answers.push(ticket);
                } else {
                    self.reply(ticket, Reply::Failed);
                }
            }
            // The change is over. It may have failed: then the map does not show these data.
            _ if ok => self.reply(ticket, self.joined_late(cluster, host)),
            _ => self.reply(ticket, Reply::Failed),
        }
    }

    /// The answer for a write that ended after the change that it had joined.
    fn joined_late(&self, cluster: u64, host: u64) -> Reply {
        let entries = self.layout.slice_entries();
        match self.map.entry(cluster / entries, cluster % entries) {
            Some(entry) if entry.host_cluster(&self.layout) == Some(host) => Reply::Done,
            // Discarded since, out of the map since, or never mapped: the write begins anew.
            _ => Reply::Retry,
        }
    }

    /// One of the things that a cluster waited for is over.
    fn filled(&mut self, cluster: u64) {
        let Some(pending) = self.pending.get_mut(&cluster) else { return };
        pending.filling = pending.filling.saturating_sub(1);
        if pending.filling > 0 {
            return;
        }
        let change = Change { cluster, entry: pending.entry };
        if pending.failed {
            return self.never_mapped(change);
        }
        if pending.copying {
            pending.copying = false;
            self.restart.extend(pending.waiting.drain(..));
        }
        if pending.barrier {
            self.after_barrier(Then::Map(change));
        } else {
            self.map_cluster(change);
        }
    }

    /// Zeroes or frees clusters, whose slice is in the map.
    pub(super) fn begin_zero(&mut self, ticket: Ticket, changes: Vec<(u64, L2Entry, Freed)>) {
        if changes.is_empty() {
            return self.reply(ticket, Reply::Done);
        }
        let group = self.id();
        self.zeroing.insert(group, (ticket, changes.len(), true));
        for (cluster, entry, freed) in changes {
            self.pin_slice(cluster / self.layout.slice_entries());
            let pending = Pending {
                entry,
                host: 0,
                allocated: None,
                covered: (0, 0),
                freed,
                filling: 0,
                barrier: false,
                failed: false,
                copying: false,
                answers: Vec::new(),
                waiting: Vec::new(),
                group: Some(group),
            };
            self.pending.insert(cluster, pending);
            self.map_cluster(Change { cluster, entry });
        }
    }

    /// The entry is in the file and in the map.
    pub(super) fn mapped(&mut self, change: &Change) {
        if let Some(pending) = self.end_pending(change.cluster, true) {
            self.free(pending.freed);
            for ticket in pending.answers {
                self.reply(ticket, Reply::Done);
            }
        }
    }

    /// The entry was not written: its host cluster is free again, once those are done that had joined.
    pub(super) fn never_mapped(&mut self, change: Change) {
        if let Some(pending) = self.fail_pending(change)
            && let Some(first) = pending.allocated
        {
            self.free(Freed::Owned { first });
        }
    }

    /// The entry may be in the file or not. The host cluster is never used again: the entry may map it.
    pub(super) fn not_mapped(&mut self, change: Change) {
        self.fail_pending(change);
    }

    fn fail_pending(&mut self, change: Change) -> Option<Pending> {
        let mut pending = self.end_pending(change.cluster, false)?;
        for ticket in pending.answers.drain(..) {
            self.reply(ticket, Reply::Failed);
        }
        Some(pending)
    }

    fn end_pending(&mut self, cluster: u64, ok: bool) -> Option<Pending> {
        let mut pending = self.pending.remove(&cluster)?;
        self.restart.extend(pending.waiting.drain(..));
        if let Some(group) = pending.group
            && let Some((ticket, left, all)) = self.zeroing.get_mut(&group)
        {
            *left -= 1;
            *all &= ok;
            if *left == 0 {
                let reply = if *all { Reply::Done } else { Reply::Failed };
                let ticket = *ticket;
                self.zeroing.remove(&group);
                self.reply(ticket, reply);
            }
        }
        self.unpin_slice(cluster / self.layout.slice_entries());
        Some(pending)
    }
}

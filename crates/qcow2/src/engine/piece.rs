//! Pieces of requests: what each needs from the tables as they are, decided anew whenever something it waited for has
//! changed.

use super::pending::{Fill, Freed, Plan, Source};
use super::{Engine, Reply, Ticket};
use crate::entry::{L2Entry, Mapping};

/// A piece of a request.
#[derive(Clone, Copy, Debug)]
pub(super) enum Piece {
    /// See `Engine::load`.
    Load { ticket: Ticket, guest_offset: u64 },
    /// See `Engine::write`.
    Write { ticket: Ticket, guest_offset: u64, len: u64 },
    /// See `Engine::write_zeroes` and `Engine::discard`.
    Zero { ticket: Ticket, guest_offset: u64, len: u64, unmap: bool, discard: bool },
}

impl Piece {
    pub(super) const fn ticket(&self) -> Ticket {
        match *self {
            Self::Load { ticket, .. } | Self::Write { ticket, .. } | Self::Zero { ticket, .. } => ticket,
        }
    }

    pub(super) const fn guest_offset(&self) -> u64 {
        match *self {
            Self::Load { guest_offset, .. }
            | Self::Write { guest_offset, .. }
            | Self::Zero { guest_offset, .. } => guest_offset,
        }
    }
}

/// What becomes of one cluster of a piece that zeroes or discards.
enum Zeroed {
    /// It need not change.
    Stays,
    /// There is no entry that says so.
    NeedsData,
    /// A new entry, and what the old one held.
    Becomes(L2Entry, Freed),
}

impl Engine {
    pub(super) fn fail(&mut self, piece: Piece) {
        self.reply(piece.ticket(), Reply::Failed);
    }

    /// Does for a piece what can be done now.
    pub(super) fn start(&mut self, piece: Piece) {
        let offset = piece.guest_offset();
        let l1_index = self.layout.l1_index(offset);
        if l1_index >= self.header.l1_entries {
            return self.fail(piece);
        }
        let table = self.map.l1(l1_index);
        if !table.is_valid(&self.layout) {
            return self.fail(piece);
        }
        let changes = !matches!(piece, Piece::Load { .. });
        if changes && !(table.table().is_some() && table.is_owned()) {
            if table.table().is_none() && self.zeroes_nothing(&piece) {
                return self.reply(piece.ticket(), Reply::Done);
            }
            return self.make_table(l1_index, piece);
        }
        let slice = self.map.slice_of(offset);
        if table.table().is_some() && !self.map.has(slice) {
            return self.load_slice(slice, piece);
        }
        if self.waits_for_repair(slice, piece) {
            return;
        }
        match piece {
            Piece::Load { ticket, .. } => self.reply(ticket, Reply::Retry),
            Piece::Write { ticket, guest_offset, len } => self.start_write(ticket, guest_offset, len),
            Piece::Zero { .. } => self.start_zero(piece),
        }
    }

    /// The entry of a guest cluster whose slice is in the map.
    fn entry(&self, cluster: u64) -> L2Entry {
        let entries = self.layout.slice_entries();
        self.map.entry(cluster / entries, cluster % entries).unwrap_or(L2Entry::UNALLOCATED)
    }

    fn start_write(&mut self, ticket: Ticket, guest_offset: u64, len: u64) {
        let piece = Piece::Write { ticket, guest_offset, len };
        let cluster = guest_offset >> self.layout.cluster_bits;
        let within = self.layout.in_cluster(guest_offset);
        if self.pending.contains_key(&cluster) {
            return self.join(cluster, within, len, piece);
        }
        let entry = self.entry(cluster);
        match entry.map(&self.layout, within) {
            (Mapping::Data { owned: true, .. }, alike) if alike >= len => {
                return self.reply(ticket, Reply::Retry);
            }
            (Mapping::Invalid, _) => return self.fail(piece),
            _ => {}
        }
        match self.plan_write(cluster, entry, within, len) {
            Some(plan) => self.begin_write(cluster, plan, piece),
            None => self.wait_for_clusters(piece),
        }
    }

    /// How to carry out a write to a cluster that is not simply there; `None` if no cluster can be had now.
    fn plan_write(&mut self, cluster: u64, entry: L2Entry, within: u64, len: u64) -> Option<Plan> {
        let layout = self.layout;
        let (host, fresh_zero, freed, allocated) = if self.header.has_data_file() {
            (cluster << layout.cluster_bits, false, Freed::Nothing, None)
        } else {
            match entry.host_cluster(&layout) {
                Some(host) if entry.is_owned() => (host, false, Freed::Nothing, None),
                _ => {
                    let (new, zeroed) = self.allocate()?;
                    (new << layout.cluster_bits, zeroed, self.held_by(entry), Some(new))
                }
            }
        };
        let moved = entry.host_cluster(&layout) != Some(host);
        // The part of the cluster that the new entry maps to the file: what is written, rounded up to what can be mapped,
        // and, where the cluster moves, what was mapped before.
        let unit = layout.subcluster_bytes();
        let (first, end) = (within / unit * unit, (within + len).next_multiple_of(unit));
        let mut fills = Vec::new();
        // What is mapped reads as it did before wherever the data did not get: nothing need be durable first.
        let mut harmless = fresh_zero;
        let mut new = L2Entry::data(host, &layout);
        if layout.extended && !entry.is_compressed() {
            let mask = (u64::MAX >> (64 - (end - first) / unit)) << (first / unit);
            new.subclusters = (entry.subclusters | mask) & !(mask << 32);
        }
        let mut at = 0;
        while at < layout.cluster_bytes() {
            let (mapping, alike) = entry.map(&layout, at);
            let mut stop = at + alike;
            for edge in [first, within, within + len, end] {
                if edge > at && edge < stop {
                    stop = edge;
                }
            }
            harmless &= match mapping {
                Mapping::Zero => true,
                Mapping::Unallocated => !self.environment.has_backing,
                _ => false,
            };
            let written = at >= within && at < within + len;
            let mapped = at >= first && at < end;
            let source = match mapping {
                _ if written => None,
                Mapping::Data { .. } => moved.then_some(Source::Guest),
                Mapping::Compressed(_) => Some(Source::Guest),
                _ if !mapped => None,
                Mapping::Unallocated if self.environment.has_backing => Some(Source::Guest),
                Mapping::Unallocated | Mapping::Zero => (!fresh_zero).then_some(Source::Zeros),
                Mapping::Invalid => None,
            };
            if let Some(source) = source {
                fills.push(Fill { within: at, len: stop - at, source });
            }
            at = stop;
        }
        join_fills(&mut fills);
        Some(Plan { entry: new, host, allocated, covered: (first, end), fills, barrier: !harmless, freed })
    }

    /// What an entry that goes away held.
    pub(super) fn held_by(&self, entry: L2Entry) -> Freed {
        if self.header.has_data_file() {
            return Freed::Nothing;
        }
        if entry.is_compressed() {
            let compressed = entry.compressed(&self.layout);
            let first = compressed.offset >> self.layout.cluster_bits;
            let last = (compressed.offset + compressed.len - 1) >> self.layout.cluster_bits;
            return Freed::Shared { first, count: last - first + 1 };
        }
        match entry.host_cluster(&self.layout) {
            None => Freed::Nothing,
            Some(host) => {
                let first = host >> self.layout.cluster_bits;
                if entry.is_owned() { Freed::Owned { first } } else { Freed::Shared { first, count: 1 } }
            }
        }
    }

    /// Zeroing where there is no table changes nothing.
    fn zeroes_nothing(&self, piece: &Piece) -> bool {
        match piece {
            Piece::Zero { .. } => !self.environment.has_backing,
            _ => false,
        }
    }

    fn start_zero(&mut self, piece: Piece) {
        let Piece::Zero { ticket, guest_offset, len, unmap, discard } = piece else { return };
        let clusters =
            guest_offset >> self.layout.cluster_bits..(guest_offset + len) >> self.layout.cluster_bits;
        if let Some(busy) = clusters.clone().find(|cluster| self.pending.contains_key(cluster)) {
            return self.wait_for_cluster(busy, piece);
        }
        let mut changes = Vec::new();
        for cluster in clusters {
            let entry = self.entry(cluster);
            if entry.map(&self.layout, 0).0 == Mapping::Invalid {
                return self.fail(piece);
            }
            match self.zeroed(entry, unmap, discard) {
                Zeroed::Stays => {}
                Zeroed::NeedsData => return self.reply(ticket, Reply::WriteZeros),
                Zeroed::Becomes(entry, freed) => changes.push((cluster, entry, freed)),
            }
        }
        self.begin_zero(ticket, changes);
    }

    fn zeroed(&self, entry: L2Entry, unmap: bool, discard: bool) -> Zeroed {
        let layout = self.layout;
        let v3 = self.header.version >= 3;
        if self.header.has_raw_data_file() {
            return if discard { Zeroed::Stays } else { Zeroed::NeedsData };
        }
        let hidden = if !self.environment.has_backing {
            L2Entry::UNALLOCATED
        } else if v3 {
            L2Entry::zero(None, &layout)
        } else {
            // Nothing hides the backing file in version 2.
            return if discard { Zeroed::Stays } else { Zeroed::NeedsData };
        };
        let keeps = !unmap && entry.host_cluster(&layout).is_some() && entry.is_owned();
        if keeps || (self.header.has_data_file() && entry.host_cluster(&layout).is_some()) {
            let kept = L2Entry::zero(entry.host_cluster(&layout), &layout);
            return match () {
                () if entry == kept => Zeroed::Stays,
                () if v3 => Zeroed::Becomes(kept, Freed::Nothing),
                () => Zeroed::NeedsData,
            };
        }
        let reads_zero = entry.host_cluster(&layout).is_none()
            && !entry.is_compressed()
            && matches!(entry.map(&layout, 0), (Mapping::Zero, len) if len == layout.cluster_bytes());
        if entry == hidden || reads_zero {
            return Zeroed::Stays;
        }
        Zeroed::Becomes(hidden, self.held_by(entry))
    }
}

/// Neighbours that are filled from the same place become one.
fn join_fills(fills: &mut Vec<Fill>) {
    let mut joined: Vec<Fill> = Vec::with_capacity(fills.len());
    for fill in fills.drain(..) {
        match joined.last_mut() {
            Some(last) if last.source == fill.source && last.within + last.len == fill.within => {
                last.len += fill.len;
            }
            _ => joined.push(fill),
        }
    }
    *fills = joined;
}

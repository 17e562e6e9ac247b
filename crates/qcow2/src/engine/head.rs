//! Changes of the header: one write at a time, with everything that asked meanwhile. A change counts when it is durable.

use super::barrier::Then;
use super::{Engine, Io, Reply, Ticket};
use crate::header::Header;

/// A change of the header.
#[derive(Clone, Copy, Debug)]
pub(super) enum HeaderChange {
    /// The refcount table has moved: offset in bytes, clusters.
    RefcountTable { offset: u64, clusters: u64 },
    /// The L1 table has moved: offset in bytes, entries.
    L1 { offset: u64, entries: u64 },
    /// The disk's size in bytes, and who wants it.
    Size { bytes: u64, ticket: Ticket },
}

/// The header that is being written.
#[derive(Debug)]
struct Writing {
    header: Header,
    sector: Vec<u8>,
    changes: Vec<HeaderChange>,
}

/// Changes of the header under way.
#[derive(Debug, Default)]
pub(super) struct Head {
    next: Vec<HeaderChange>,
    writing: Option<Writing>,
}

impl Engine {
    pub(super) fn change_header(&mut self, change: HeaderChange) {
        self.head.next.push(change);
        self.write_header();
    }

    fn write_header(&mut self) {
        if self.head.writing.is_some() || self.head.next.is_empty() {
            return;
        }
        let changes = std::mem::take(&mut self.head.next);
        let (mut header, mut sector) = (self.header.clone(), self.header_sector.clone());
        for change in &changes {
            match *change {
                HeaderChange::RefcountTable { offset, clusters } => {
                    header.refcount_table_offset = offset;
                    header.refcount_table_clusters = clusters;
                }
                HeaderChange::L1 { offset, entries } => {
                    header.l1_offset = offset;
                    header.l1_entries = entries;
                }
                HeaderChange::Size { bytes, .. } => header.disk_bytes = bytes,
            }
        }
        header.update(&mut sector);
        self.write_metadata(Io::Header, 0, sector.clone());
        self.head.writing = Some(Writing { header, sector, changes });
    }

    pub(super) fn header_written(&mut self, ok: bool) {
        if ok {
            self.after_barrier(Then::Header);
        } else {
            self.header_durable(false);
        }
    }

    pub(super) fn header_durable(&mut self, ok: bool) {
        let Some(Writing { header, sector, changes }) = self.head.writing.take() else { return };
        let old = std::mem::replace(&mut self.header, header);
        if ok {
            self.header_sector = sector;
        } else {
            // Which of them the file has is not known: what would differ with it is not changed any more.
            self.header = old.clone();
        }
        for change in changes {
            match change {
                HeaderChange::RefcountTable { .. } => self.growth_named(ok, &old),
                HeaderChange::L1 { .. } => self.l1_moved(ok, &old),
                HeaderChange::Size { ticket, .. } => {
                    self.reply(ticket, if ok { Reply::Done } else { Reply::Failed });
                }
            }
        }
        self.write_header();
    }
}

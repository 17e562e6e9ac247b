//! L2 slices: loading them into the map, and writing changed entries, many at once.
//!
//! At most one write of a slice is under way. Changes that come meanwhile go with the next, so a burst of allocations
//! pays for one or two writes. An entry is visible to the threads when its write is over, not before: whoever saw it
//! could answer a request that a crash would undo.
//!
//! After a write that failed the file may have any of its entries, old or new. The threads do not see such a slice until
//! it was written again, with the old ones, since an entry that only memory has would be lost with the service.

use std::collections::HashMap;

use super::piece::Piece;
use super::{Engine, Io, to_bytes, to_words};
use crate::entry::L2Entry;

/// A new entry for a cluster.
#[derive(Debug)]
pub(super) struct Change {
    /// Guest cluster.
    pub(super) cluster: u64,
    pub(super) entry: L2Entry,
}

/// A slice that is being read or written.
#[derive(Debug, Default)]
struct Slice {
    /// Wait for it to be read.
    readers: Vec<Piece>,
    /// To be written.
    changes: Vec<Change>,
    /// Being written.
    writing: Vec<Change>,
    /// Clusters whose mapping is about to change.
    pins: usize,
    /// A write is under way, of changes or of what was there before.
    in_write: bool,
    /// The last write failed: it must be repeated before anything else.
    suspect: bool,
    /// It is being repeated; these wait.
    repairing: bool,
    repair: Vec<Piece>,
}

/// The slices that something is going on with.
#[derive(Debug, Default)]
pub(super) struct Slices {
    active: HashMap<u64, Slice>,
    /// Slices with changes.
    changed: Vec<u64>,
    /// Wait for a place in the map, all of which are taken by slices with changes.
    crowded: Vec<Piece>,
}

impl Engine {
    /// Offset of a slice in the file; `None` where there is no L2 table.
    fn slice_offset(&self, slice: u64) -> Option<u64> {
        let entry = slice * self.layout.slice_entries();
        let table = self.map.l1(entry / self.layout.l2_entries()).table()?;
        Some(table + entry % self.layout.l2_entries() * self.layout.l2_entry_bytes())
    }

    /// `piece` goes on when the slice is in the map.
    pub(super) fn load_slice(&mut self, slice: u64, piece: Piece) {
        let Some(offset) = self.slice_offset(slice) else {
            return self.restart.push_back(piece);
        };
        let readers = &mut self.slices.active.entry(slice).or_default().readers;
        readers.push(piece);
        if readers.len() == 1 {
            self.read(Io::SliceRead { slice, offset }, offset, self.layout.slice_bytes());
        }
    }

    pub(super) fn slice_read(&mut self, slice: u64, offset: u64, ok: bool, data: &[u8]) {
        let Some(active) = self.slices.active.get_mut(&slice) else { return };
        let readers = std::mem::take(&mut active.readers);
        // Its table may have been copied meanwhile, and changed since.
        let current = self.slice_offset(slice) == Some(offset) && !self.map.has(slice);
        self.let_slice_go(slice);
        if current && !ok {
            readers.into_iter().for_each(|piece| self.fail(piece));
        } else if !current || self.fill_slice(slice, &to_words(data)) {
            self.restart.extend(readers);
        } else {
            self.slices.crowded.extend(readers);
        }
    }

    /// Whether a piece must wait for a slice to be written again; it then goes on after that, or fails.
    pub(super) fn waits_for_repair(&mut self, slice: u64, piece: Piece) -> bool {
        let Some(active) = self.slices.active.get_mut(&slice).filter(|active| active.suspect) else {
            return false;
        };
        active.repair.push(piece);
        // What is being written now was written because of somebody before.
        if !active.in_write && !active.repairing {
            active.repairing = true;
            self.slices.changed.push(slice);
        }
        true
    }

    /// Puts a slice into the map; false if slices that must stay take all the room.
    pub(super) fn fill_slice(&mut self, slice: u64, words: &[u64]) -> bool {
        let slices = &self.slices.active;
        self.map.fill(slice, words, |other| slices.contains_key(&other))
    }

    /// Puts a new entry on its way to the file. The slice is in the map and stays there.
    pub(super) fn map_cluster(&mut self, change: Change) {
        let slice = change.cluster / self.layout.slice_entries();
        self.slices.active.entry(slice).or_default().changes.push(change);
        self.slices.changed.push(slice);
    }

    /// Keeps a slice in the map, once for each cluster whose mapping is about to change.
    pub(super) fn pin_slice(&mut self, slice: u64) {
        self.slices.active.entry(slice).or_default().pins += 1;
    }

    /// Writes the slices that have changes, unless they are being written.
    pub(super) fn write_slices(&mut self) {
        for slice in std::mem::take(&mut self.slices.changed) {
            let Some(active) = self.slices.active.get_mut(&slice) else { continue };
            let idle = active.writing.is_empty() && !active.in_write;
            if !idle || active.changes.is_empty() && !active.repairing {
                continue;
            }
            active.in_write = true;
            active.writing = std::mem::take(&mut active.changes);
            let (Some(mut words), Some(offset)) = (self.map.slice(slice), self.slice_offset(slice)) else {
                // Cannot be: a slice with changes is pinned, and tables are not taken away.
                self.slice_written(slice, false);
                continue;
            };
            let (entries, extended) = (self.layout.slice_entries(), self.layout.extended);
            for change in self.slices.active.get(&slice).into_iter().flat_map(|active| &active.writing) {
                let index = (change.cluster % entries) as usize;
                if extended {
                    words[index * 2] = change.entry.descriptor;
                    words[index * 2 + 1] = change.entry.subclusters;
                } else {
                    words[index] = change.entry.descriptor;
                }
            }
            self.write_metadata(Io::SliceWrite { slice }, offset, to_bytes(&words));
        }
    }

    pub(super) fn slice_written(&mut self, slice: u64, ok: bool) {
        let Some(active) = self.slices.active.get_mut(&slice) else { return };
        let written = std::mem::take(&mut active.writing);
        let repair = std::mem::take(&mut active.repair);
        active.in_write = false;
        active.repairing = false;
        active.suspect = !ok;
        if !active.changes.is_empty() {
            self.slices.changed.push(slice);
        }
        self.map.hide(slice, !ok);
        for piece in repair {
            if ok {
                self.restart.push_back(piece);
            } else {
                self.fail(piece);
            }
        }
        for change in written {
            if ok {
                let index = change.cluster % self.layout.slice_entries();
                self.map.publish(slice, index, change.entry);
                self.mapped(&change);
            } else {
                self.not_mapped(change);
            }
        }
        self.let_slice_go(slice);
    }

    /// Undoes one `pin_slice`.
    pub(super) fn unpin_slice(&mut self, slice: u64) {
        if let Some(active) = self.slices.active.get_mut(&slice) {
            active.pins = active.pins.saturating_sub(1);
        }
        self.let_slice_go(slice);
    }

    /// A slice that nothing is going on with may leave the map.
    fn let_slice_go(&mut self, slice: u64) {
        let idle = self.slices.active.get(&slice).is_some_and(|active| {
            active.pins == 0
                && !active.suspect
                && !active.in_write
                && active.readers.is_empty()
                && active.changes.is_empty()
                && active.writing.is_empty()
        });
        if idle {
            self.slices.active.remove(&slice);
            self.restart.extend(self.slices.crowded.drain(..));
        }
    }
}

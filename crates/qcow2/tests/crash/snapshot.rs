//! An internal snapshot in an image that nobody has open, made as section "Snapshots" of the specification says.

use qcow2::entry::L1Entry;
use qcow2::image::{Image, ReadAt};
use qcow2::refcount;

use crate::reader::{Value, read_all};
use crate::store::Contents;

/// The bit of L1 and L2 entries that says that a cluster has no other owner.
const COPIED: u64 = 1 << 63;

struct Refcounts<'a> {
    image: &'a Image,
    contents: &'a mut Contents,
}

impl Refcounts<'_> {
    fn place(&self, cluster: u64) -> Option<(u64, usize)> {
        let per_block = self.image.header.layout.refcounts_per_block();
        let block =
            *self.image.refcount_table.get((cluster / per_block) as usize).filter(|&&offset| offset != 0)?;
        Some((block, (cluster % per_block) as usize))
    }

    fn change(&mut self, cluster: u64, change: impl FnOnce(u64) -> u64) {
        let layout = &self.image.header.layout;
        let (block, index) = self.place(cluster).expect("counted clusters have a block");
        let mut bytes = vec![0; layout.cluster_bytes() as usize];
        self.contents.read_at(block, &mut bytes).unwrap();
        let value = change(refcount::get(&bytes, layout.refcount_order, index));
        refcount::set(&mut bytes, layout.refcount_order, index, value);
        self.contents.write(block, &bytes);
    }

    /// The first `count` clusters in a row that are free.
    fn free(&mut self, count: u64) -> Option<u64> {
        let layout = self.image.header.layout;
        let blocks = self.image.refcount_table.len() as u64;
        let mut row = 0;
        for cluster in 0..blocks * layout.refcounts_per_block() {
            let Some((block, index)) = self.place(cluster) else {
                row = 0;
                continue;
            };
            let mut bytes = vec![0; layout.cluster_bytes() as usize];
            self.contents.read_at(block, &mut bytes).unwrap();
            row = if refcount::get(&bytes, layout.refcount_order, index) == 0 { row + 1 } else { 0 };
            if row == count {
                return Some(cluster + 1 - count);
            }
        }
        None
    }
}

/// Adds a snapshot; `None` if the refcount structures have no room for it.
pub(crate) fn take(contents: &Contents) -> Option<Contents> {
    let image = Image::read(contents).unwrap();
    let (header, layout) = (&image.header, image.header.layout);
    let mut contents = contents.clone();
    let l1_clusters = layout.clusters(header.l1_entries * 8);
    let mut counts = Refcounts { image: &image, contents: &mut contents };
    let place = counts.free(l1_clusters + 1)?;
    for cluster in place..place + l1_clusters + 1 {
        counts.change(cluster, |_| 1);
    }
    let mut l1 = Vec::new();
    for entry in &image.l1 {
        let Some(table) = entry.table() else {
            l1.extend(0_u64.to_be_bytes());
            continue;
        };
        let mut bytes = vec![0; layout.cluster_bytes() as usize];
        counts.contents.read_at(table, &mut bytes).unwrap();
        for at in (0..bytes.len()).step_by(layout.l2_entry_bytes() as usize) {
            let word = u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
            let host = L1Entry(word & !1).table();
            bytes[at..at + 8].copy_from_slice(&(word & !COPIED).to_be_bytes());
            if let Some(host) = host {
                counts.change(host >> layout.cluster_bits, |count| count + 1);
            }
        }
        counts.contents.write(table, &bytes);
        counts.change(table >> layout.cluster_bits, |count| count + 1);
        l1.extend((entry.0 & !COPIED).to_be_bytes());
    }
    l1.resize((l1_clusters << layout.cluster_bits) as usize, 0);
    let at = place << layout.cluster_bits;
    contents.write(at, &l1);
    contents.write(header.l1_offset, &l1);
    // Snapshot table entry: no VM state, the size of the disk, an ID and a name of one letter each.
    let mut table = vec![0; layout.cluster_bytes() as usize];
    table[..8].copy_from_slice(&at.to_be_bytes());
    table[8..12].copy_from_slice(&(header.l1_entries as u32).to_be_bytes());
    table[12..16].copy_from_slice(&[0, 1, 0, 1]);
    table[36..40].copy_from_slice(&16_u32.to_be_bytes());
    table[48..56].copy_from_slice(&header.disk_bytes.to_be_bytes());
    table[56..58].copy_from_slice(b"1s");
    let table_at = at + (l1_clusters << layout.cluster_bits);
    contents.write(table_at, &table);
    let mut sector = image.header_sector.clone();
    sector[60..64].copy_from_slice(&1_u32.to_be_bytes());
    sector[64..72].copy_from_slice(&table_at.to_be_bytes());
    contents.write(0, &sector);
    Some(contents)
}

/// What the snapshot holds.
pub(crate) fn read(contents: &Contents, backing_sectors: u64) -> Vec<Value> {
    let mut image = Image::read(contents).unwrap();
    let word = |at: u64| {
        let mut bytes = [0; 8];
        contents.read_at(at, &mut bytes).unwrap();
        u64::from_be_bytes(bytes)
    };
    // The disk may have grown since, and its L1 table.
    let at = image.header.snapshots_offset;
    let (l1, entries) = (word(at), word(at + 8) >> 32);
    image.header.disk_bytes = word(at + 48);
    image.l1 = (0..entries).map(|index| L1Entry(word(l1 + index * 8))).collect();
    read_all(contents, &image, backing_sectors)
}

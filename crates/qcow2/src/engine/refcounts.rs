//! Refcount blocks and the table that names them: loading, changing, and making more of them.
//!
//! At most one write of a block is under way, and at most one growth of the structures. A new block is durable before the
//! table names it; a new table, with the blocks that count it, before the header does.

use std::collections::HashMap;

use super::barrier::Then;
use super::head::HeaderChange;
use super::pending::Freed;
use super::tables::SECTOR_BYTES;
use super::{Engine, Io, to_bytes};
use crate::header::{Header, REFCOUNT_TABLE_BYTES_MAX};
use crate::layout::Layout;
use crate::refcount;

/// Blocks that are kept in memory though nothing is going on with them.
const BLOCKS_MAX: usize = 32;
/// Unit in which blocks are written, in bytes, unless they are smaller.
const GRANULE_BYTES: usize = 4096;

/// A refcount block in memory.
#[derive(Debug, Default)]
struct Block {
    /// Empty until it was read.
    bytes: Vec<u8>,
    reading: bool,
    /// A reservation waits for it.
    reserve: bool,
    /// Refcounts to go down when it is read.
    decrease: Vec<u64>,
    /// Changed bytes that are in no write yet.
    dirty: Option<(usize, usize)>,
    writing: bool,
    /// The reservation's refcounts are among those in `dirty`, in the write.
    reserve_dirty: bool,
    reserve_writing: bool,
    used: u64,
}

/// Growth of the structures: new blocks, named by the table as it is or by a new one.
#[derive(Debug)]
struct Growth {
    /// Index and host cluster of each new block.
    blocks: Vec<(u64, u64)>,
    /// A new table: its first host cluster, its clusters, its entries.
    table: Option<(u64, u64, Vec<u64>)>,
    /// Writes under way.
    writes: usize,
    failed: bool,
    /// The new structures are durable; what names them is being written.
    naming: bool,
}

/// The refcounts of an image.
#[derive(Debug)]
pub(super) struct Refcounts {
    /// Offsets of the blocks in the file in bytes, 0 for none.
    table: Vec<u64>,
    blocks: HashMap<u64, Block>,
    growth: Option<Growth>,
    clock: u64,
}

impl Refcounts {
    pub(super) fn new(header: &Header, table: Vec<u64>) -> Self {
        let entries = header.refcount_table_clusters * header.layout.cluster_bytes() / 8;
        let mut table = table;
        table.resize(entries as usize, 0);
        Self { table, blocks: HashMap::new(), growth: None, clock: 0 }
    }

    /// Whether there is a block.
    pub(super) fn exists(&self, block: u64) -> bool {
        self.offset(block).is_some()
    }

    fn offset(&self, block: u64) -> Option<u64> {
        self.table.get(block as usize).copied().filter(|&offset| offset != 0)
    }

    /// Makes room for a block by forgetting one that nothing is going on with.
    fn make_room(&mut self) {
        if self.blocks.len() < BLOCKS_MAX {
            return;
        }
        let idle = |block: &Block| !block.reading && !block.writing && block.dirty.is_none();
        let oldest = self.blocks.iter().filter(|(_, block)| idle(block)).min_by_key(|(_, block)| block.used);
        if let Some(&index) = oldest.map(|(index, _)| index) {
            self.blocks.remove(&index);
        }
    }

    fn block(&mut self, block: u64) -> &mut Block {
        self.clock += 1;
        if !self.blocks.contains_key(&block) {
            self.make_room();
        }
        let found = self.blocks.entry(block).or_default();
        found.used = self.clock;
        found
    }
}

impl Engine {
    /// The bytes of a block, for a reservation, which goes on when they are read if they are not here.
    pub(super) fn refcount_block(&mut self, block: u64) -> Option<&[u8]> {
        if self.refcounts.block(block).bytes.is_empty() {
            self.refcounts.block(block).reserve = true;
            self.read_refcount_block(block);
            return None;
        }
        self.refcounts.blocks.get(&block).map(|block| block.bytes.as_slice())
    }

    fn read_refcount_block(&mut self, block: u64) {
        let Some(offset) = self.refcounts.offset(block) else { return };
        let found = self.refcounts.block(block);
        if !std::mem::replace(&mut found.reading, true) {
            self.read(Io::RefcountBlockRead { block }, offset, self.layout.cluster_bytes());
        }
    }

    pub(super) fn refcount_block_read(&mut self, block: u64, ok: bool, data: &[u8]) {
        let found = self.refcounts.block(block);
        found.reading = false;
        let reserve = std::mem::take(&mut found.reserve);
        if !ok {
            self.refcounts.blocks.remove(&block);
            if reserve {
                self.reserved(false);
            }
            return;
        }
        found.bytes = data.to_vec();
        let decrease = std::mem::take(&mut found.decrease);
        for cluster in decrease {
            self.decrease(cluster);
        }
        if reserve {
            self.reserve_more();
        }
    }

    /// Sets refcounts that were 0 to 1. The block is in memory.
    pub(super) fn set_refcounts(&mut self, block: u64, first: u64, count: u64) {
        for index in first..first + count {
            self.set_refcount(block, index, 1);
        }
    }

    fn set_refcount(&mut self, block: u64, index: u64, value: u64) {
        let order = self.layout.refcount_order;
        let found = self.refcounts.block(block);
        refcount::set(&mut found.bytes, order, index as usize, value);
        let at = ((index << order) / 8) as usize;
        let (start, end) = found.dirty.unwrap_or((at, at));
        found.dirty = Some((start.min(at), end.max(at)));
    }

    /// Takes one from a cluster's refcount. One that is 0, or has no block, was wrong before and stays.
    pub(super) fn decrease(&mut self, cluster: u64) {
        let per_block = self.layout.refcounts_per_block();
        let (block, index) = (cluster / per_block, cluster % per_block);
        if !self.refcounts.exists(block) {
            return;
        }
        let order = self.layout.refcount_order;
        let found = self.refcounts.block(block);
        if found.bytes.is_empty() {
            found.decrease.push(cluster);
            return self.read_refcount_block(block);
        }
        let value = refcount::get(&found.bytes, order, index as usize);
        if value == 0 {
            return;
        }
        self.set_refcount(block, index, value - 1);
        if value == 1 {
            self.alloc.is_free(cluster);
        }
        self.write_refcount_block(block, false);
    }

    /// Writes what has changed in a block. With `reserve`, a reservation goes on after it and a barrier.
    pub(super) fn write_refcount_block(&mut self, block: u64, reserve: bool) {
        let Some(offset) = self.refcounts.offset(block) else { return };
        let granule = GRANULE_BYTES.min(self.layout.cluster_bytes() as usize);
        let found = self.refcounts.block(block);
        found.reserve_dirty |= reserve;
        if found.writing {
            return;
        }
        let Some((start, end)) = found.dirty.take() else { return };
        found.writing = true;
        found.reserve_writing = std::mem::take(&mut found.reserve_dirty);
        let (start, end) = (start / granule * granule, (end + 1).next_multiple_of(granule));
        let data = found.bytes[start..end].to_vec();
        self.write_metadata(Io::RefcountBlockWrite { block }, offset + start as u64, data);
    }

    pub(super) fn refcount_block_written(&mut self, block: u64, ok: bool) {
        let found = self.refcounts.block(block);
        found.writing = false;
        if std::mem::take(&mut found.reserve_writing) {
            self.reservation_written(ok);
        }
        self.write_refcount_block(block, false);
    }

    /// Makes a block that the table does not name, and a larger table if this one has no entry for it. A reservation
    /// goes on after that.
    pub(super) fn make_refcount_block(&mut self, block: u64) {
        let layout = self.layout;
        let start = block * layout.refcounts_per_block();
        let growth = if (block as usize) < self.refcounts.table.len() {
            Some(Growth {
                blocks: vec![(block, start)],
                table: None,
                writes: 0,
                failed: false,
                naming: false,
            })
        } else {
            self.larger_table(block)
        };
        let Some(growth) = growth else { return self.reserved(false) };
        let table_clusters = growth.table.as_ref().map_or(0, |&(_, clusters, _)| clusters);
        let end = start + table_clusters + growth.blocks.len() as u64;
        for &(index, cluster) in &growth.blocks {
            let bytes = counts_of(&layout, index, start..end);
            self.write_metadata(Io::RefcountsGrow, cluster << layout.cluster_bits, bytes);
        }
        if let Some((first, _, entries)) = &growth.table {
            self.write_metadata(Io::RefcountsGrow, first << layout.cluster_bits, to_bytes(entries));
        }
        self.alloc.used_up_to(end);
        let writes = growth.blocks.len() + usize::from(growth.table.is_some());
        self.refcounts.growth = Some(Growth { writes, ..growth });
    }

    /// A table with an entry for `block`, standing at the first cluster that this would count, followed by the blocks that
    /// count it.
    fn larger_table(&self, block: u64) -> Option<Growth> {
        let layout = &self.layout;
        let (per_block, per_cluster) = (layout.refcounts_per_block(), layout.cluster_bytes() / 8);
        let start = block * per_block;
        let mut clusters = self.header.refcount_table_clusters * 2;
        let mut blocks = 1;
        loop {
            let needed = (clusters + blocks).div_ceil(per_block);
            let entries = block + needed;
            if needed == blocks && entries <= clusters * per_cluster {
                break;
            }
            blocks = needed;
            clusters = clusters.max(entries.div_ceil(per_cluster));
        }
        if clusters * layout.cluster_bytes() > REFCOUNT_TABLE_BYTES_MAX.max(layout.cluster_bytes()) {
            return None;
        }
        let blocks: Vec<_> = (0..blocks).map(|n| (block + n, start + clusters + n)).collect();
        let mut entries = self.refcounts.table.clone();
        entries.resize((clusters * per_cluster) as usize, 0);
        for &(index, cluster) in &blocks {
            entries[index as usize] = cluster << layout.cluster_bits;
        }
        Some(Growth {
            blocks,
            table: Some((start, clusters, entries)),
            writes: 0,
            failed: false,
            naming: false,
        })
    }

    pub(super) fn refcounts_grow_written(&mut self, ok: bool) {
        let Some(growth) = &mut self.refcounts.growth else { return };
        growth.writes -= 1;
        growth.failed |= !ok;
        if growth.writes > 0 {
            return;
        }
        if growth.failed {
            return self.growth_failed();
        }
        self.after_barrier(Then::RefcountsGrow);
    }

    pub(super) fn refcounts_grow_durable(&mut self, ok: bool) {
        let Some(growth) = &mut self.refcounts.growth else { return };
        if !ok {
            return self.growth_failed();
        }
        if growth.naming {
            return self.adopt_growth(None);
        }
        growth.naming = true;
        growth.writes = 1;
        if let Some((first, clusters, _)) = growth.table {
            let offset = first << self.layout.cluster_bits;
            return self.change_header(HeaderChange::RefcountTable { offset, clusters });
        }
        let Some(&(index, cluster)) = growth.blocks.first() else { return };
        let per_sector = SECTOR_BYTES as usize / 8;
        let first = index as usize / per_sector * per_sector;
        let mut entries = self.refcounts.table[first..first + per_sector].to_vec();
        entries[index as usize - first] = cluster << self.layout.cluster_bits;
        let offset = self.header.refcount_table_offset + first as u64 * 8;
        self.write_metadata(Io::RefcountsGrow, offset, to_bytes(&entries));
    }

    /// The header names the new table; or nobody knows which it names.
    pub(super) fn growth_named(&mut self, ok: bool, old: &Header) {
        if ok {
            self.adopt_growth(Some(old));
        } else {
            self.growth_failed();
        }
    }

    /// The new structures are the image's; `old` is the header before, if there is a new table.
    fn adopt_growth(&mut self, old: Option<&Header>) {
        let Some(growth) = self.refcounts.growth.take() else { return };
        let cluster_bits = self.layout.cluster_bits;
        for &(index, cluster) in &growth.blocks {
            self.alloc.is_metadata(cluster);
            if growth.table.is_none() {
                self.refcounts.table[index as usize] = cluster << cluster_bits;
            }
        }
        if let (Some((first, clusters, entries)), Some(old)) = (growth.table, old) {
            let old_first = old.refcount_table_offset >> cluster_bits;
            for cluster in old_first..old_first + old.refcount_table_clusters {
                self.alloc.no_metadata(cluster);
                self.free(Freed::Owned { first: cluster });
            }
            for cluster in first..first + clusters {
                self.alloc.is_metadata(cluster);
            }
            self.refcounts.table = entries;
        }
        self.reserve_more();
    }

    fn growth_failed(&mut self) {
        // Where the file may name the new structures, those in memory are not the file's any more.
        if self.refcounts.growth.take().is_some_and(|growth| growth.naming) {
            self.refcounts_broken();
        }
        self.reserved(false);
    }
}

/// A new block, which counts those of the clusters that are its own.
fn counts_of(layout: &Layout, block: u64, clusters: std::ops::Range<u64>) -> Vec<u8> {
    let per_block = layout.refcounts_per_block();
    let mut bytes = vec![0; layout.cluster_bytes() as usize];
    for cluster in clusters.filter(|cluster| cluster / per_block == block) {
        refcount::set(&mut bytes, layout.refcount_order, (cluster % per_block) as usize, 1);
    }
    bytes
}

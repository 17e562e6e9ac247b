//! New images.

use crate::header::{Compression, Header, autoclear, incompatible};
use crate::layout::Layout;
use crate::refcount;

/// What a new image is to be.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// 2 or 3.
    pub version: u32,
    /// Units.
    pub layout: Layout,
    /// Size of the disk in bytes.
    pub disk_bytes: u64,
    /// Name and format of the backing file.
    pub backing: Option<(String, String)>,
    /// Name of the external data file; whether it is to be a raw image by itself.
    pub data_file: Option<(String, bool)>,
    /// Of compressed clusters.
    pub compression: Compression,
}

/// The contents of an image without data: offsets in the file, and what is written there. All else is zeros.
///
/// The order of clusters: header, refcount table, refcount blocks, L1 table.
#[must_use]
pub fn create(new: &NewImage) -> Vec<(u64, Vec<u8>)> {
    let layout = new.layout;
    let l1_entries = layout.l1_entries(new.disk_bytes).max(1);
    let l1_clusters = layout.clusters(l1_entries * 8);
    let (mut table_clusters, mut blocks) = (1, 1);
    loop {
        let clusters = 1 + table_clusters + blocks + l1_clusters;
        let needed = clusters.div_ceil(layout.refcounts_per_block());
        let table_needed = layout.clusters(needed * 8);
        if needed <= blocks && table_needed <= table_clusters {
            break;
        }
        (blocks, table_clusters) = (needed.max(blocks), table_needed.max(table_clusters));
    }
    let at = |cluster: u64| cluster << layout.cluster_bits;
    let features = [
        (layout.extended, incompatible::EXTENDED_L2),
        (new.data_file.is_some(), incompatible::DATA_FILE),
        (new.compression == Compression::Zstd, incompatible::COMPRESSION),
    ];
    let raw = new.data_file.as_ref().is_some_and(|(_, raw)| *raw);
    let header = Header {
        version: new.version,
        layout,
        disk_bytes: new.disk_bytes,
        l1_offset: at(1 + table_clusters + blocks),
        l1_entries,
        refcount_table_offset: at(1),
        refcount_table_clusters: table_clusters,
        snapshots: 0,
        snapshots_offset: 0,
        incompatible: features.iter().filter(|(has, _)| *has).fold(0, |bits, (_, bit)| bits | bit),
        compatible: 0,
        autoclear: if raw { autoclear::RAW_DATA_FILE } else { 0 },
        compression: new.compression,
        backing_name: new.backing.as_ref().map(|(name, _)| name.clone()),
        backing_format: new.backing.as_ref().map(|(_, format)| format.clone()),
        data_file_name: new.data_file.as_ref().map(|(name, _)| name.clone()),
        bitmaps: None,
    };
    let mut table = vec![0; (table_clusters << layout.cluster_bits) as usize];
    let mut contents = vec![(0, header.encode())];
    let used = 1 + table_clusters + blocks + l1_clusters;
    for block in 0..blocks {
        let offset = at(1 + table_clusters + block);
        table[block as usize * 8..][..8].copy_from_slice(&offset.to_be_bytes());
        let mut counts = vec![0; layout.cluster_bytes() as usize];
        let first = block * layout.refcounts_per_block();
        for cluster in first..used.min(first + layout.refcounts_per_block()) {
            refcount::set(&mut counts, layout.refcount_order, (cluster - first) as usize, 1);
        }
        contents.push((offset, counts));
    }
    contents.push((header.refcount_table_offset, table));
    contents.push((header.l1_offset, vec![0; (l1_clusters << layout.cluster_bits) as usize]));
    contents
}

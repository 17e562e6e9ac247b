//! What a guest reads from an image, by the specification alone: the tables in the file, no map, no engine.

use qcow2::entry::{L2Entry, Mapping};
use qcow2::image::{Image, ReadAt};

use crate::store::{Contents, SECTOR};

/// What a sector holds: the number of the write that brought it, 0 for zeros. Anything else is garbage.
pub(crate) type Value = u64;
pub(crate) const GARBAGE: Value = u64::MAX;

/// A sector's bytes: its value at both ends.
pub(crate) fn sector_of(value: Value) -> [u8; SECTOR as usize] {
    let mut bytes = [0; SECTOR as usize];
    bytes[..8].copy_from_slice(&value.to_le_bytes());
    bytes[SECTOR as usize - 8..].copy_from_slice(&value.to_le_bytes());
    bytes
}

pub(crate) fn value_of(bytes: &[u8]) -> Value {
    let value = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    if bytes == sector_of(value) { value } else { GARBAGE }
}

/// The value of a sector of the backing file; zeros beyond its end.
pub(crate) fn backing_value(sector: u64, backing_sectors: u64) -> Value {
    if sector < backing_sectors { 1 << 40 | sector } else { 0 }
}

/// All sectors of the disk.
pub(crate) fn read_all(file: &Contents, image: &Image, backing_sectors: u64) -> Vec<Value> {
    let layout = image.header.layout;
    let mut values = Vec::with_capacity((image.header.disk_bytes / SECTOR) as usize);
    // The entry of a cluster is the same for all of its sectors.
    for cluster in 0..layout.clusters(image.header.disk_bytes) {
        let start = cluster << layout.cluster_bits;
        let entry = match image.l1[layout.l1_index(start) as usize].table() {
            None => L2Entry::UNALLOCATED,
            Some(table) => {
                let mut bytes = [0; 16];
                let len = layout.l2_entry_bytes() as usize;
                file.read_at(table + layout.l2_index(start) * len as u64, &mut bytes[..len]).unwrap();
                let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
                L2Entry { descriptor: word(0), subclusters: if layout.extended { word(8) } else { 0 } }
            }
        };
        let end = (start + layout.cluster_bytes()).min(image.header.disk_bytes);
        let mut at = start;
        while at < end {
            let (mapping, alike) = entry.map(&layout, layout.in_cluster(at));
            let alike = (at..end.min(at + alike)).step_by(SECTOR as usize);
            match mapping {
                Mapping::Unallocated => {
                    values.extend(alike.map(|offset| backing_value(offset / SECTOR, backing_sectors)));
                }
                Mapping::Zero => values.extend(alike.map(|_| 0)),
                Mapping::Data { offset, .. } => {
                    values.extend(alike.map(|piece| file.value(offset + (piece - at))));
                }
                Mapping::Compressed(_) | Mapping::Invalid => values.extend(alike.map(|_| GARBAGE)),
            }
            at = values.len() as u64 * SECTOR;
        }
    }
    values
}

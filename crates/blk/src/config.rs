//! The disk as the driver is told of it: feature bits and configuration space (virtio 1.2, sections 5.2.3, 5.2.4).

use crate::backend::Geometry;
use crate::device::Options;
use crate::request::{RANGE_BYTES_MAX, RANGES_MAX, SECTOR_BYTES};

/// Feature bits of virtio-blk (section 5.2.3).
#[allow(missing_docs, reason = "the names are the specification's")]
pub mod features {
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
    pub const SECURE_ERASE: u64 = 1 << 16;
}

/// Bytes of the configuration space, through the `secure_erase` fields.
pub const CONFIG_BYTES: usize = 72;

/// Offset of the one writable field: 1 for a write-back cache, 0 for write-through.
pub const WRITEBACK_OFFSET: u32 = 32;

/// The most data segments a request may have: QEMU's default for 128 descriptors, of which header and status take two.
/// Longer chains are served too; the limit only says what is worth building.
pub const SEG_MAX: u32 = 126;

/// The features a disk offers.
pub(crate) fn offered(geometry: &Geometry, options: &Options) -> u64 {
    let when = |condition, feature| if condition { feature } else { 0 };
    let writable = !read_only(geometry, options);
    features::SEG_MAX
        | features::BLK_SIZE
        | features::TOPOLOGY
        | when(!writable, features::RO)
        | when(geometry.flush, features::FLUSH)
        | when(geometry.flush && writable, features::CONFIG_WCE)
        | when(options.queues > 1, features::MQ)
        | when(geometry.discard && writable, features::DISCARD)
        | when(geometry.write_zeroes && writable, features::WRITE_ZEROES)
        | when(geometry.secure_erase && writable, features::SECURE_ERASE)
}

/// Whether the driver may not write.
pub(crate) fn read_only(geometry: &Geometry, options: &Options) -> bool {
    geometry.read_only || options.read_only
}

/// The configuration space of a disk of `sectors` sectors of 512 bytes.
pub(crate) fn space(
    geometry: &Geometry,
    options: &Options,
    sectors: u64,
    writeback: bool,
) -> [u8; CONFIG_BYTES] {
    let mut space = [0; CONFIG_BYTES];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    let range_sectors = (RANGE_BYTES_MAX / SECTOR_BYTES) as u32;
    let ranges = RANGES_MAX as u32;
    let block_sectors = (u64::from(geometry.block_bytes) / SECTOR_BYTES) as u32;
    let writable = !read_only(geometry, options);

    put(0, &sectors.to_le_bytes());
    // seg_max; size_max (at 8) and the CHS geometry (at 16) are not offered.
    put(12, &SEG_MAX.min(u32::from(options.queue_size_max).saturating_sub(2)).max(1).to_le_bytes());
    put(20, &geometry.logical_block_bytes.to_le_bytes());
    // Topology, in logical blocks: physical_block_exp, alignment_offset, min_io_size, opt_io_size.
    let physical_bytes = geometry.block_bytes.max(geometry.logical_block_bytes);
    let logical_per_physical = physical_bytes / geometry.logical_block_bytes;
    put(24, &[logical_per_physical.trailing_zeros() as u8, 0]);
    put(26, &(logical_per_physical as u16).to_le_bytes());
    put(WRITEBACK_OFFSET as usize, &[u8::from(writeback)]);
    put(34, &options.queues.to_le_bytes());
    if geometry.discard && writable {
        put(36, &range_sectors.to_le_bytes());
        put(40, &ranges.to_le_bytes());
        put(44, &block_sectors.to_le_bytes());
    }
    if geometry.write_zeroes && writable {
        put(48, &range_sectors.to_le_bytes());
        put(52, &ranges.to_le_bytes());
        put(56, &[1]);
    }
    if geometry.secure_erase && writable {
        put(60, &range_sectors.to_le_bytes());
        put(64, &ranges.to_le_bytes());
        put(68, &block_sectors.to_le_bytes());
    }
    space
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(space: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(space[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn every_field_stands_where_the_specification_has_it() {
        let geometry = Geometry {
            block_bytes: 4096,
            flush: true,
            discard: true,
            write_zeroes: true,
            secure_erase: true,
            ..Geometry::new(1 << 30)
        };
        let options = Options { queues: 3, queue_size_max: 256, ..Options::default() };
        let space = space(&geometry, &options, 0x0102_0304_0506, true);
        assert_eq!(space[..8], [6, 5, 4, 3, 2, 1, 0, 0], "capacity");
        assert_eq!(u32_at(&space, 12), 126, "seg_max");
        assert_eq!(u32_at(&space, 20), 512, "blk_size");
        assert_eq!(space[24], 3, "physical_block_exp");
        assert_eq!(space[26..28], [8, 0], "min_io_size");
        assert_eq!(space[32], 1, "writeback");
        assert_eq!(space[34..36], [3, 0], "num_queues");
        assert_eq!((u32_at(&space, 36), u32_at(&space, 40), u32_at(&space, 44)), (2 << 20, 32, 8), "discard");
        assert_eq!((u32_at(&space, 48), u32_at(&space, 52), space[56]), (2 << 20, 32, 1), "write zeroes");
        assert_eq!(
            (u32_at(&space, 60), u32_at(&space, 64), u32_at(&space, 68)),
            (2 << 20, 32, 8),
            "secure erase"
        );
    }

    #[test]
    fn a_read_only_disk_offers_nothing_that_writes() {
        let geometry = Geometry { read_only: true, flush: true, discard: true, ..Geometry::new(1 << 30) };
        let options = Options::default();
        let offered = offered(&geometry, &options);
        assert_ne!(offered & features::RO, 0);
        assert_eq!(offered & (features::DISCARD | features::CONFIG_WCE | features::WRITE_ZEROES), 0);
        assert_eq!(space(&geometry, &options, 8, true)[36..72], [0; 36]);
    }

    #[test]
    fn seg_max_leaves_room_for_header_and_status() {
        let options = Options { queue_size_max: 64, ..Options::default() };
        assert_eq!(u32_at(&space(&Geometry::new(512), &options, 1, true), 12), 62);
    }
}

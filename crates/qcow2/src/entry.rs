//! Entries of L1 and L2 tables (sections "Cluster mapping" and "Extended L2 Entries").

use crate::layout::{Layout, SUBCLUSTERS};

/// Bits 9 to 55 of L1 and standard L2 entries, and 9 to 63 of the refcount table's: a host offset.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 0 of a standard L2 entry: the cluster reads as zeros.
const ZERO: u64 = 1;
/// Bit 62 of an L2 entry.
const COMPRESSED: u64 = 1 << 62;
/// Bit 63 of L1 and L2 entries: the refcount is exactly one, so that it may be written in place.
const COPIED: u64 = 1 << 63;
/// Sector that compressed clusters are counted in, in bytes.
const COMPRESSED_SECTOR_BYTES: u64 = 512;

/// An entry of the L1 table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct L1Entry(pub u64);

impl L1Entry {
    /// An L2 table at `offset` that nobody shares.
    #[must_use]
    pub const fn owned(offset: u64) -> Self {
        Self(offset | COPIED)
    }

    /// Where the L2 table is; `None` where there is none.
    #[must_use]
    pub const fn table(self) -> Option<u64> {
        match self.0 & OFFSET_MASK {
            0 => None,
            offset => Some(offset),
        }
    }

    /// The L2 table may be written in place.
    #[must_use]
    pub const fn is_owned(self) -> bool {
        self.0 & COPIED != 0
    }

    /// Bits that are reserved are zero, and the table stands on a cluster.
    #[must_use]
    pub const fn is_valid(self, layout: &Layout) -> bool {
        self.0 & !(OFFSET_MASK | COPIED) == 0 && layout.in_cluster(self.0 & OFFSET_MASK) == 0
    }
}

/// An entry of an L2 table: the descriptor of a cluster, and the allocation bitmap of its subclusters (0 in images
/// without).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct L2Entry {
    /// The cluster's descriptor.
    pub descriptor: u64,
    /// Bits 0 to 31: subclusters that are allocated; bits 32 to 63: subclusters that read as zeros.
    pub subclusters: u64,
}

/// What an L2 entry says of a piece of its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// The backing file has it, or it reads as zeros where there is none.
    Unallocated,
    /// It reads as zeros.
    Zero,
    /// It stands in the image at this offset, that of the piece.
    Data {
        /// Host offset of the piece in bytes.
        offset: u64,
        /// It may be written in place.
        owned: bool,
    },
    /// The whole cluster is compressed.
    Compressed(Compressed),
    /// The entry is not valid.
    Invalid,
}

/// Where a compressed cluster stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compressed {
    /// Host offset in bytes, not aligned to anything.
    pub offset: u64,
    /// Bytes up to the end of the last sector; the stream may end before.
    pub len: u64,
}

impl L2Entry {
    /// Nothing is here.
    pub const UNALLOCATED: Self = Self { descriptor: 0, subclusters: 0 };

    /// A cluster at `offset` of the image's own, with data in all of it.
    #[must_use]
    pub const fn data(offset: u64, layout: &Layout) -> Self {
        Self { descriptor: offset | COPIED, subclusters: if layout.extended { ALL_ALLOCATED } else { 0 } }
    }

    /// A cluster that reads as zeros; `kept` is the offset of a host cluster that stays its own.
    #[must_use]
    pub const fn zero(kept: Option<u64>, layout: &Layout) -> Self {
        let (offset, owned) = match kept {
            Some(offset) => (offset, COPIED),
            None => (0, 0),
        };
        if layout.extended {
            Self { descriptor: offset | owned, subclusters: ALL_ZERO }
        } else {
            Self { descriptor: offset | owned | ZERO, subclusters: 0 }
        }
    }

    /// Offset of the host cluster that it holds, whether data are read from there or not. Not for compressed ones.
    #[must_use]
    pub const fn host_cluster(self, layout: &Layout) -> Option<u64> {
        if self.is_compressed() {
            return None;
        }
        match self.descriptor & OFFSET_MASK {
            // The only cluster at offset 0 that is no header: the first of an external data file.
            0 if !(layout.external_data && self.is_owned()) => None,
            offset => Some(offset),
        }
    }

    /// The cluster is compressed.
    #[must_use]
    pub const fn is_compressed(self) -> bool {
        self.descriptor & COMPRESSED != 0
    }

    /// The host cluster may be written in place.
    #[must_use]
    pub const fn is_owned(self) -> bool {
        self.descriptor & COPIED != 0
    }

    /// Where a compressed cluster stands.
    #[must_use]
    pub const fn compressed(self, layout: &Layout) -> Compressed {
        // Descriptor: x = 62 - (cluster_bits - 8) bits of offset, then the number of additional sectors.
        let x = 62 - (layout.cluster_bits - 8);
        let offset = self.descriptor & ((1 << x) - 1);
        let sectors = (self.descriptor & !(COPIED | COMPRESSED)) >> x;
        let first = COMPRESSED_SECTOR_BYTES - offset % COMPRESSED_SECTOR_BYTES;
        Compressed { offset, len: first + sectors * COMPRESSED_SECTOR_BYTES }
    }

    /// The piece of the cluster that begins `within` bytes into it, and how many bytes from there on are mapped alike.
    #[must_use]
    pub fn map(self, layout: &Layout, within: u64) -> (Mapping, u64) {
        let rest = layout.cluster_bytes() - within;
        if self.is_compressed() {
            let compressed = self.compressed(layout);
            let valid = self.descriptor & COPIED == 0 && compressed.offset != 0 && self.subclusters == 0;
            return (if valid { Mapping::Compressed(compressed) } else { Mapping::Invalid }, rest);
        }
        let offset = self.descriptor & OFFSET_MASK;
        let reserved = self.descriptor & !(OFFSET_MASK | COPIED | if layout.extended { 0 } else { ZERO });
        if reserved != 0 || layout.in_cluster(offset) != 0 {
            return (Mapping::Invalid, rest);
        }
        let data = Mapping::Data { offset: offset + within, owned: self.is_owned() };
        if layout.extended {
            return self.map_subclusters(layout, within, data);
        }
        let mapping = match (self.descriptor & ZERO != 0, self.host_cluster(layout)) {
            (true, _) => Mapping::Zero,
            (false, None) => Mapping::Unallocated,
            (false, Some(_)) => data,
        };
        (mapping, rest)
    }

    fn map_subclusters(self, layout: &Layout, within: u64, data: Mapping) -> (Mapping, u64) {
        let (allocated, zero) = (self.subclusters as u32, (self.subclusters >> 32) as u32);
        let rest = layout.cluster_bytes() - within;
        if allocated & zero != 0 || (allocated != 0 && self.host_cluster(layout).is_none()) {
            return (Mapping::Invalid, rest);
        }
        let first = (within / layout.subcluster_bytes()) as u32;
        let kind = |index: u32| (allocated >> index & 1, zero >> index & 1);
        let alike = (first..SUBCLUSTERS).take_while(|&index| kind(index) == kind(first)).count() as u64;
        let len = (u64::from(first) + alike) * layout.subcluster_bytes() - within;
        let mapping = match kind(first) {
            (1, _) => data,
            (_, 1) => Mapping::Zero,
            _ => Mapping::Unallocated,
        };
        (mapping, len)
    }
}

/// All subclusters allocated.
const ALL_ALLOCATED: u64 = 0xffff_ffff;
/// All subclusters read as zeros.
const ALL_ZERO: u64 = 0xffff_ffff << 32;

#[cfg(test)]
mod tests {
    use super::*;

    const STANDARD: Layout =
        Layout { cluster_bits: 16, refcount_order: 4, extended: false, external_data: false };
    const EXTENDED: Layout =
        Layout { cluster_bits: 16, refcount_order: 4, extended: true, external_data: false };

    #[test]
    fn standard_cluster_descriptor() {
        let at = |descriptor| L2Entry { descriptor, subclusters: 0 }.map(&STANDARD, 4096);
        assert_eq!(at(0), (Mapping::Unallocated, 61440));
        assert_eq!(at(1), (Mapping::Zero, 61440));
        assert_eq!(at(0x50001), (Mapping::Zero, 61440));
        assert_eq!(at(0x50000), (Mapping::Data { offset: 0x51000, owned: false }, 61440));
        assert_eq!(at(COPIED | 0x50000), (Mapping::Data { offset: 0x51000, owned: true }, 61440));
        for wrong in [2, 0x100, 0x50200, 1 << 56, 1 << 61] {
            assert_eq!(at(wrong).0, Mapping::Invalid, "{wrong:#x}");
        }
    }

    #[test]
    fn compressed_clusters_descriptor() {
        // x = 62 - (16 - 8) = 54.
        let entry = L2Entry { descriptor: COMPRESSED | 2 << 54 | 0x50123, subclusters: 0 };
        let compressed = Compressed { offset: 0x50123, len: (0x200 - 0x123) + 1024 };
        assert_eq!(entry.map(&STANDARD, 0), (Mapping::Compressed(compressed), 65536));
        assert_eq!(entry.host_cluster(&STANDARD), None);
        let copied = L2Entry { descriptor: entry.descriptor | COPIED, subclusters: 0 };
        assert_eq!(copied.map(&STANDARD, 0).0, Mapping::Invalid);
    }

    #[test]
    fn extended_l2_entries_tell_subclusters_apart() {
        // Subclusters of 2 KiB: 0 and 1 allocated, 2 zero, the others neither.
        let entry = L2Entry { descriptor: COPIED | 0x50000, subclusters: 0b11 | 0b100 << 32 };
        assert_eq!(entry.map(&EXTENDED, 512), (Mapping::Data { offset: 0x50200, owned: true }, 3584));
        assert_eq!(entry.map(&EXTENDED, 4096), (Mapping::Zero, 2048));
        assert_eq!(entry.map(&EXTENDED, 6144), (Mapping::Unallocated, 65536 - 6144));
        let both = L2Entry { descriptor: 0x50000, subclusters: 1 | 1 << 32 };
        assert_eq!(both.map(&EXTENDED, 0).0, Mapping::Invalid);
        let nowhere = L2Entry { descriptor: 0, subclusters: 1 };
        assert_eq!(nowhere.map(&EXTENDED, 0).0, Mapping::Invalid);
        let zero_bit = L2Entry { descriptor: 1, subclusters: 0 };
        assert_eq!(zero_bit.map(&EXTENDED, 0).0, Mapping::Invalid);
    }

    #[test]
    fn entries_that_are_made_map_as_meant() {
        for layout in [STANDARD, EXTENDED] {
            let data = L2Entry::data(0x70000, &layout);
            assert_eq!(data.map(&layout, 0), (Mapping::Data { offset: 0x70000, owned: true }, 65536));
            assert_eq!(L2Entry::zero(None, &layout).map(&layout, 0), (Mapping::Zero, 65536));
            let kept = L2Entry::zero(Some(0x70000), &layout);
            assert_eq!(kept.map(&layout, 0), (Mapping::Zero, 65536));
            assert_eq!(kept.host_cluster(&layout), Some(0x70000));
            assert!(kept.is_owned());
        }
    }
}

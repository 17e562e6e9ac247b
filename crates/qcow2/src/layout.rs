//! Arithmetic of an image: which table, block and entry belongs to an offset.
//!
//! Units are bytes unless a name says otherwise. Section names are those of the qcow2 specification
//! (`docs/interop/qcow2` of QEMU).

/// Smallest and largest cluster, as powers of two: 512 bytes to 2 MiB.
pub const CLUSTER_BITS_MIN: u32 = 9;
/// QEMU's limit as well.
pub const CLUSTER_BITS_MAX: u32 = 21;
/// Smallest cluster, as a power of two, that can have subclusters.
pub const EXTENDED_CLUSTER_BITS_MIN: u32 = 14;
/// Subclusters of a cluster, where there are any.
pub const SUBCLUSTERS: u32 = 32;
/// Largest slice of an L2 table that is read, written and cached at once.
const SLICE_BYTES_MAX: u64 = 4096;

/// The units of an image, fixed when it was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// A cluster's size is `1 << cluster_bits` bytes.
    pub cluster_bits: u32,
    /// A refcount's width is `1 << refcount_order` bits; 0 to 6.
    pub refcount_order: u32,
    /// L2 entries are 16 bytes and tell subclusters apart.
    pub extended: bool,
    /// Guest clusters are in a file of their own, each at its guest offset.
    pub external_data: bool,
}

impl Layout {
    /// Size of a cluster in bytes.
    #[must_use]
    pub const fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Where in its cluster an offset lies.
    #[must_use]
    pub const fn in_cluster(&self, offset: u64) -> u64 {
        offset & (self.cluster_bytes() - 1)
    }

    /// Start of the cluster that an offset lies in.
    #[must_use]
    pub const fn cluster_start(&self, offset: u64) -> u64 {
        offset & !(self.cluster_bytes() - 1)
    }

    /// Clusters that `bytes` bytes take.
    #[must_use]
    pub const fn clusters(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_bytes())
    }

    /// Size of an L2 entry in bytes.
    #[must_use]
    pub const fn l2_entry_bytes(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// Entries of an L2 table.
    #[must_use]
    pub const fn l2_entries(&self) -> u64 {
        self.cluster_bytes() / self.l2_entry_bytes()
    }

    /// Guest bytes that an L2 table maps.
    #[must_use]
    pub const fn l2_covers_bytes(&self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// Index into the L1 table.
    #[must_use]
    pub const fn l1_index(&self, guest_offset: u64) -> u64 {
        guest_offset / self.l2_covers_bytes()
    }

    /// Index into the L2 table.
    #[must_use]
    pub const fn l2_index(&self, guest_offset: u64) -> u64 {
        (guest_offset >> self.cluster_bits) & (self.l2_entries() - 1)
    }

    /// Entries that an L1 table needs for a disk of `bytes` bytes.
    #[must_use]
    pub const fn l1_entries(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.l2_covers_bytes())
    }

    /// Size in bytes of the part of an L2 table that is read, written and cached at once.
    #[must_use]
    pub const fn slice_bytes(&self) -> u64 {
        if self.cluster_bytes() < SLICE_BYTES_MAX { self.cluster_bytes() } else { SLICE_BYTES_MAX }
    }

    /// Entries of a slice.
    #[must_use]
    pub const fn slice_entries(&self) -> u64 {
        self.slice_bytes() / self.l2_entry_bytes()
    }

    /// Refcounts in a refcount block.
    #[must_use]
    pub const fn refcounts_per_block(&self) -> u64 {
        (self.cluster_bytes() * 8) >> self.refcount_order
    }

    /// The largest refcount that fits.
    #[must_use]
    pub const fn refcount_max(&self) -> u64 {
        match 1_u32 << self.refcount_order {
            64 => u64::MAX,
            bits => (1 << bits) - 1,
        }
    }

    /// Size of a subcluster in bytes; a whole cluster where there are none.
    #[must_use]
    pub const fn subcluster_bytes(&self) -> u64 {
        if self.extended { self.cluster_bytes() / SUBCLUSTERS as u64 } else { self.cluster_bytes() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(cluster_bits: u32, refcount_order: u32, extended: bool) -> Layout {
        Layout { cluster_bits, refcount_order, extended, external_data: false }
    }

    #[test]
    fn cluster_mapping_of_the_default_image() {
        let layout = layout(16, 4, false);
        assert_eq!(layout.l2_entries(), 8192);
        assert_eq!(layout.l2_covers_bytes(), 512 << 20);
        assert_eq!(layout.l1_index((512 << 20) - 1), 0);
        assert_eq!(layout.l1_index(512 << 20), 1);
        assert_eq!(layout.l2_index((512 << 20) + (3 << 16) + 5), 3);
        assert_eq!(layout.l1_entries((1 << 40) + 1), 2049);
        assert_eq!(layout.slice_entries(), 512);
        assert_eq!(layout.refcounts_per_block(), 32768);
        assert_eq!(layout.refcount_max(), 65535);
    }

    #[test]
    fn extended_entries_halve_a_table() {
        let layout = layout(16, 4, true);
        assert_eq!(layout.l2_entries(), 4096);
        assert_eq!(layout.slice_entries(), 256);
        assert_eq!(layout.subcluster_bytes(), 2048);
    }

    #[test]
    fn smallest_clusters_and_every_refcount_width() {
        assert_eq!(layout(9, 0, false).slice_bytes(), 512);
        assert_eq!(layout(9, 0, false).refcounts_per_block(), 4096);
        assert_eq!(layout(9, 0, false).refcount_max(), 1);
        assert_eq!(layout(9, 6, false).refcounts_per_block(), 64);
        assert_eq!(layout(9, 6, false).refcount_max(), u64::MAX);
    }
}

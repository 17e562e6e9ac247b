//! The header of an image and its extensions (sections "Header" and "Header extensions").

use crate::error::FormatError;
use crate::layout::{CLUSTER_BITS_MAX, CLUSTER_BITS_MIN, EXTENDED_CLUSTER_BITS_MIN, Layout};

/// `QFI\xfb`.
pub const MAGIC: u32 = 0x5146_49fb;
/// Length of a version 2 header in bytes, and the least of a version 3 header.
const V2_BYTES: usize = 72;
const V3_BYTES: usize = 104;
/// The longest backing file name in bytes.
const NAME_BYTES_MAX: usize = 1023;
/// QEMU's limits of the L1 table and the refcount table, in bytes.
pub const L1_BYTES_MAX: u64 = 32 << 20;
/// See [`L1_BYTES_MAX`].
pub const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;
/// QEMU's limit.
const SNAPSHOTS_MAX: u32 = 65536;
/// Offsets of clusters have 56 bits.
const HOST_BYTES_MAX: u64 = 1 << 56;
/// Header extensions looked at; the others are kept as they are.
const EXTENSIONS_MAX: usize = 256;

/// Incompatible features, bits 0 to 4.
pub mod incompatible {
    /// Refcounts may be wrong.
    pub const DIRTY: u64 = 1 << 0;
    /// Anything may be wrong.
    pub const CORRUPT: u64 = 1 << 1;
    /// Guest clusters are in another file.
    pub const DATA_FILE: u64 = 1 << 2;
    /// Clusters are compressed by something else than zlib.
    pub const COMPRESSION: u64 = 1 << 3;
    /// L2 entries tell subclusters apart.
    pub const EXTENDED_L2: u64 = 1 << 4;
    pub(super) const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
}

/// Compatible features.
pub mod compatible {
    /// Refcounts may be written late, with the dirty bit set meanwhile.
    pub const LAZY_REFCOUNTS: u64 = 1 << 0;
}

/// Autoclear features: cleared by whoever writes to the image without knowing them.
pub mod autoclear {
    /// The bitmaps are consistent.
    pub const BITMAPS: u64 = 1 << 0;
    /// The external data file is a raw image by itself.
    pub const RAW_DATA_FILE: u64 = 1 << 1;
}

/// Types of header extensions.
mod extension {
    pub(super) const END: u32 = 0;
    pub(super) const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub(super) const FEATURE_NAMES: u32 = 0x6803_f857;
    pub(super) const BITMAPS: u32 = 0x2385_2875;
    pub(super) const DATA_FILE_NAME: u32 = 0x4441_5441;
}

/// Compression of an image's compressed clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate streams.
    Deflate,
    /// Zstandard frames.
    Zstd,
}

/// Bytes and places of the header's fields. All are big-endian.
mod at {
    pub(super) const MAGIC: usize = 0;
    pub(super) const VERSION: usize = 4;
    pub(super) const BACKING_FILE_OFFSET: usize = 8;
    pub(super) const BACKING_FILE_SIZE: usize = 16;
    pub(super) const CLUSTER_BITS: usize = 20;
    pub(super) const SIZE: usize = 24;
    pub(super) const CRYPT_METHOD: usize = 32;
    pub(super) const L1_SIZE: usize = 36;
    pub(super) const L1_TABLE_OFFSET: usize = 40;
    pub(super) const REFCOUNT_TABLE_OFFSET: usize = 48;
    pub(super) const REFCOUNT_TABLE_CLUSTERS: usize = 56;
    pub(super) const NB_SNAPSHOTS: usize = 60;
    pub(super) const SNAPSHOTS_OFFSET: usize = 64;
    pub(super) const INCOMPATIBLE_FEATURES: usize = 72;
    pub(super) const COMPATIBLE_FEATURES: usize = 80;
    pub(super) const AUTOCLEAR_FEATURES: usize = 88;
    pub(super) const REFCOUNT_ORDER: usize = 96;
    pub(super) const HEADER_LENGTH: usize = 100;
    pub(super) const COMPRESSION_TYPE: usize = 104;
}

/// A header that was found valid: every offset is aligned and within 56 bits, every length within its limit. Whether what
/// it points to exists is not known yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Cluster size, refcount width, kind of L2 entries.
    pub layout: Layout,
    /// Size of the disk in bytes.
    pub disk_bytes: u64,
    /// Where the active L1 table is, in bytes, and its entries.
    pub l1_offset: u64,
    /// See `l1_offset`.
    pub l1_entries: u64,
    /// Where the refcount table is, in bytes, and its clusters.
    pub refcount_table_offset: u64,
    /// See `refcount_table_offset`.
    pub refcount_table_clusters: u64,
    /// Internal snapshots.
    pub snapshots: u32,
    /// Where their table is, in bytes.
    pub snapshots_offset: u64,
    /// Bits of [`incompatible`].
    pub incompatible: u64,
    /// Bits of [`compatible`].
    pub compatible: u64,
    /// Bits of [`autoclear`].
    pub autoclear: u64,
    /// Of compressed clusters.
    pub compression: Compression,
    /// Name of the backing file as the image has it.
    pub backing_name: Option<String>,
    /// Format of the backing file, if the image says.
    pub backing_format: Option<String>,
    /// Name of the external data file, if the image says.
    pub data_file_name: Option<String>,
    /// The bitmaps extension.
    pub bitmaps: Option<Bitmaps>,
}

/// Where the persistent bitmaps are (section "Bitmaps extension").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bitmaps {
    /// How many.
    pub count: u32,
    /// Size of their directory in bytes.
    pub directory_bytes: u64,
    /// Where the directory is, in bytes.
    pub directory_offset: u64,
}

impl Header {
    /// Reads the header from the first bytes of a file: `bytes` holds its first cluster, or all of a shorter file.
    ///
    /// # Errors
    /// It is no qcow2 header, or one that cannot be served.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        if bytes.len() < V2_BYTES {
            let magic = if bytes.len() < 4 { 0 } else { u32_at(bytes, at::MAGIC) };
            return Err(if magic == MAGIC {
                FormatError::Short("header")
            } else {
                FormatError::Magic(magic)
            });
        }
        match u32_at(bytes, at::MAGIC) {
            MAGIC => {}
            other => return Err(FormatError::Magic(other)),
        }
        let version = u32_at(bytes, at::VERSION);
        if !(2..=3).contains(&version) {
            return Err(FormatError::Version(version));
        }
        let v3 = version == 3;
        if v3 && bytes.len() < V3_BYTES {
            return Err(FormatError::Short("header"));
        }
        let field_u64 = |at| if v3 { u64_at(bytes, at) } else { 0 };
        let length = if v3 { u32_at(bytes, at::HEADER_LENGTH) as usize } else { V2_BYTES };
        let incompatible = field_u64(at::INCOMPATIBLE_FEATURES);
        let layout = Layout {
            cluster_bits: u32_at(bytes, at::CLUSTER_BITS),
            refcount_order: if v3 { u32_at(bytes, at::REFCOUNT_ORDER) } else { 4 },
            extended: incompatible & incompatible::EXTENDED_L2 != 0,
            external_data: incompatible & incompatible::DATA_FILE != 0,
        };
        check_layout(&layout)?;
        let first = bytes.get(..layout.cluster_bytes() as usize).unwrap_or(bytes);
        if v3 && (length < V3_BYTES || !length.is_multiple_of(8) || length > first.len()) {
            let allowed = "a multiple of 8 of at least 104, within the first cluster";
            return Err(FormatError::Field { field: "header_length", value: length as u64, allowed });
        }
        let mut header = Self {
            version,
            layout,
            disk_bytes: u64_at(bytes, at::SIZE),
            l1_offset: u64_at(bytes, at::L1_TABLE_OFFSET),
            l1_entries: u32_at(bytes, at::L1_SIZE).into(),
            refcount_table_offset: u64_at(bytes, at::REFCOUNT_TABLE_OFFSET),
            refcount_table_clusters: u32_at(bytes, at::REFCOUNT_TABLE_CLUSTERS).into(),
            snapshots: u32_at(bytes, at::NB_SNAPSHOTS),
            snapshots_offset: u64_at(bytes, at::SNAPSHOTS_OFFSET),
            incompatible,
            compatible: field_u64(at::COMPATIBLE_FEATURES),
            autoclear: field_u64(at::AUTOCLEAR_FEATURES),
            compression: Compression::Deflate,
            backing_name: backing_name(bytes, &layout)?,
            backing_format: None,
            data_file_name: None,
            bitmaps: None,
        };
        let names = header.read_extensions(&first[length.min(first.len())..])?;
        // Before anything that an unknown feature may have given another meaning.
        header.check_features(&names)?;
        header.check_encryption(u32_at(bytes, at::CRYPT_METHOD))?;
        header.compression = compression(first, length, incompatible)?;
        header.check_places()?;
        Ok(header)
    }

    /// Guest clusters are in another file.
    #[must_use]
    pub const fn has_data_file(&self) -> bool {
        self.incompatible & incompatible::DATA_FILE != 0
    }

    /// The data file is to be a raw image by itself.
    #[must_use]
    pub const fn has_raw_data_file(&self) -> bool {
        self.autoclear & autoclear::RAW_DATA_FILE != 0
    }

    /// Writes the fields that change in an image's life over their places in `bytes`, which holds the header as it stands
    /// in the file. All lie within the first 104 bytes, so that one sector changes.
    ///
    /// # Panics
    /// `bytes` is shorter than the header.
    pub fn update(&self, bytes: &mut [u8]) {
        put_u64(bytes, at::SIZE, self.disk_bytes);
        put_u32(bytes, at::L1_SIZE, self.l1_entries as u32);
        put_u64(bytes, at::L1_TABLE_OFFSET, self.l1_offset);
        put_u64(bytes, at::REFCOUNT_TABLE_OFFSET, self.refcount_table_offset);
        put_u32(bytes, at::REFCOUNT_TABLE_CLUSTERS, self.refcount_table_clusters as u32);
        if self.version == 3 {
            put_u64(bytes, at::INCOMPATIBLE_FEATURES, self.incompatible);
            put_u64(bytes, at::COMPATIBLE_FEATURES, self.compatible);
            put_u64(bytes, at::AUTOCLEAR_FEATURES, self.autoclear);
        }
    }

    /// A new image's first cluster.
    ///
    /// # Panics
    /// Names do not fit into the cluster: the caller has checked their lengths.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.layout.cluster_bytes() as usize];
        put_u32(&mut bytes, at::MAGIC, MAGIC);
        put_u32(&mut bytes, at::VERSION, self.version);
        put_u32(&mut bytes, at::CLUSTER_BITS, self.layout.cluster_bits);
        put_u32(&mut bytes, at::NB_SNAPSHOTS, self.snapshots);
        put_u64(&mut bytes, at::SNAPSHOTS_OFFSET, self.snapshots_offset);
        self.update(&mut bytes);
        let mut end = V2_BYTES;
        if self.version == 3 {
            end = V3_BYTES + 8;
            put_u32(&mut bytes, at::REFCOUNT_ORDER, self.layout.refcount_order);
            put_u32(&mut bytes, at::HEADER_LENGTH, end as u32);
            bytes[at::COMPRESSION_TYPE] = u8::from(self.compression == Compression::Zstd);
        }
        let texts = [
            (extension::BACKING_FORMAT, &self.backing_format),
            (extension::DATA_FILE_NAME, &self.data_file_name),
        ];
        for (kind, text) in texts {
            if let Some(text) = text {
                put_u32(&mut bytes, end, kind);
                put_u32(&mut bytes, end + 4, text.len() as u32);
                bytes[end + 8..][..text.len()].copy_from_slice(text.as_bytes());
                end += 8 + text.len().next_multiple_of(8);
            }
        }
        // The end of the extensions is eight zeros.
        end += 8;
        if let Some(name) = &self.backing_name {
            put_u64(&mut bytes, at::BACKING_FILE_OFFSET, end as u64);
            put_u32(&mut bytes, at::BACKING_FILE_SIZE, name.len() as u32);
            bytes[end..][..name.len()].copy_from_slice(name.as_bytes());
        }
        bytes
    }

    /// Reads the extensions; returns the names that the image has for features: type, bit, name.
    fn read_extensions(&mut self, mut bytes: &[u8]) -> Result<Vec<(u8, u8, String)>, FormatError> {
        let mut names = Vec::new();
        for _ in 0..EXTENSIONS_MAX {
            if bytes.len() < 8 {
                break;
            }
            let (kind, len) = (u32_at(bytes, 0), u32_at(bytes, 4) as usize);
            if kind == extension::END {
                break;
            }
            let data = bytes[8..].get(..len).ok_or(FormatError::Extension(name_of(kind)))?;
            let text = || {
                let text = String::from_utf8(data.to_vec());
                text.map_err(|_| FormatError::Extension(name_of(kind)))
            };
            match kind {
                extension::BACKING_FORMAT => self.backing_format = Some(text()?),
                extension::DATA_FILE_NAME => self.data_file_name = Some(text()?),
                extension::BITMAPS if data.len() >= 24 => {
                    self.bitmaps = Some(Bitmaps {
                        count: u32_at(data, 0),
                        directory_bytes: u64_at(data, 8),
                        directory_offset: u64_at(data, 16),
                    });
                }
                extension::FEATURE_NAMES => names = feature_names(data),
                _ => {}
            }
            bytes = bytes[8..].get(len.next_multiple_of(8)..).unwrap_or(&[]);
        }
        Ok(names)
    }

    fn check_features(&self, names: &[(u8, u8, String)]) -> Result<(), FormatError> {
        let unknown = self.incompatible & !incompatible::KNOWN;
        if unknown == 0 {
            return Ok(());
        }
        let bits = (0..64_u8).filter(|&bit| unknown >> bit & 1 != 0);
        let name = |bit| {
            let known = names.iter().find(|(kind, number, _)| *kind == 0 && *number == bit);
            known.map_or_else(|| format!("bit {bit}"), |(_, _, name)| format!("{name} (bit {bit})"))
        };
        Err(FormatError::Features(bits.map(name).collect::<Vec<_>>().join(", ")))
    }

    fn check_encryption(&self, method: u32) -> Result<(), FormatError> {
        match method {
            0 => Ok(()),
            1 => Err(FormatError::Encrypted("AES")),
            2 => Err(FormatError::Encrypted("LUKS")),
            _ => Err(FormatError::Field { field: "crypt_method", value: method.into(), allowed: "0" }),
        }
    }

    fn check_places(&self) -> Result<(), FormatError> {
        let layout = &self.layout;
        let field = |field, value, allowed| Err(FormatError::Field { field, value, allowed });
        if self.disk_bytes > HOST_BYTES_MAX << 3 {
            return field("size", self.disk_bytes, "up to 2^59");
        }
        if self.l1_entries * 8 > L1_BYTES_MAX {
            return field("l1_size", self.l1_entries, "up to 4194304 entries");
        }
        if self.l1_entries < layout.l1_entries(self.disk_bytes) {
            return field("l1_size", self.l1_entries, "enough entries for the size of the disk");
        }
        let table_bytes = self.refcount_table_clusters * layout.cluster_bytes();
        if table_bytes == 0 || table_bytes > REFCOUNT_TABLE_BYTES_MAX.max(layout.cluster_bytes()) {
            return field("refcount_table_clusters", self.refcount_table_clusters, "1 cluster to 8 MiB");
        }
        if self.snapshots > SNAPSHOTS_MAX {
            return field("nb_snapshots", self.snapshots.into(), "up to 65536");
        }
        let mut places = vec![("the refcount table", self.refcount_table_offset, table_bytes)];
        if self.l1_entries > 0 {
            places.push(("the L1 table", self.l1_offset, self.l1_entries * 8));
        }
        if self.snapshots > 0 {
            places.push(("the snapshot table", self.snapshots_offset, 0));
        }
        for (what, offset, len) in places {
            let aligned = layout.in_cluster(offset) == 0;
            if !aligned || offset == 0 || offset > HOST_BYTES_MAX || offset + len > HOST_BYTES_MAX {
                return Err(FormatError::Place { what, offset });
            }
        }
        if self.has_data_file() && self.snapshots > 0 {
            return field("nb_snapshots", self.snapshots.into(), "0 with an external data file");
        }
        if self.has_raw_data_file() && (!self.has_data_file() || self.backing_name.is_some()) {
            let allowed = "the raw external data bit only with a data file and without a backing file";
            return field("autoclear_features", self.autoclear, allowed);
        }
        Ok(())
    }
}

/// Size of a cluster in bytes, of which the first is all that may belong to a header, by its first bytes; the least if they
/// do not say.
pub(crate) fn cluster_bytes(bytes: &[u8]) -> u64 {
    let bits = if bytes.len() < V2_BYTES { 0 } else { u32_at(bytes, at::CLUSTER_BITS) };
    1 << if bits > CLUSTER_BITS_MAX { CLUSTER_BITS_MIN } else { bits.max(CLUSTER_BITS_MIN) }
}

fn check_layout(layout: &Layout) -> Result<(), FormatError> {
    let least = if layout.extended { EXTENDED_CLUSTER_BITS_MIN } else { CLUSTER_BITS_MIN };
    if !(least..=CLUSTER_BITS_MAX).contains(&layout.cluster_bits) {
        let allowed = if layout.extended { "14 to 21 with extended L2 entries" } else { "9 to 21" };
        return Err(FormatError::Field { field: "cluster_bits", value: layout.cluster_bits.into(), allowed });
    }
    if layout.refcount_order > 6 {
        let value = layout.refcount_order.into();
        return Err(FormatError::Field { field: "refcount_order", value, allowed: "0 to 6" });
    }
    Ok(())
}

fn backing_name(bytes: &[u8], layout: &Layout) -> Result<Option<String>, FormatError> {
    let offset = u64_at(bytes, at::BACKING_FILE_OFFSET);
    if offset == 0 {
        return Ok(None);
    }
    let len = u32_at(bytes, at::BACKING_FILE_SIZE) as usize;
    if len > NAME_BYTES_MAX {
        let value = len as u64;
        return Err(FormatError::Field { field: "backing_file_size", value, allowed: "up to 1023" });
    }
    if offset > layout.cluster_bytes() || offset as usize + len > layout.cluster_bytes() as usize {
        return Err(FormatError::Place { what: "the backing file name", offset });
    }
    let name = bytes.get(offset as usize..offset as usize + len);
    let name = name.ok_or(FormatError::Short("backing file name"))?;
    let name = String::from_utf8(name.to_vec()).map_err(|_| FormatError::Extension("backing file name"))?;
    Ok((!name.is_empty()).then_some(name))
}

fn compression(first: &[u8], length: usize, incompatible: u64) -> Result<Compression, FormatError> {
    let present = length > at::COMPRESSION_TYPE && first.len() > at::COMPRESSION_TYPE;
    let kind = if present { first[at::COMPRESSION_TYPE] } else { 0 };
    match (incompatible & incompatible::COMPRESSION != 0, kind) {
        (false, 0) => Ok(Compression::Deflate),
        (true, 1) => Ok(Compression::Zstd),
        _ => Err(FormatError::Field {
            field: "compression_type",
            value: kind.into(),
            allowed: "0 (zlib) without, 1 (zstd) with the compression type bit",
        }),
    }
}

fn feature_names(data: &[u8]) -> Vec<(u8, u8, String)> {
    let name = |entry: &[u8]| {
        let name = entry[2..].split(|&byte| byte == 0).next().unwrap_or(&[]);
        let printable = name.iter().filter(|byte| byte.is_ascii_graphic() || **byte == b' ');
        (entry[0], entry[1], printable.map(|&byte| char::from(byte)).collect())
    };
    data.chunks_exact(48).map(name).collect()
}

const fn name_of(kind: u32) -> &'static str {
    match kind {
        extension::BACKING_FORMAT => "backing file format",
        extension::FEATURE_NAMES => "feature name table",
        extension::BITMAPS => "bitmaps",
        extension::DATA_FILE_NAME => "external data file name",
        _ => "of an unknown type",
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) << 32 | u64::from(u32_at(bytes, at + 4))
}

fn put_u32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..][..4].copy_from_slice(&value.to_be_bytes());
}

fn put_u64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..][..8].copy_from_slice(&value.to_be_bytes());
}

#[cfg(test)]
mod tests;

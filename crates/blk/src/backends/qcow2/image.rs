//! An open image and what it stands on, as all threads share them, and where the bytes are that a guest reads.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use qcow2::engine::{Engine, Environment};
use qcow2::entry::{Compressed, L2Entry, Mapping};
use qcow2::header::{Compression, L1_BYTES_MAX};
use qcow2::layout::Layout;
use qcow2::map::{Lookup, Map};
use qcow2::readers::Readers;

use super::chain::{Chain, Format};
use super::combine::{Seats, Shared};
use super::unpack::Unpackers;
use crate::backends::file::{Kind, Opened};

/// The most entries of an L1 table, now or after the disk has grown.
const L1_ENTRIES_MAX: u64 = L1_BYTES_MAX / 8;

/// An image, and below it the files that show where it has nothing.
pub(super) struct Image {
    /// The image itself first.
    pub(super) layers: Box<[Layer]>,
    /// Every file, by the number that transfers have for it: the image's own first.
    pub(super) files: Box<[Arc<Opened>]>,
    /// Where the guest's data are written.
    pub(super) data_file: u8,
    /// The image's own guards.
    pub(super) readers: Arc<Readers>,
    /// Size of the disk in bytes, in whole sectors.
    pub(super) bytes: Arc<AtomicU64>,
    /// The threads that work on it.
    pub(super) seats: Seats,
    pub(super) unpackers: Unpackers,
}

/// A file that data are read from.
#[allow(clippy::large_enum_variant, reason = "there are few, and every request goes through one")]
pub(super) enum Layer {
    /// As they are.
    Raw {
        /// Which file.
        file: u8,
        /// Its length in bytes.
        bytes: u64,
    },
    /// By its tables.
    Qcow2(Tables),
}

/// A qcow2 file's tables.
pub(super) struct Tables {
    /// Where they are.
    pub(super) file: u8,
    /// Where data are.
    pub(super) data: u8,
    /// Size of the disk that it describes, in bytes; the image's own is in [`Image::bytes`].
    bytes: u64,
    pub(super) map: Arc<Map>,
    pub(super) shared: Shared,
    pub(super) compression: Compression,
}

/// Where some bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// In a file.
    Data {
        file: u8,
        offset: u64,
    },
    Zeros,
    /// In a compressed cluster, from byte `within` on.
    Compressed {
        layer: u8,
        at: Compressed,
        within: u64,
    },
    /// The tables of this layer must be read first.
    Unknown {
        layer: u8,
    },
    /// Nowhere: the tables are not valid.
    Nowhere,
}

/// Bytes that are in one place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extent {
    pub(super) source: Source,
    pub(super) len: u64,
}

impl Image {
    /// Puts together what was opened. `cache_bytes` is how much of its tables each layer keeps in memory.
    pub(super) fn new(chain: &Chain, cache_bytes: u64, bytes: Arc<AtomicU64>) -> Self {
        let mut files = Vec::new();
        let mut number = |file: &Arc<Opened>| {
            files.push(file.clone());
            files.len() as u8 - 1
        };
        let has_backing = chain.layers.len() > 1;
        let mut readers = None;
        let mut layers = Vec::new();
        let mut data_file = 0;
        for layer in &chain.layers {
            let own = number(&layer.file);
            layers.push(match &layer.format {
                Format::Raw { bytes } => Layer::Raw { file: own, bytes: *bytes },
                Format::Qcow2(image) => {
                    let guards = Arc::new(Readers::default());
                    let data = layer.data_file.as_ref().map_or(own, &mut number);
                    if readers.is_none() {
                        (readers, data_file) = (Some(guards.clone()), data);
                    }
                    let regular = layer.file.kind() != Kind::Block;
                    let environment = Environment {
                        has_backing,
                        fresh_is_zero: regular,
                        punch: regular,
                        file_bytes: image.file_bytes,
                    };
                    let header = image.header.clone();
                    let entries = header.l1_entries.max(L1_ENTRIES_MAX);
                    let map = Arc::new(Map::new(header.layout, entries, cache_bytes));
                    let engine = Engine::new(
                        header,
                        image.header_sector.clone(),
                        &image.l1,
                        image.refcount_table.clone(),
                        map.clone(),
                        guards,
                        environment,
                    );
                    let (bytes, compression) = (image.header.disk_bytes, image.header.compression);
                    Layer::Qcow2(Tables {
                        file: own,
                        data,
                        bytes,
                        map,
                        shared: Shared::new(engine),
                        compression,
                    })
                }
            });
        }
        let disk_bytes = chain.layers.first().map_or(0, |layer| layer.disk_bytes() & !511);
        Self {
            layers: layers.into(),
            files: files.into(),
            data_file,
            readers: readers.unwrap_or_default(),
            bytes: {
                bytes.store(disk_bytes, Ordering::Relaxed);
                bytes
            },
            seats: Seats::default(),
            unpackers: Unpackers::default(),
        }
    }

    /// The tables of a layer that has some.
    pub(super) fn tables(&self, layer: u8) -> Option<&Tables> {
        match self.layers.get(usize::from(layer)) {
            Some(Layer::Qcow2(tables)) => Some(tables),
            _ => None,
        }
    }

    /// The image's own tables.
    #[inline(always)]
    pub(super) fn top(&self) -> &Tables {
        let Some(Layer::Qcow2(tables)) = self.layers.first() else {
            unreachable!("an image is made of one that has tables");
        };
        tables
    }

    /// Size of a layer's clusters in bytes.
    pub(super) fn cluster_bytes(&self, layer: u8) -> u64 {
        self.tables(layer).map_or(0, |tables| tables.map.layout().cluster_bytes())
    }

    /// The image's units.
    #[inline(always)]
    pub(super) fn layout(&self) -> &Layout {
        self.top().map.layout()
    }

    /// Size of the disk in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// How far its tables go, in bytes: behind the end of the disk there may be some.
    pub(super) fn mapped_bytes(&self) -> u64 {
        let (layout, map) = (self.layout(), &self.top().map);
        let last = (layout.l1_index(self.bytes())..L1_ENTRIES_MAX)
            .rev()
            .find(|&index| map.l1(index).table().is_some());
        last.map_or(0, |index| (index + 1) * layout.l2_covers_bytes())
    }

    /// Whether something shows where the image has nothing, and how far that goes, in bytes.
    pub(super) fn backing_bytes(&self) -> Option<u64> {
        self.layers.get(1).map(|layer| match layer {
            Layer::Raw { bytes, .. } | Layer::Qcow2(Tables { bytes, .. }) => *bytes,
        })
    }

    /// The image's own entry for an offset.
    #[inline(always)]
    pub(super) fn entry(&self, offset: u64) -> Option<L2Entry> {
        match self.top().map.look_up(offset) {
            Lookup::Entry(entry) => Some(entry),
            Lookup::Miss => None,
        }
    }

    /// Where the bytes from `offset` on are, up to `len` of them. Neighbours in one place come together.
    #[inline(always)]
    pub(super) fn extent(&self, offset: u64, len: u64) -> Extent {
        let mut extent = self.piece(offset, len);
        while extent.len < len {
            let next = self.piece(offset + extent.len, len - extent.len);
            let goes_on = match (extent.source, next.source) {
                (Source::Data { file, offset }, Source::Data { file: other, offset: then }) => {
                    file == other && offset + extent.len == then
                }
                (Source::Zeros, Source::Zeros) => true,
                _ => false,
            };
            if !goes_on {
                break;
            }
            extent.len += next.len;
        }
        extent
    }

    /// The same, up to the next border between clusters.
    #[inline(always)]
    fn piece(&self, offset: u64, mut len: u64) -> Extent {
        for (number, layer) in self.layers.iter().enumerate() {
            let tables = match layer {
                Layer::Raw { bytes, .. } if offset >= *bytes => break,
                Layer::Raw { file, bytes } => {
                    return Extent {
                        source: Source::Data { file: *file, offset },
                        len: len.min(bytes - offset),
                    };
                }
                Layer::Qcow2(tables) => tables,
            };
            if number > 0 {
                if offset >= tables.bytes {
                    break;
                }
                len = len.min(tables.bytes - offset);
            }
            let (layout, layer) = (tables.map.layout(), number as u8);
            let within = layout.in_cluster(offset);
            let Lookup::Entry(entry) = tables.map.look_up(offset) else {
                let slice_bytes = layout.slice_entries() << layout.cluster_bits;
                let len = len.min(slice_bytes - offset % slice_bytes);
                return Extent { source: Source::Unknown { layer }, len };
            };
            let (mapping, alike) = entry.map(layout, within);
            len = len.min(alike);
            let source = match mapping {
                Mapping::Unallocated => continue,
                Mapping::Zero => Source::Zeros,
                Mapping::Data { offset, .. } => Source::Data { file: tables.data, offset },
                Mapping::Compressed(at) => Source::Compressed { layer, at, within },
                Mapping::Invalid => Source::Nowhere,
            };
            return Extent { source, len };
        }
        Extent { source: Source::Zeros, len }
    }
}

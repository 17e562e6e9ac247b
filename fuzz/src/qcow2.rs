//! Any qcow2 image: a sound one, with any words changed where they hurt.

use std::cell::Cell;
use std::io;

use qcow2::check::check;
use qcow2::create::{NewImage, create};
use qcow2::header::Compression;
use qcow2::image::ReadAt;
use qcow2::inflate::Inflater;
use qcow2::layout::Layout;
use qcow2::prepare::for_writing;
use qcow2::repair::{WriteAt, repair};

use crate::input::Input;

/// The file's length when it is not made sparse; repairs may make it longer.
const CLUSTERS: u64 = 32;
const OWNED: u64 = 1 << 63;

struct File {
    bytes: Vec<u8>,
    len: u64,
    read: Cell<u64>,
}

impl ReadAt for File {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read.set(self.read.get() + buffer.len() as u64);
        let there = usize::try_from(offset).ok().and_then(|at| self.bytes.get(at..)).unwrap_or(&[]);
        let len = there.len().min(buffer.len());
        buffer[..len].copy_from_slice(&there[..len]);
        buffer[len..].fill(0);
        Ok(())
    }

    fn file_bytes(&self) -> io::Result<u64> {
        Ok(self.len)
    }
}

impl WriteAt for File {
    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        // The end of a sparse file is not worth its memory.
        let end = offset.saturating_add(data.len() as u64);
        if end > 256 << 20 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.bytes.resize(self.bytes.len().max(end as usize), 0);
        self.bytes[offset as usize..end as usize].copy_from_slice(data);
        self.len = self.len.max(end);
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl File {
    fn put(&mut self, offset: u64, bytes: &[u8]) {
        if let Some(there) = self.bytes.get_mut(offset as usize..offset as usize + bytes.len()) {
            there.copy_from_slice(bytes);
        }
    }

    /// An image with an L2 table, a snapshot and a bitmap, which share a cluster of data. Clusters from 8 on: the L2 table,
    /// the snapshot table, the snapshot's L1 table, the bitmap directory, the bitmap's table, its data, the guest's data.
    fn new(layout: Layout, version: u32) -> Self {
        let new = NewImage {
            version,
            layout,
            disk_bytes: layout.l2_covers_bytes().min(1 << 30),
            backing: None,
            data_file: None,
            compression: Compression::Deflate,
        };
        let mut file = Self { bytes: Vec::new(), len: CLUSTERS << layout.cluster_bits, read: Cell::new(0) };
        file.bytes.resize(file.len as usize, 0);
        for (offset, data) in create(&new) {
            file.put(offset, &data);
        }
        let at = |cluster: u64| cluster << layout.cluster_bits;
        let word = |word: u64| word.to_be_bytes();
        file.put(at(3), &word(at(8)));
        file.put(at(8), &word(at(14)));
        file.put(at(10), &word(at(8)));
        file.put(60, &1_u32.to_be_bytes());
        file.put(64, &word(at(9)));
        file.put(at(9), &word(at(10)));
        file.put(at(9) + 8, &1_u32.to_be_bytes());
        if version == 3 {
            file.put(88, &word(1));
            file.put(112, &[0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24, 0, 0, 0, 1]);
            file.put(128, &word(32));
            file.put(136, &word(at(11)));
            file.put(at(11), &word(at(12)));
            file.put(at(11) + 8, &1_u32.to_be_bytes());
            file.put(at(12), &word(at(13)));
        }
        file
    }

    /// A check ends, and reads each byte of the file a few times at most, and the header and holes between.
    fn assert_bounded(&self, work: &str) {
        let bound = 8 * self.bytes.len() as u64 + (64 << 20);
        assert!(self.read.get() <= bound, "{work} reads {} bytes", self.read.get());
        self.read.set(0);
    }
}

/// A word that hurts: small, an offset of a cluster, with bits of entries, or anything.
fn any_word(input: &mut Input<'_>, layout: &Layout) -> u64 {
    let (kind, value) = (input.u8(), u64::from(input.u16()));
    let cluster = (value % (CLUSTERS + 2)) << layout.cluster_bits;
    match kind % 8 {
        0 => value,
        1 => cluster,
        2 => cluster | OWNED,
        3 => cluster | 1 << 62 | value << 48,
        4 => cluster | 1,
        5 => u64::MAX - value,
        6 => 1 << (value % 64),
        _ => value << 48 | value << 16,
    }
}

/// Reads an input as the stream of a compressed cluster.
fn inflate(stream: &[u8]) {
    let mut room = vec![7; 512 + 64];
    for compression in [Compression::Deflate, Compression::Zstd] {
        let _ = Inflater::new(compression).inflate(stream, &mut room[..512]);
    }
    assert!(room[512..].iter().all(|&byte| byte == 7), "bytes beyond the cluster are written");
}

/// Reads one input as changes of an image, checks it and repairs it.
///
/// # Panics
/// More is read than there is, or a repaired image is not sound: a bug.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let kinds = input.u8();
    let layout = Layout {
        cluster_bits: [9, 12, 14, 16][usize::from(kinds & 3)],
        refcount_order: u32::from(kinds >> 2) % 7,
        extended: kinds & 0x80 != 0 && kinds & 2 != 0,
        external_data: false,
    };
    let v2 = layout.refcount_order == 4 && !layout.extended && kinds & 0x40 != 0;
    let mut file = File::new(layout, if v2 { 2 } else { 3 });
    while !input.is_empty() {
        let (place, at) = (input.u8(), u64::from(input.u16()));
        let offset = match u64::from(place) % (CLUSTERS + 1) {
            0 => at % 144,
            CLUSTERS => {
                // Longer by a hole, or cut off.
                file.len = at << layout.cluster_bits;
                continue;
            }
            cluster => (cluster << layout.cluster_bits) + at % 8 * 8,
        };
        let word = any_word(&mut input, &layout);
        let bytes = word.to_be_bytes();
        file.put(offset, if at.is_multiple_of(3) { &bytes } else { &bytes[4..] });
    }
    inflate(data);
    let checked = check(&file);
    file.assert_bounded("a check");
    let _ = for_writing(&mut file);
    file.assert_bounded("making it ready to be written");
    let repaired = repair(&mut file).is_ok();
    file.assert_bounded("a repair");
    if checked.is_ok() && repaired {
        let report = check(&file).expect("an image that was repaired can be read");
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.findings);
    }
}

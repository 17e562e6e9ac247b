//! Hostile images: whatever their bytes say, a check ends, reads no table twice and takes memory with what is there; and a
//! repair touches nothing that is more than a wrong refcount.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::cell::Cell;
use std::io;

use qcow2::check::{Report, check};
use qcow2::create::{NewImage, create};
use qcow2::entry::L2Entry;
use qcow2::header::Compression;
use qcow2::image::{Image, ReadAt};
use qcow2::layout::Layout;
use qcow2::repair::{RepairError, WriteAt, repair};

const CLUSTER: u64 = 65536;
const LAYOUT: Layout = Layout { cluster_bits: 16, refcount_order: 4, extended: false, external_data: false };
const OWNED: u64 = 1 << 63;

/// A file, sparse from `bytes` on, that counts what is read from it.
#[derive(Clone)]
struct File {
    bytes: Vec<u8>,
    len: u64,
    read: Cell<u64>,
}

impl ReadAt for File {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64).ok_or(io::ErrorKind::InvalidInput)?;
        assert!(end <= self.len.next_multiple_of(2 << 20), "reads {offset:#x}, beyond the end");
        self.read.set(self.read.get() + buffer.len() as u64);
        let there = self.bytes.get(offset as usize..).unwrap_or(&[]);
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
        let end = offset as usize + data.len();
        self.bytes.resize(self.bytes.len().max(end), 0);
        self.bytes[offset as usize..end].copy_from_slice(data);
        self.len = self.len.max(end as u64);
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl File {
    /// Clusters: header, refcount table, refcount block, L1 table, L2 table, one of data.
    fn new(disk_bytes: u64) -> Self {
        let new = NewImage {
            version: 3,
            layout: LAYOUT,
            disk_bytes,
            backing: None,
            data_file: None,
            compression: Compression::Deflate,
        };
        let mut file = Self { bytes: Vec::new(), len: 0, read: Cell::new(0) };
        for (offset, data) in create(&new) {
            file.write_at(offset, &data).unwrap();
        }
        file.put(3 * CLUSTER, (4 * CLUSTER) | OWNED);
        file.put(4 * CLUSTER, (5 * CLUSTER) | OWNED);
        file.write_at(5 * CLUSTER, &[7; CLUSTER as usize]).unwrap();
        for cluster in 4..6 {
            file.write_at(2 * CLUSTER + cluster * 2, &[0, 1]).unwrap();
        }
        file
    }

    fn put(&mut self, offset: u64, word: u64) {
        self.write_at(offset, &word.to_be_bytes()).unwrap();
    }

    fn put_u32(&mut self, offset: u64, word: u32) {
        self.write_at(offset, &word.to_be_bytes()).unwrap();
    }

    /// What a check finds, having read no more than the file, the headers and each table a second time.
    fn check(&self) -> Report {
        self.read.set(0);
        let report = check(self).unwrap();
        let bound = 4 * self.bytes.len() as u64 + (8 << 20);
        assert!(self.read.get() < bound, "{} bytes were read", self.read.get());
        report
    }

    /// A repair refuses, and the file is as before.
    fn assert_refused(&mut self) {
        let before = self.bytes.clone();
        assert!(matches!(repair(self), Err(RepairError::Corrupt(_))));
        assert!(self.bytes == before);
    }
}

#[test]
fn the_image_is_sound_before_it_is_harmed() {
    let report = File::new(1 << 30).check();
    let expected =
        Report { allocated_clusters: 1, total_clusters: 16384, image_end: 6 * CLUSTER, ..Report::default() };
    assert_eq!(report, expected);
}

#[test]
fn offsets_that_overflow_are_corruptions() {
    for offset in [u64::MAX, u64::MAX - 65535, 1 << 63, 5 * CLUSTER + 512] {
        // A refcount block.
        let mut file = File::new(1 << 30);
        file.put(CLUSTER + 8, offset);
        assert!(file.check().corruptions > 0);
        file.assert_refused();
        // The L1 table of a snapshot.
        let mut file = with_snapshots(1);
        file.put(6 * CLUSTER, offset);
        assert!(file.check().corruptions > 0);
        file.assert_refused();
        // The bitmap directory.
        let mut file = File::new(1 << 30);
        put_bitmaps(&mut file, 1, 64, offset);
        assert!(file.check().corruptions > 0);
        file.assert_refused();
    }
}

/// Snapshots of which all name one L1 table, as large as it can be, that names one L2 table in all entries.
fn with_snapshots(count: u32) -> File {
    let mut file = File::new(1 << 30);
    file.put_u32(60, count);
    file.put(64, 6 * CLUSTER);
    let first = 6 * CLUSTER + u64::from(count * 40).next_multiple_of(CLUSTER);
    for index in 0..u64::from(count) {
        file.put(6 * CLUSTER + index * 40, first);
        file.put_u32(6 * CLUSTER + index * 40 + 8, 4 << 20);
    }
    let l1: Vec<_> = (0..4_u64 << 20).flat_map(|_| (4 * CLUSTER).to_be_bytes()).collect();
    file.write_at(first, &l1).unwrap();
    file
}

#[test]
fn tables_that_many_refer_to_are_read_once() {
    let mut file = with_snapshots(65536);
    assert!(file.check().corruptions > 0);
    file.assert_refused();
}

#[test]
fn long_snapshot_tables_are_corruptions() {
    for (at, what) in [(36, 0xffff_fff0), (36, 2048), (8, u32::MAX)] {
        let mut file = with_snapshots(1);
        file.put_u32(6 * CLUSTER + at, what);
        assert!(file.check().corruptions > 0);
        file.assert_refused();
    }
}

fn put_bitmaps(file: &mut File, count: u32, directory_bytes: u64, offset: u64) {
    file.put(88, 1);
    file.put_u32(112, 0x2385_2875);
    file.put_u32(116, 24);
    file.put_u32(120, count);
    file.put(128, directory_bytes);
    file.put(136, offset);
}

#[test]
fn bitmaps_without_end_are_corruptions() {
    let sparse = || {
        let mut file = File::new(1 << 30);
        file.len = 1 << 50;
        file
    };
    let mut file = sparse();
    put_bitmaps(&mut file, 1, 1 << 49, 6 * CLUSTER);
    assert!(file.check().corruptions > 0);
    let mut file = sparse();
    put_bitmaps(&mut file, u32::MAX, 64, 6 * CLUSTER);
    assert!(file.check().corruptions > 0);
    let mut file = sparse();
    put_bitmaps(&mut file, 1, 64, 6 * CLUSTER);
    file.put(6 * CLUSTER, 1 << 40);
    file.put_u32(6 * CLUSTER + 8, u32::MAX);
    assert!(file.check().corruptions > 0);
    file.assert_refused();
}

#[test]
fn bitmaps_that_are_not_consistent_hold_nothing() {
    let mut file = File::new(1 << 30);
    put_bitmaps(&mut file, 1, 64, 5 * CLUSTER);
    assert!(file.check().corruptions > 0, "they overlap the guest's data");
    file.put(88, 0);
    assert_eq!(file.check().corruptions, 0);
}

#[test]
fn time_does_not_go_with_the_length_of_a_sparse_file() {
    let mut file = File::new(1 << 30);
    file.len = 1 << 55;
    file.put(4 * CLUSTER + 8, ((1 << 55) - CLUSTER) | OWNED);
    let report = file.check();
    // The refcount, and the entry's bit 63, which says that it is one.
    assert_eq!((report.corruptions, report.wrong_refcounts, report.leaks), (2, 2, 0));
    assert!(matches!(repair(&mut file), Err(RepairError::Table)));
}

#[test]
fn metadata_that_overlap_are_not_repaired() {
    let overlaps = [
        ("L1 entry at the refcount block", 3 * CLUSTER, 2),
        ("L1 entry at the header's neighbour", 3 * CLUSTER, 1),
        ("L1 entry at the L1 table", 3 * CLUSTER, 3),
        ("data at the refcount block", 4 * CLUSTER + 8, 2),
        ("data at the L2 table itself", 4 * CLUSTER + 8, 4),
        ("second refcount block at the first", CLUSTER + 8, 2),
        ("refcount block at data", CLUSTER + 8, 5),
    ];
    for (what, at, cluster) in overlaps {
        let mut file = File::new(1 << 30);
        file.put(at, cluster * CLUSTER);
        let report = file.check();
        assert!(report.corruptions > report.wrong_refcounts, "{what}");
        file.assert_refused();
    }
}

#[test]
fn any_word_may_be_anything() {
    let words = [
        0,
        1,
        CLUSTER,
        2 * CLUSTER,
        4 * CLUSTER,
        (5 * CLUSTER) | OWNED,
        1 << 62,
        1 << 55,
        u64::MAX >> 1,
        u64::MAX,
    ];
    let places = (0..144)
        .step_by(4)
        .chain((1..5).flat_map(|cluster| (0..4).map(move |at| cluster * CLUSTER + at * 8)));
    for at in places {
        for word in words {
            let mut file = File::new(1 << 30);
            file.put(at, word);
            if Image::read(&file).is_err() {
                continue;
            }
            if check(&file).is_ok_and(|report| report.corruptions == report.wrong_refcounts)
                && repair(&mut file).is_ok()
            {
                let report = file.check();
                assert_eq!(
                    (report.corruptions, report.leaks),
                    (0, 0),
                    "{word:#x} at {at:#x}: {:?}",
                    report.findings
                );
            }
        }
    }
}

#[test]
fn a_compressed_cluster_at_the_end_of_all_is_a_corruption() {
    let mut file = File::new(1 << 30);
    let entry = L2Entry { descriptor: u64::MAX >> 1, subclusters: 0 };
    assert!(entry.is_compressed());
    file.put(4 * CLUSTER + 8, entry.descriptor);
    assert!(file.check().corruptions > 0);
    file.assert_refused();
}

//! The check of a whole image: every reference is counted and compared with the refcounts.

use std::collections::BTreeMap;
use std::fmt::Arguments;
use std::io;
use std::ops::Range;

use crate::bitmaps;
use crate::entry::{L1Entry, L2Entry, Mapping};
use crate::header::autoclear;
use crate::image::{Image, ImageError, ReadAt, read_words};
use crate::refcount;

/// Findings that are told one by one; the others are counted.
const FINDINGS_MAX: usize = 100;
/// Clusters that are counted together: few, so that references spread over a sparse file take little memory.
const CHUNK: u64 = 64;
/// QEMU's limits: of the snapshot table in bytes, of a snapshot's extra data in bytes.
const SNAPSHOT_TABLE_BYTES_MAX: u64 = 64 << 20;
const SNAPSHOT_EXTRA_BYTES_MAX: u64 = 1024;
/// Entries of all bitmap tables together; QEMU's limit is as much for each.
const BITMAP_ENTRIES_MAX: u64 = 1 << 27;
/// Entries of a bitmap table that are read at once.
const BITMAP_ENTRIES_AT_ONCE: u64 = 8192;

/// A check's outcome, in `qemu-img check`'s terms.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// What is wrong and may cost data.
    pub corruptions: u64,
    /// Of these, refcounts that are too low and entries that are wrong about being the only reference: what a repair sets
    /// right from the tables.
    pub wrong_refcounts: u64,
    /// Clusters that are counted and not referred to: they only take space.
    pub leaks: u64,
    /// Clusters of the disk that are allocated.
    pub allocated_clusters: u64,
    /// Of these, compressed.
    pub compressed_clusters: u64,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// Where the image ends: the end of the last cluster that is referred to, in bytes.
    pub image_end: u64,
    /// The first findings in words.
    pub findings: Vec<String>,
}

impl Report {
    fn corrupt(&mut self, finding: impl FnOnce() -> String) {
        self.corruptions += 1;
        self.tell(finding);
    }

    fn tell(&mut self, finding: impl FnOnce() -> String) {
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(finding());
        }
    }
}

/// Uses of a host cluster.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Use {
    /// Guest data, which snapshots and compressed clusters share.
    Data = 0,
    /// An L2 table, which snapshots share.
    Table = 1 << 30,
    /// Anything else; it has one reference.
    Metadata = 1 << 31,
}

/// References of a cluster that are told apart; the bits above are its use.
const COUNT_MAX: u32 = (1 << 30) - 1;

/// References to host clusters.
#[derive(Default)]
pub(crate) struct Counts {
    chunks: BTreeMap<u64, Box<[u32; CHUNK as usize]>>,
    /// Behind the last cluster that is referred to.
    pub(crate) end: u64,
}

impl Counts {
    /// Adds references; false if the cluster is in use for something that it cannot be shared with.
    pub(crate) fn add(&mut self, cluster: u64, used: Use, times: u32) -> bool {
        let chunk = self.chunks.entry(cluster / CHUNK).or_insert_with(|| Box::new([0; CHUNK as usize]));
        let word = &mut chunk[(cluster % CHUNK) as usize];
        let (count, before) = (*word & COUNT_MAX, *word & !COUNT_MAX);
        *word = count.saturating_add(times).min(COUNT_MAX) | before | used as u32;
        self.end = self.end.max(cluster + 1);
        count == 0 || (used != Use::Metadata && before == used as u32)
    }

    pub(crate) fn get(&self, cluster: u64) -> u64 {
        let chunk = self.chunks.get(&(cluster / CHUNK));
        chunk.map_or(0, |chunk| (chunk[(cluster % CHUNK) as usize] & COUNT_MAX).into())
    }

    /// The clusters of a range that are referred to, in order, with their references. However large the range, time goes
    /// with what is in it.
    pub(crate) fn counted(&self, clusters: Range<u64>) -> impl Iterator<Item = (u64, u64)> {
        let first = clusters.start / CHUNK;
        let chunks = self.chunks.range(first..clusters.end.div_ceil(CHUNK).max(first));
        let counts = chunks.flat_map(|(&chunk, words)| {
            (chunk * CHUNK..).zip(words.iter().map(|&word| u64::from(word & COUNT_MAX)))
        });
        counts.filter(move |(cluster, count)| *count > 0 && clusters.contains(cluster))
    }
}

/// Checks an image. Every table is read once, however many refer to it; memory is in proportion to the references.
///
/// # Errors
/// It cannot be read, or its header says that it is no image that can be checked.
pub fn check(file: &impl ReadAt) -> Result<Report, ImageError> {
    Ok(count(file, &Image::read(file)?)?.0)
}

/// Checks an image, and says what is referred to how often.
pub(crate) fn count(file: &impl ReadAt, image: &Image) -> io::Result<(Report, Counts)> {
    let mut check = Check {
        file,
        image,
        report: Report::default(),
        counts: Counts::default(),
        tables: BTreeMap::new(),
        blocks: image.refcount_table.clone(),
        wrong: BTreeMap::new(),
    };
    check.run()?;
    Ok((check.report, check.counts))
}

struct Check<'a, F> {
    file: &'a F,
    image: &'a Image,
    report: Report,
    counts: Counts,
    /// L2 tables by their offsets.
    tables: BTreeMap<u64, Table>,
    /// The refcount blocks that can be read; 0 for none.
    blocks: Vec<u64>,
    /// The refcounts of clusters that are referred to, where they are not the number of references.
    wrong: BTreeMap<u64, u64>,
}

/// References to an L2 table.
struct Table {
    /// Index of the first L1 entry that refers to it.
    index: usize,
    references: u32,
    /// Of these, from the active L1 table.
    active: u32,
}

impl<F: ReadAt> Check<'_, F> {
    fn run(&mut self) -> io::Result<()> {
        let (header, layout) = (&self.image.header, self.image.header.layout);
        self.report.total_clusters = layout.clusters(header.disk_bytes);
        self.counts.add(0, Use::Metadata, 1);
        if header.l1_entries > 0 {
            self.count_metadata(format_args!("the L1 table"), header.l1_offset, header.l1_entries * 8);
        }
        let table_bytes = header.refcount_table_clusters << layout.cluster_bits;
        self.count_metadata(format_args!("the refcount table"), header.refcount_table_offset, table_bytes);
        for (index, &offset) in self.image.refcount_table.iter().enumerate() {
            let what = format_args!("refcount block {index}");
            if offset != 0 && !self.count_metadata(what, offset, layout.cluster_bytes()) {
                self.blocks[index] = 0;
            }
        }
        self.count_l1(&self.image.l1, true);
        self.count_snapshots()?;
        self.count_bitmaps()?;
        self.count_tables()?;
        self.compare()?;
        // Whether entries say rightly that their cluster is their own can be told only when all is counted.
        self.compare_owned()
    }

    fn count_metadata(&mut self, what: Arguments<'_>, offset: u64, bytes: u64) -> bool {
        self.count(what, offset, bytes, Use::Metadata, 1)
    }

    /// Counts the clusters of a range; says whether it can be read as what it is said to be. Tables that overlap are not,
    /// which bounds what is read by the length of the file.
    fn count(&mut self, what: Arguments<'_>, offset: u64, bytes: u64, used: Use, times: u32) -> bool {
        let layout = &self.image.header.layout;
        let limit = self.image.file_bytes.next_multiple_of(layout.cluster_bytes());
        let end = offset.checked_add(bytes).filter(|&end| layout.in_cluster(offset) == 0 && end <= limit);
        let Some(end) = end else {
            self.report.corrupt(|| {
                format!("{what}: offset {offset:#x} is not aligned or beyond the end of the file")
            });
            return false;
        };
        let mut apart = true;
        for cluster in offset >> layout.cluster_bits..layout.clusters(end) {
            apart &= self.counts.add(cluster, used, times);
        }
        if !apart {
            self.report.corrupt(|| format!("{what}: overlaps something else at {offset:#x}"));
        }
        apart
    }

    /// Counts the L2 tables of an L1 table.
    fn count_l1(&mut self, l1: &[L1Entry], active: bool) {
        let layout = self.image.header.layout;
        for (index, entry) in l1.iter().enumerate() {
            if !entry.is_valid(&layout) {
                self.report.corrupt(|| format!("L1 entry {index}: {:#x} is not valid", entry.0));
                continue;
            }
            let Some(offset) = entry.table() else { continue };
            let what = format_args!("L2 table {index}");
            if self.count(what, offset, layout.cluster_bytes(), Use::Table, 1) {
                let new = Table { index, references: 0, active: 0 };
                let table = self.tables.entry(offset).or_insert(new);
                table.references = table.references.saturating_add(1);
                table.active += u32::from(active);
            }
        }
    }

    /// Counts what the L2 tables hold.
    fn count_tables(&mut self) -> io::Result<()> {
        let tables = std::mem::take(&mut self.tables);
        for (&offset, table) in &tables {
            for (at, entry) in self.read_table(offset)?.into_iter().enumerate() {
                self.count_entry(table, at, entry);
            }
        }
        self.tables = tables;
        Ok(())
    }

    fn read_table(&self, offset: u64) -> io::Result<Vec<L2Entry>> {
        let layout = &self.image.header.layout;
        let words = read_words(self.file, offset, layout.cluster_bytes() / 8)?;
        Ok(if layout.extended {
            let pairs = words.chunks_exact(2);
            pairs.map(|pair| L2Entry { descriptor: pair[0], subclusters: pair[1] }).collect()
        } else {
            words.into_iter().map(|descriptor| L2Entry { descriptor, subclusters: 0 }).collect()
        })
    }

    fn count_entry(&mut self, table: &Table, at: usize, entry: L2Entry) {
        let layout = self.image.header.layout;
        let &Table { index, references, active } = table;
        match entry.map(&layout, 0).0 {
            Mapping::Invalid => {
                self.report.corrupt(|| format!("L2 table {index}, entry {at}: {entry:x?} is not valid"));
            }
            Mapping::Compressed(compressed) => {
                let first = layout.cluster_start(compressed.offset);
                let bytes = compressed.offset + compressed.len - first;
                // The last sector may lie beyond the end: the stream ends before.
                let limit = self.image.file_bytes.next_multiple_of(layout.cluster_bytes());
                let bytes = bytes.min(limit.saturating_sub(first)).max(1);
                self.count(format_args!("a compressed cluster"), first, bytes, Use::Data, references);
                self.report.allocated_clusters += u64::from(active);
                self.report.compressed_clusters += u64::from(active);
            }
            _ => {
                let Some(offset) = entry.host_cluster(&layout) else { return };
                self.report.allocated_clusters += u64::from(active);
                let what = format_args!("L2 table {index}, entry {at}");
                if !layout.external_data {
                    self.count(what, offset, layout.cluster_bytes(), Use::Data, references);
                } else if offset != (index as u64 * layout.l2_entries() + at as u64) << layout.cluster_bits {
                    self.report.corrupt(|| format!("{what}: {offset:#x} in the data file"));
                }
            }
        }
    }

    /// Counts what the internal snapshots hold.
    fn count_snapshots(&mut self) -> io::Result<()> {
        let header = &self.image.header;
        let first = header.snapshots_offset;
        let mut at = first;
        for index in 0..header.snapshots {
            // Snapshot table entry: the L1 table's offset and entries, lengths of the ID, the name and the extra data.
            let fixed: [u8; 40] = self.read_fixed(at)?;
            let (l1_offset, l1_entries) = (word(&fixed[..8]), word(&fixed[8..12]));
            let extra = word(&fixed[36..40]);
            at += (40 + extra + word(&fixed[12..14]) + word(&fixed[14..16])).next_multiple_of(8);
            let bounded = extra <= SNAPSHOT_EXTRA_BYTES_MAX && at - first <= SNAPSHOT_TABLE_BYTES_MAX;
            if !bounded || at > self.image.file_bytes {
                self.report
                    .corrupt(|| format!("snapshot {index} is too long, or beyond the end of the file"));
                return Ok(());
            }
            if l1_entries * 8 > crate::header::L1_BYTES_MAX {
                self.report.corrupt(|| format!("snapshot {index}: its L1 table has {l1_entries} entries"));
                continue;
            }
            let what = format_args!("the L1 table of snapshot {index}");
            if self.count_metadata(what, l1_offset, l1_entries * 8) {
                let words = read_words(self.file, l1_offset, l1_entries)?;
                self.count_l1(&words.into_iter().map(L1Entry).collect::<Vec<_>>(), false);
            }
        }
        if header.snapshots > 0 {
            self.count_metadata(format_args!("the snapshot table"), first, at - first);
        }
        Ok(())
    }

    /// Counts what the persistent bitmaps hold (sections "Bitmap directory" and "Bitmap table"). Where the header does not
    /// say that they are consistent they are nothing: their clusters may be in use for something else.
    fn count_bitmaps(&mut self) -> io::Result<()> {
        let header = &self.image.header;
        let Some(bitmaps) = header.bitmaps.filter(|_| header.autoclear & autoclear::BITMAPS != 0) else {
            return Ok(());
        };
        let (first, bytes) = (bitmaps.directory_offset, bitmaps.directory_bytes);
        if bytes > bitmaps::DIRECTORY_BYTES_MAX || bitmaps.count > bitmaps::COUNT_MAX {
            self.report.corrupt(|| format!("{} bitmaps, in a directory of {bytes} bytes", bitmaps.count));
            return Ok(());
        }
        if !self.count_metadata(format_args!("the bitmap directory"), first, bytes) {
            return Ok(());
        }
        let (mut at, mut entries_left) = (first, BITMAP_ENTRIES_MAX);
        for index in 0..bitmaps.count {
            if at + 24 > first + bytes {
                self.report.corrupt(|| format!("bitmap {index} lies beyond the end of the directory"));
                return Ok(());
            }
            let fixed: [u8; 24] = self.read_fixed(at)?;
            let (offset, entries) = (word(&fixed[..8]), word(&fixed[8..12]));
            at += (24 + word(&fixed[18..20]) + word(&fixed[20..24])).next_multiple_of(8);
            if entries > entries_left {
                self.report.corrupt(|| format!("bitmap {index}: its table has {entries} entries"));
                return Ok(());
            }
            entries_left -= entries;
            if self.count_metadata(format_args!("the table of bitmap {index}"), offset, entries * 8) {
                self.count_bitmap(index, offset, entries)?;
            }
        }
        Ok(())
    }

    fn count_bitmap(&mut self, index: u32, offset: u64, entries: u64) -> io::Result<()> {
        let cluster_bytes = self.image.header.layout.cluster_bytes();
        for first in (0..entries).step_by(BITMAP_ENTRIES_AT_ONCE as usize) {
            let count = BITMAP_ENTRIES_AT_ONCE.min(entries - first);
            for entry in read_words(self.file, offset + first * 8, count)? {
                if let Some(cluster) = L1Entry(entry).table() {
                    self.count_metadata(format_args!("data of bitmap {index}"), cluster, cluster_bytes);
                }
            }
        }
        Ok(())
    }

    fn read_fixed<const BYTES: usize>(&self, offset: u64) -> io::Result<[u8; BYTES]> {
        let mut bytes = [0; BYTES];
        self.file.read_at(offset, &mut bytes)?;
        Ok(bytes)
    }

    /// Compares what was counted with the refcounts.
    fn compare(&mut self) -> io::Result<()> {
        let layout = self.image.header.layout;
        let per_block = layout.refcounts_per_block();
        self.report.image_end = self.counts.end << layout.cluster_bits;
        for (index, offset) in std::mem::take(&mut self.blocks).into_iter().enumerate() {
            let first = index as u64 * per_block;
            let mut told = 0;
            if offset != 0 {
                let mut bytes = vec![0; layout.cluster_bytes() as usize];
                self.file.read_at(offset, &mut bytes)?;
                // All refcounts behind the last byte that is not zero are 0.
                let bytes_used = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |at| at as u64 + 1);
                told = (bytes_used * 8).div_ceil(1 << layout.refcount_order);
                for at in 0..told {
                    self.compare_one(first + at, refcount::get(&bytes, layout.refcount_order, at as usize));
                }
            }
            self.compare_uncounted(first + told..first + per_block);
        }
        let covered = self.image.refcount_table.len() as u64 * per_block;
        self.compare_uncounted(covered..self.counts.end);
        Ok(())
    }

    /// Compares a range of which all refcounts are 0.
    fn compare_uncounted(&mut self, clusters: Range<u64>) {
        for (cluster, references) in self.counts.counted(clusters) {
            self.wrong.insert(cluster, 0);
            self.report.wrong_refcounts += 1;
            self.report.corrupt(|| format!("cluster {cluster}: refcount 0, {references} references"));
        }
    }

    fn compare_one(&mut self, cluster: u64, said: u64) {
        let counted = self.counts.get(cluster);
        if said != counted && counted > 0 {
            self.wrong.insert(cluster, said);
        }
        if said > counted {
            self.report.leaks += 1;
            self.report.tell(|| format!("leaked cluster {cluster}: refcount {said}, {counted} references"));
        } else if said < counted {
            self.report.wrong_refcounts += 1;
            self.report.corrupt(|| format!("cluster {cluster}: refcount {said}, {counted} references"));
        }
    }

    /// Whether a cluster's refcount is one.
    fn is_counted_once(&self, offset: u64) -> bool {
        let cluster = offset >> self.image.header.layout.cluster_bits;
        self.wrong.get(&cluster).copied().unwrap_or_else(|| self.counts.get(cluster)) == 1
    }

    /// An entry that says its cluster's refcount is one must be right; otherwise what others refer to would be written in
    /// place.
    fn compare_owned(&mut self) -> io::Result<()> {
        let layout = self.image.header.layout;
        for (index, entry) in self.image.l1.iter().enumerate() {
            let Some(offset) = entry.table().filter(|_| entry.is_valid(&layout)) else { continue };
            if entry.is_owned() != self.is_counted_once(offset) {
                self.report.wrong_refcounts += 1;
                self.report.corrupt(|| format!("L1 entry {index}: its bit 63 is wrong"));
            }
        }
        let active = self.tables.iter().filter(|(_, table)| table.active > 0);
        for (offset, index) in active.map(|(&offset, table)| (offset, table.index)).collect::<Vec<_>>() {
            for (at, entry) in self.read_table(offset)?.into_iter().enumerate() {
                let Some(host) = entry.host_cluster(&layout) else { continue };
                let alone = layout.external_data || self.is_counted_once(host);
                if entry.is_owned() != alone {
                    self.report.wrong_refcounts += 1;
                    self.report.corrupt(|| format!("L2 table {index}, entry {at}: its bit 63 is wrong"));
                }
            }
        }
        Ok(())
    }
}

/// A big-endian number.
fn word(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |word, &byte| word << 8 | u64::from(byte))
}

//! The check of a whole image: every reference is counted and compared with the refcounts.

use std::collections::HashMap;
use std::io;

use crate::entry::{L1Entry, L2Entry, Mapping};
use crate::image::{Image, ImageError, ReadAt, read_words};
use crate::refcount;

/// Findings that are told one by one; the others are counted.
const FINDINGS_MAX: usize = 100;
/// Clusters that are counted together.
const CHUNK: u64 = 1024;

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

/// References to host clusters.
#[derive(Default)]
pub(crate) struct Counts {
    chunks: HashMap<u64, Vec<u32>>,
    /// Behind the last cluster that is referred to.
    pub(crate) end: u64,
}

impl Counts {
    pub(crate) fn add(&mut self, cluster: u64) {
        let chunk = self.chunks.entry(cluster / CHUNK).or_insert_with(|| vec![0; CHUNK as usize]);
        let count = &mut chunk[(cluster % CHUNK) as usize];
        *count = count.saturating_add(1);
        self.end = self.end.max(cluster + 1);
    }

    pub(crate) fn get(&self, cluster: u64) -> u64 {
        self.chunks.get(&(cluster / CHUNK)).map_or(0, |chunk| chunk[(cluster % CHUNK) as usize].into())
    }
}

/// Checks an image. Time and memory are in proportion to what is allocated in it.
///
/// # Errors
/// It cannot be read, or its header says that it is no image that can be checked.
pub fn check(file: &impl ReadAt) -> Result<Report, ImageError> {
    Ok(count(file, &Image::read(file)?)?.0)
}

/// Checks an image, and says what is referred to how often.
pub(crate) fn count(file: &impl ReadAt, image: &Image) -> io::Result<(Report, Counts)> {
    let mut check = Check { file, image, report: Report::default(), counts: Counts::default() };
    check.run()?;
    Ok((check.report, check.counts))
}

struct Check<'a, F> {
    file: &'a F,
    image: &'a Image,
    report: Report,
    counts: Counts,
}

impl<F: ReadAt> Check<'_, F> {
    fn run(&mut self) -> io::Result<()> {
        let (header, layout) = (&self.image.header, self.image.header.layout);
        self.report.total_clusters = layout.clusters(header.disk_bytes);
        self.counts.add(0);
        self.count("the L1 table", header.l1_offset, header.l1_entries * 8);
        let table_bytes = header.refcount_table_clusters << layout.cluster_bits;
        self.count("the refcount table", header.refcount_table_offset, table_bytes);
        for (index, &offset) in self.image.refcount_table.iter().enumerate() {
            if offset != 0 {
                self.count(&format!("refcount block {index}"), offset, layout.cluster_bytes());
            }
        }
        self.count_tables(&self.image.l1, true)?;
        self.count_snapshots()?;
        self.count_bitmaps()?;
        self.compare()?;
        // Whether entries say rightly that their cluster is their own can be told only when all is counted.
        self.compare_owned()
    }

    /// Counts the clusters of a range; says whether it can be read.
    fn count(&mut self, what: &str, offset: u64, bytes: u64) -> bool {
        let layout = &self.image.header.layout;
        let limit = self.image.file_bytes.next_multiple_of(layout.cluster_bytes());
        if layout.in_cluster(offset) != 0 || offset + bytes > limit {
            self.report.corrupt(|| {
                format!("{what}: offset {offset:#x} is not aligned or beyond the end of the file")
            });
            return false;
        }
        for cluster in offset >> layout.cluster_bits..(offset + bytes).div_ceil(layout.cluster_bytes()) {
            self.counts.add(cluster);
        }
        true
    }

    fn count_tables(&mut self, l1: &[L1Entry], active: bool) -> io::Result<()> {
        let layout = self.image.header.layout;
        for (index, entry) in l1.iter().enumerate() {
            if !entry.is_valid(&layout) {
                self.report.corrupt(|| format!("L1 entry {index}: {:#x} is not valid", entry.0));
                continue;
            }
            let Some(offset) = entry.table() else { continue };
            if !self.count(&format!("L2 table {index}"), offset, layout.cluster_bytes()) {
                continue;
            }
            for (at, entry) in self.read_table(offset)?.into_iter().enumerate() {
                self.count_entry(index, at, entry, active);
            }
        }
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

    fn count_entry(&mut self, table: usize, at: usize, entry: L2Entry, active: bool) {
        let layout = self.image.header.layout;
        match entry.map(&layout, 0).0 {
            Mapping::Invalid => {
                self.report.corrupt(|| format!("L2 table {table}, entry {at}: {entry:x?} is not valid"));
            }
            Mapping::Compressed(compressed) => {
                let first = layout.cluster_start(compressed.offset);
                let bytes = compressed.offset + compressed.len - first;
                // The last sector may lie beyond the end: the stream ends before.
                let limit = self.image.file_bytes.next_multiple_of(layout.cluster_bytes());
                self.count("a compressed cluster", first, bytes.min(limit.saturating_sub(first)).max(1));
                if active {
                    self.report.allocated_clusters += 1;
                    self.report.compressed_clusters += 1;
                }
            }
            _ => {
                let Some(offset) = entry.host_cluster(&layout) else { return };
                if active {
                    self.report.allocated_clusters += 1;
                }
                if layout.external_data {
                    let expected = (table as u64 * layout.l2_entries() + at as u64) << layout.cluster_bits;
                    if offset != expected {
                        self.report.corrupt(|| {
                            format!("L2 table {table}, entry {at}: {offset:#x} in the data file")
                        });
                    }
                } else {
                    self.count(&format!("L2 table {table}, entry {at}"), offset, layout.cluster_bytes());
                }
            }
        }
    }

    /// Counts what the internal snapshots hold.
    fn count_snapshots(&mut self) -> io::Result<()> {
        let header = &self.image.header;
        let mut at = header.snapshots_offset;
        for index in 0..header.snapshots {
            // Snapshot table entry: the L1 table's offset and entries, lengths of the ID, the name and the extra data.
            let mut fixed = [0; 40];
            self.file.read_at(at, &mut fixed)?;
            let word =
                |at: usize, len: usize| fixed[at..at + len].iter().fold(0, |w, &b| w << 8 | u64::from(b));
            let (l1_offset, l1_entries) = (word(0, 8), word(8, 4));
            let bytes = 40 + word(36, 4) + word(12, 2) + word(14, 2);
            at += bytes.next_multiple_of(8);
            if at > self.image.file_bytes {
                self.report.corrupt(|| format!("snapshot {index} lies beyond the end of the file"));
                return Ok(());
            }
            if l1_entries * 8 > crate::header::L1_BYTES_MAX {
                self.report.corrupt(|| format!("snapshot {index}: its L1 table has {l1_entries} entries"));
                continue;
            }
            if self.count(&format!("the L1 table of snapshot {index}"), l1_offset, l1_entries * 8) {
                let l1: Vec<_> =
                    read_words(self.file, l1_offset, l1_entries)?.into_iter().map(L1Entry).collect();
                self.count_tables(&l1, false)?;
            }
        }
        if header.snapshots > 0 {
            self.count("the snapshot table", header.snapshots_offset, at - header.snapshots_offset);
        }
        Ok(())
    }

    /// Counts what the persistent bitmaps hold (sections "Bitmap directory" and "Bitmap table").
    fn count_bitmaps(&mut self) -> io::Result<()> {
        let Some(bitmaps) = self.image.header.bitmaps else { return Ok(()) };
        if !self.count("the bitmap directory", bitmaps.directory_offset, bitmaps.directory_bytes) {
            return Ok(());
        }
        let (mut at, end) = (bitmaps.directory_offset, bitmaps.directory_offset + bitmaps.directory_bytes);
        for index in 0..bitmaps.count {
            if at + 24 > end {
                self.report.corrupt(|| format!("bitmap {index} lies beyond the end of the directory"));
                return Ok(());
            }
            let mut fixed = [0; 24];
            self.file.read_at(at, &mut fixed)?;
            let word =
                |at: usize, len: usize| fixed[at..at + len].iter().fold(0, |w, &b| w << 8 | u64::from(b));
            let (offset, entries) = (word(0, 8), word(8, 4));
            at += (24 + word(18, 2) + word(20, 4)).next_multiple_of(8);
            if !self.count(&format!("the table of bitmap {index}"), offset, entries * 8) {
                continue;
            }
            for entry in read_words(self.file, offset, entries)? {
                if let Some(cluster) = L1Entry(entry & !1).table() {
                    self.count(
                        &format!("data of bitmap {index}"),
                        cluster,
                        self.image.header.layout.cluster_bytes(),
                    );
                }
            }
        }
        Ok(())
    }

    /// Compares what was counted with the refcounts.
    fn compare(&mut self) -> io::Result<()> {
        let layout = self.image.header.layout;
        let per_block = layout.refcounts_per_block();
        self.report.image_end = self.counts.end << layout.cluster_bits;
        for (index, &offset) in self.image.refcount_table.iter().enumerate() {
            let first = index as u64 * per_block;
            let mut bytes = vec![0; layout.cluster_bytes() as usize];
            if offset != 0 {
                self.file.read_at(offset, &mut bytes)?;
            } else if first >= self.counts.end {
                continue;
            }
            // Nothing is counted beyond these.
            let bytes_used = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |at| at as u64 + 1);
            let said_end = (bytes_used * 8).div_ceil(1 << layout.refcount_order);
            for at in 0..said_end.max(self.counts.end.saturating_sub(first)).min(per_block) {
                let (cluster, said) = (first + at, refcount::get(&bytes, layout.refcount_order, at as usize));
                self.compare_one(cluster, said);
            }
        }
        let covered = self.image.refcount_table.len() as u64 * per_block;
        for cluster in covered..self.counts.end {
            self.compare_one(cluster, 0);
        }
        Ok(())
    }

    fn compare_one(&mut self, cluster: u64, said: u64) {
        let counted = self.counts.get(cluster);
        if said > counted {
            self.report.leaks += 1;
            self.report.tell(|| format!("leaked cluster {cluster}: refcount {said}, {counted} references"));
        } else if said < counted {
            self.report.wrong_refcounts += 1;
            self.report.corrupt(|| format!("cluster {cluster}: refcount {said}, {counted} references"));
        }
    }

    /// An entry that says it is the only one must be; otherwise what others refer to would be written in place.
    fn compare_owned(&mut self) -> io::Result<()> {
        let layout = self.image.header.layout;
        for (index, entry) in self.image.l1.iter().enumerate() {
            let Some(offset) = entry.table().filter(|_| entry.is_valid(&layout)) else { continue };
            if entry.is_owned() != (self.counts.get(offset >> layout.cluster_bits) == 1) {
                self.report.wrong_refcounts += 1;
                self.report.corrupt(|| format!("L1 entry {index}: its bit 63 is wrong"));
            }
            if offset + layout.cluster_bytes()
                > self.image.file_bytes.next_multiple_of(layout.cluster_bytes())
            {
                continue;
            }
            for (at, entry) in self.read_table(offset)?.into_iter().enumerate() {
                let Some(host) = entry.host_cluster(&layout) else { continue };
                let alone = layout.external_data || self.counts.get(host >> layout.cluster_bits) == 1;
                if entry.is_owned() != alone {
                    self.report.wrong_refcounts += 1;
                    self.report.corrupt(|| format!("L2 table {index}, entry {at}: its bit 63 is wrong"));
                }
            }
        }
        Ok(())
    }
}

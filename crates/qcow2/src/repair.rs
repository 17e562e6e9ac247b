//! Repair of refcounts, from the tables: what an image that was left dirty needs before it can be written, and what gives
//! leaked clusters back.

use std::collections::BTreeSet;
use std::io;

use crate::check::{Counts, Report, Use, count};
use crate::engine::to_bytes;
use crate::entry::L1Entry;
use crate::header::incompatible;
use crate::image::{Image, ImageError, ReadAt, read_words};
use crate::refcount;

/// A file that can be changed, while nobody else uses it.
pub trait WriteAt: ReadAt {
    /// Writes all of `data` at `offset`, beyond the end of the file too.
    ///
    /// # Errors
    /// Those of the file.
    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Makes durable what was written.
    ///
    /// # Errors
    /// Those of the file.
    fn sync(&mut self) -> io::Result<()>;
}

/// Why an image was not repaired.
#[derive(Debug, thiserror::Error)]
pub enum RepairError {
    /// It cannot be read or written.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// More is wrong than refcounts.
    #[error("more is wrong than refcounts, first: {0}; `qemu-img check -r all` may help, with loss of data")]
    Corrupt(String),
    /// The refcount table has no entry for a cluster in use.
    #[error(
        "its refcount table is too small for the clusters in use; `qemu-img check -r all` makes a larger one"
    )]
    Table,
    /// A refcount is too narrow.
    #[error("cluster {cluster} has {references} references, and its refcount goes up to {max}")]
    Width {
        /// Which.
        cluster: u64,
        /// How many it has.
        references: u64,
        /// How many fit.
        max: u64,
    },
}

impl From<io::Error> for RepairError {
    fn from(error: io::Error) -> Self {
        Self::Image(error.into())
    }
}

/// Sets all refcounts to the number of references, and the bits of entries that rest on them, and takes the dirty bit off.
/// Returns what the check before it found. A crash during it leaves the image dirty, or with leaks.
///
/// # Errors
/// More is wrong than refcounts, or the file failed. Nothing that the guest sees was changed.
pub fn repair(file: &mut impl WriteAt) -> Result<Report, RepairError> {
    let mut image = Image::read(file)?;
    let (report, mut counts) = count(file, &image)?;
    if report.corruptions > report.wrong_refcounts {
        let first = report.findings.iter().find(|finding| !finding.starts_with("leaked"));
        return Err(RepairError::Corrupt(first.cloned().unwrap_or_default()));
    }
    let dirty = image.header.incompatible & incompatible::DIRTY != 0;
    if report.corruptions == 0 && report.leaks == 0 && !dirty {
        return Ok(report);
    }
    check_widths(&image, &counts)?;
    if report.wrong_refcounts > 0 && !dirty {
        // Until all is written, a crash leaves refcounts wrong: whoever opens the image next must know.
        set_dirty(file, &mut image, true)?;
    }
    write_refcounts(file, &mut image, &mut counts)?;
    write_owned_bits(file, &image, &counts)?;
    file.sync()?;
    if image.header.incompatible & incompatible::DIRTY != 0 {
        set_dirty(file, &mut image, false)?;
    }
    Ok(report)
}

fn set_dirty(file: &mut impl WriteAt, image: &mut Image, dirty: bool) -> io::Result<()> {
    if image.header.version < 3 {
        return Ok(());
    }
    image.header.incompatible &= !incompatible::DIRTY;
    image.header.incompatible |= if dirty { incompatible::DIRTY } else { 0 };
    image.header.update(&mut image.header_sector);
    file.write_at(0, &image.header_sector)?;
    file.sync()
}

/// Every refcount has a place that is wide enough, as far as the table goes.
fn check_widths(image: &Image, counts: &Counts) -> Result<(), RepairError> {
    let layout = image.header.layout;
    let max = layout.refcount_max();
    match counts.counted(0..counts.end).find(|&(_, references)| references > max) {
        Some((cluster, references)) => Err(RepairError::Width { cluster, references, max }),
        None if counts.end > image.refcount_table.len() as u64 * layout.refcounts_per_block() => {
            Err(RepairError::Table)
        }
        None => Ok(()),
    }
}

fn write_refcounts(
    file: &mut impl WriteAt,
    image: &mut Image,
    counts: &mut Counts,
) -> Result<(), RepairError> {
    let layout = image.header.layout;
    let per_block = layout.refcounts_per_block();
    let mut named = false;
    // New blocks are counted as they are placed, behind all that is in use: by this block or one that comes later.
    for block in 0..image.refcount_table.len() {
        let first = block as u64 * per_block;
        let clusters = first..first + per_block;
        let mut offset = image.refcount_table[block];
        if offset == 0 && counts.counted(clusters.clone()).next().is_some() {
            offset = counts.end << layout.cluster_bits;
            counts.add(counts.end, Use::Metadata, 1);
            image.refcount_table[block] = offset;
            named = true;
        }
        if offset == 0 {
            continue;
        }
        let mut bytes = vec![0; layout.cluster_bytes() as usize];
        for (cluster, references) in counts.counted(clusters) {
            refcount::set(&mut bytes, layout.refcount_order, (cluster - first) as usize, references);
        }
        file.write_at(offset, &bytes)?;
    }
    if counts.end > image.refcount_table.len() as u64 * per_block {
        return Err(RepairError::Table);
    }
    file.sync()?;
    if named {
        file.write_at(image.header.refcount_table_offset, &to_bytes(&image.refcount_table))?;
        file.sync()?;
    }
    Ok(())
}

/// Sets bit 63 of the active tables' entries right.
fn write_owned_bits(file: &mut impl WriteAt, image: &Image, counts: &Counts) -> io::Result<()> {
    let layout = image.header.layout;
    let alone = |offset: u64| counts.get(offset >> layout.cluster_bits) == 1;
    let bit = |owned: bool| if owned { 1 << 63 } else { 0 };
    let mut l1: Vec<u64> = image.l1.iter().map(|entry| entry.0).collect();
    let mut seen = BTreeSet::new();
    for entry in &mut l1 {
        let Some(table) = L1Entry(*entry).table() else { continue };
        *entry = table | bit(alone(table));
        if !seen.insert(table) {
            continue;
        }
        let before = read_words(file, table, layout.cluster_bytes() / 8)?;
        let mut words = before.clone();
        for word in words.iter_mut().step_by(layout.l2_entry_bytes() as usize / 8) {
            let entry = crate::entry::L2Entry { descriptor: *word, subclusters: 0 };
            if let Some(host) = entry.host_cluster(&layout)
                && !layout.external_data
            {
                *word = *word & !bit(true) | bit(alone(host));
            }
        }
        if words != before {
            file.write_at(table, &to_bytes(&words))?;
        }
    }
    if l1.iter().zip(&image.l1).any(|(&word, entry)| word != entry.0) {
        file.write_at(image.header.l1_offset, &to_bytes(&l1))?;
    }
    Ok(())
}

//! An image as it lies in its file: what must be read before it can be served.

use std::io;

use crate::entry::L1Entry;
use crate::error::FormatError;
use crate::header::{self, Header};

/// A file that can be read, by whoever does the reading.
pub trait ReadAt {
    /// Fills `buffer` from `offset` on; with zeros beyond the end of the file.
    ///
    /// # Errors
    /// Those of the file.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// Length of the file in bytes.
    ///
    /// # Errors
    /// Those of the file.
    fn file_bytes(&self) -> io::Result<u64>;
}

/// Why an image cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It is not as it should be.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// Its file cannot be read.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
}

/// What an engine begins with.
#[derive(Clone, Debug)]
pub struct Image {
    /// The header.
    pub header: Header,
    /// The header's first 512 bytes.
    pub header_sector: Vec<u8>,
    /// The active L1 table.
    pub l1: Vec<L1Entry>,
    /// The refcount table: offsets of blocks in bytes, 0 for none.
    pub refcount_table: Vec<u64>,
    /// Length of the file in bytes.
    pub file_bytes: u64,
}

impl Image {
    /// Reads the header and the first level of both tables: up to 40 MiB.
    ///
    /// # Errors
    /// It is no qcow2 image, one that cannot be served, or its file cannot be read.
    pub fn read(file: &impl ReadAt) -> Result<Self, ImageError> {
        let file_bytes = file.file_bytes()?;
        let mut first = vec![0; file_bytes.min(512) as usize];
        file.read_at(0, &mut first)?;
        let rest = header::cluster_bytes(&first).min(file_bytes) as usize;
        if rest > first.len() {
            first.resize(rest, 0);
            file.read_at(0, &mut first)?;
        }
        let header = Header::parse(&first)?;
        if first.len() < 512 {
            return Err(FormatError::Short("first cluster").into());
        }
        first.truncate(512);
        let within = |what, offset: u64, bytes: u64| {
            if offset + bytes > file_bytes.next_multiple_of(header.layout.cluster_bytes()) {
                return Err(FormatError::Short(what));
            }
            Ok(())
        };
        within("L1 table", header.l1_offset, header.l1_entries * 8)?;
        let table_bytes = header.refcount_table_clusters << header.layout.cluster_bits;
        within("refcount table", header.refcount_table_offset, table_bytes)?;
        let l1 = read_words(file, header.l1_offset, header.l1_entries)?.into_iter().map(L1Entry).collect();
        let refcount_table = read_words(file, header.refcount_table_offset, table_bytes / 8)?;
        Ok(Self { header, header_sector: first, l1, refcount_table, file_bytes })
    }
}

/// Reads `count` big-endian words.
pub(crate) fn read_words(file: &impl ReadAt, offset: u64, count: u64) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; count as usize * 8];
    file.read_at(offset, &mut bytes)?;
    Ok(crate::engine::to_words(&bytes))
}

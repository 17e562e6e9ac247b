//! The files that a disk is stored in.

use std::io;
use std::sync::Arc;

use qcow2::image::{Image, ReadAt};

use crate::backends::file::Opened;

/// All files of a disk. The top layer alone is written.
pub(super) struct Chain {
    /// The image that is served, and then each layer's backing layer. There is at least one.
    pub(super) layers: Vec<Layer>,
}

/// An image or a raw file.
pub(super) struct Layer {
    /// Its file.
    pub(super) file: Arc<Opened>,
    /// What guest data are in, if that is another file: each cluster at its guest offset.
    pub(super) data_file: Option<Arc<Opened>>,
    /// How the data are found.
    pub(super) format: Format,
}

/// Form of a layer's data.
pub(super) enum Format {
    /// As they are.
    Raw {
        /// Length in bytes, not of whole sectors only.
        bytes: u64,
    },
    /// By tables.
    Qcow2(Box<Image>),
}

/// A file whose tables are read.
pub(super) struct Tables<'a>(pub(super) &'a Opened);

impl ReadAt for Tables<'_> {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buffer)
    }

    fn file_bytes(&self) -> io::Result<u64> {
        self.0.file_bytes()
    }
}

//! The files that a disk is stored in: an image, the images and raw files that it is backed by, and the data files that any
//! of these have.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use qcow2::image::{Image, ReadAt};
use qcow2::repair::WriteAt;
use rustix::fs::{Advice, fadvise, fdatasync};
use rustix::io::{pread, pwrite, retry_on_intr};

use crate::backend::BackendError;
use crate::backends::file::Opened;
use crate::backends::file::hold::Hold;
use crate::backends::file::open::size;

/// All files of a disk. The top layer alone is written.
#[derive(Debug)]
pub(super) struct Chain {
    /// The image that is served, and then each layer's backing layer. There is at least one.
    pub(super) layers: Vec<Layer>,
}

/// An image or a raw file.
#[derive(Debug)]
pub(super) struct Layer {
    /// Its file.
    pub(super) file: Arc<Opened>,
    /// What guest data are in, if that is another file: each cluster at its guest offset.
    pub(super) data_file: Option<Arc<Opened>>,
    /// How the data are found.
    pub(super) format: Format,
}

/// Form of a layer's data.
#[derive(Debug)]
pub(super) enum Format {
    /// As they are.
    Raw {
        /// Length in bytes, not of whole sectors only.
        bytes: u64,
    },
    /// By tables.
    Qcow2(Box<Image>),
}

impl Chain {
    /// Every file, the top's first.
    pub(super) fn files(&self) -> impl Iterator<Item = &Arc<Opened>> {
        self.layers.iter().flat_map(|layer| std::iter::once(&layer.file).chain(&layer.data_file))
    }

    /// A hold on every file, for a queue. Waits for up to `limit` for each that another still has.
    ///
    /// # Errors
    /// Another process has one of the files, which the error names.
    pub(super) fn hold(&self, limit: Duration) -> Result<Vec<Hold>, BackendError> {
        self.files().map(|file| Hold::take(file, limit)).collect()
    }
}

impl Layer {
    /// Length of its disk in bytes. Beyond it, what lies above reads zeros.
    pub(super) fn disk_bytes(&self) -> u64 {
        match &self.format {
            Format::Raw { bytes } => *bytes,
            Format::Qcow2(image) => image.header.disk_bytes,
        }
    }
}

/// A file whose tables are read, and written before queues run, on the thread that opens it.
pub(super) struct Tables<'a>(pub(super) &'a Opened);

impl Tables<'_> {
    /// Drops what this host's memory has of the file: another host may have written it since.
    pub(super) fn forget(&self) {
        // Advice: where it cannot be followed, the page cache is the file system's to keep true.
        let _ = fadvise(self.file(), 0, None, Advice::DontNeed);
    }

    fn file(&self) -> &OwnedFd {
        &self.0.buffered
    }
}

impl ReadAt for Tables<'_> {
    fn read_at(&self, offset: u64, mut buffer: &mut [u8]) -> io::Result<()> {
        let mut at = offset;
        while !buffer.is_empty() {
            match retry_on_intr(|| pread(self.file(), &mut *buffer, at))? {
                0 => {
                    buffer.fill(0);
                    break;
                }
                len => {
                    at += len as u64;
                    buffer = &mut buffer[len..];
                }
            }
        }
        Ok(())
    }

    fn file_bytes(&self) -> io::Result<u64> {
        Ok(size(self.file())?)
    }
}

impl WriteAt for Tables<'_> {
    fn write_at(&mut self, offset: u64, mut data: &[u8]) -> io::Result<()> {
        let mut at = offset;
        while !data.is_empty() {
            match retry_on_intr(|| pwrite(self.file(), data, at))? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                len => {
                    at += len as u64;
                    data = &data[len..];
                }
            }
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(retry_on_intr(|| fdatasync(self.file()))?)
    }
}

//! A file that holds an image in a format of its own: what the format's backend needs of it beside transfers.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{fdatasync, ftruncate};
use rustix::io::{Errno, pread};

use super::{FileOptions, Kind, Opened, open};
use crate::backend::BackendError;

impl Opened {
    /// Opens the file or block device at `path`.
    ///
    /// # Errors
    /// It cannot be opened or locked, is neither a file nor a block device, or cannot do what `options` ask for.
    pub(crate) fn open(path: &Path, options: FileOptions) -> Result<Self, BackendError> {
        open::open(path, options)
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What was opened.
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// The least that storage takes, in bytes.
    pub(crate) fn logical_block_bytes(&self) -> u32 {
        self.logical_block_bytes
    }

    /// Length of the file in bytes.
    pub(crate) fn file_bytes(&self) -> io::Result<u64> {
        Ok(open::size(&self.buffered)?)
    }

    /// Fills `buffer` from `offset` on, with zeros beyond the end of the file. Waits.
    pub(crate) fn read_at(&self, mut offset: u64, mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            match pread(&self.buffered, &mut *buffer, offset) {
                Ok(0) => {
                    buffer.fill(0);
                    break;
                }
                Ok(read) => {
                    offset += read as u64;
                    buffer = &mut buffer[read..];
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Makes the file at least that long; what is new reads as zeros. False if it cannot be.
    pub(crate) fn extend(&self, bytes: u64) -> bool {
        let extended = open::size(&self.buffered).and_then(|now| match self.kind {
            _ if now >= bytes => Ok(()),
            Kind::Block => Err(Errno::NOSPC),
            _ => ftruncate(&self.buffered, bytes),
        });
        if let Err(error) = &extended {
            tracing::warn!(path = %self.path.display(), bytes, %error, "the image cannot grow");
        }
        extended.is_ok()
    }

    /// An open file of a thread's own. Where nothing is written none is needed that nobody else has.
    pub(crate) fn open_for_thread(&self) -> Result<OwnedFd, BackendError> {
        self.open_again()
            .map_err(|error| BackendError(format!("opening {} for a queue: {error}", self.path.display())))
    }

    /// Makes durable what was written.
    pub(crate) fn flush(&self) -> Result<(), BackendError> {
        self.flushed(fdatasync(&self.buffered))
            .map_err(|error| BackendError(format!("flushing {}: {error}", self.path.display())))
    }
}

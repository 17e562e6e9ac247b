//! A file that holds an image in a format of its own: what the format's backend needs of it beside transfers.

use std::os::fd::OwnedFd;

use rustix::fs::ftruncate;
use rustix::io::Errno;

use super::{Kind, Opened, open};
use crate::backend::BackendError;

impl Opened {
    /// What was opened.
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// The least that storage takes, in bytes.
    pub(crate) fn logical_block_bytes(&self) -> u32 {
        self.logical_block_bytes
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
        self.sync(&self.buffered)
            .map_err(|error| BackendError(format!("flushing {}: {error}", self.path.display())))
    }
}

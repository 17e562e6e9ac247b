//! Where the front end has the dirty log of a migration.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio::memory::{DirtyLog, Mapping, MappingError, Quota};
use virtio::{GuestAddr, MemoryError, UsedLog};

/// Why a dirty log was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LogError {
    #[error(transparent)]
    Mapping(#[from] MappingError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// Maps the log. It may be shorter than the guest's memory: the front end sizes it for what it tracks.
pub(crate) fn map(quota: &Quota, fd: &OwnedFd, offset: u64, len: u64) -> Result<DirtyLog, LogError> {
    let mapping = Mapping::within(quota, fd, offset, len)?;
    Ok(DirtyLog::new(Arc::new(mapping), 0, len as usize)?)
}

/// What a queue needs to log its writes.
pub(crate) fn of_queue(log: &DirtyLog, used_ring: Option<GuestAddr>) -> UsedLog {
    UsedLog { log: log.clone(), used_ring }
}

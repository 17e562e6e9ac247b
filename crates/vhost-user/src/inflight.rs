//! The memory in which requests in flight are recorded, beyond the life of this process.
//!
//! The front end asks for it once (GET_INFLIGHT_FD), keeps it, and hands it to whoever serves the device
//! (SET_INFLIGHT_FD): to us before the rings start, to our successor if we die. There is one record for each queue,
//! all of the same size, one after the other; what is in a record depends on the ring format that is negotiated.
//!
//! The memory also says whose driver it is about: the one whose requests stand there. It is new with each reset.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio::memory::{Mapping, MappingError, Quota};
use virtio::{Inflight, InflightError, RingFormat};

use crate::request::InflightInfo;

/// Which memory it is: device and inode of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RecordId(u64, u64);

impl RecordId {
    pub(crate) fn of(fd: &OwnedFd) -> io::Result<Self> {
        let stat = rustix::fs::fstat(fd)?;
        Ok(Self(stat.st_dev, stat.st_ino))
    }
}

/// The records of all queues.
pub(crate) struct Records {
    mapping: Arc<Mapping>,
    queues: u16,
    queue_size: u16,
}

/// New memory for `queues` records, zeroed, of fixed size.
pub(crate) fn allocate(
    format: RingFormat,
    queues: u16,
    queue_size: u16,
) -> Result<(InflightInfo, File), MappingError> {
    let len = Inflight::bytes(format, queue_size) as u64 * u64::from(queues);
    let (_, file) = Mapping::anonymous("vhost-user-inflight", len)?;
    Ok((InflightInfo { len, offset: 0, queues, queue_size }, file))
}

impl Records {
    pub(crate) fn map(quota: &Quota, info: InflightInfo, fd: &OwnedFd) -> Result<Self, MappingError> {
        let mapping = Arc::new(Mapping::within(quota, fd, info.offset, info.len)?);
        Ok(Self { mapping, queues: info.queues, queue_size: info.queue_size })
    }

    /// Whether a service has used them before.
    pub(crate) fn are_begun(&self, format: RingFormat) -> bool {
        let stride = Inflight::bytes(format, self.queue_size);
        (0..usize::from(self.queues)).any(|queue| Inflight::is_begun(self.mapping.clone(), queue * stride))
    }

    /// The record of a queue of `size` descriptors; None if the front end has none for it.
    pub(crate) fn of_queue(
        &self,
        index: u16,
        format: RingFormat,
        size: u16,
    ) -> Result<Option<Inflight>, InflightError> {
        if index >= self.queues {
            return Ok(None);
        }
        // A ring may be smaller than what was asked for; its record is, too, but stays in its place.
        let stride = Inflight::bytes(format, self.queue_size);
        let offset = stride * usize::from(index);
        if Inflight::bytes(format, size) > stride {
            return Err(InflightError::NoRoom(size, offset));
        }
        Inflight::new(format, self.mapping.clone(), offset, size).map(Some)
    }
}

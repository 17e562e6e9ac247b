//! Shared mappings of files that another process gave us.
//!
//! The file is not trusted. It may be shorter than claimed (refused here), be truncated later (caught by the SIGBUS
//! guard), or live on a file system that a user program serves, where a page fault waits for as long as that program
//! likes (refused by [`super::origin`]).
#![allow(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::origin::{self, Origin};
use super::quota::{self, Quota};
use super::{Backing, sigbus};

/// Why a file could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MappingError {
    /// Nothing to map, or offset and length leave the 64-bit range.
    #[error("mapping of {len} bytes at file offset {offset}: it must be non-empty and end below 2^63")]
    BadRange {
        /// Offset in the file, in bytes.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The file ends before the mapping would.
    #[error("the file has {have} bytes, but the mapping needs {need}")]
    FileTooShort {
        /// Size of the file in bytes.
        have: u64,
        /// Bytes needed from its start.
        need: u64,
    },
    /// A page fault on this file system could block for ever.
    #[error(
        "the file is served by a user process (FUSE); guest memory must be a memfd, shared memory or a local file"
    )]
    UserFileSystem,
    /// Nor can it be told that it would not.
    #[error(
        "the file is on a file system that is not mounted here, which a user process may serve (FUSE); guest memory must \
         be a memfd, shared memory or a local file"
    )]
    UnknownFileSystem,
    /// A device, a directory, a pipe.
    #[error("guest memory must be a memfd, shared memory or a regular file")]
    NotAFile,
    /// The system refused.
    #[error("cannot {what}: {source}")]
    System {
        /// What was being done.
        what: &'static str,
        /// The system's reason.
        source: rustix::io::Errno,
    },
    /// Too many mappings at once.
    #[error("more than {} shared mappings in this process", sigbus::MAPPINGS_MAX)]
    TooMany,
    /// The device has no room for another.
    #[error("more than {max} shared mappings for one device")]
    Quota {
        /// Its share of the mappings in this process.
        max: usize,
    },
    /// Nor for so much.
    #[error("{len} bytes more would be mapped than the {max_bytes} that one device may have")]
    QuotaBytes {
        /// Length in bytes.
        len: u64,
        /// Its share of this process's address space, in bytes.
        max_bytes: u64,
    },
}

/// A readable, writable, shared mapping of part of a file. Unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    /// What mmap returned: whole pages of the file system.
    map: NonNull<u8>,
    map_len: usize,
    /// Where in it the bytes asked for begin.
    skip: usize,
    len: usize,
    guard: sigbus::Guard,
    /// Held until the mapping is gone.
    _place: Option<quota::Place>,
}

// SAFETY: the mapping is plain shared memory; `Backing` hands out its address only.
unsafe impl Send for Mapping {}
// SAFETY: as for Send.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the `len` bytes at `offset` of `file`.
    ///
    /// # Errors
    /// See [`MappingError`]. The file may be closed afterwards.
    pub fn new(file: impl AsFd, offset: u64, len: u64) -> Result<Self, MappingError> {
        Self::map(file.as_fd(), offset, len, None)
    }

    /// The same within the share of the device that it is for.
    ///
    /// # Errors
    /// As for [`Mapping::new`], or the share is used up.
    pub fn within(quota: &Quota, file: impl AsFd, offset: u64, len: u64) -> Result<Self, MappingError> {
        let place = quota.take(len)?;
        Self::map(file.as_fd(), offset, len, Some(place))
    }

    fn map(
        file: BorrowedFd<'_>,
        offset: u64,
        len: u64,
        place: Option<quota::Place>,
    ) -> Result<Self, MappingError> {
        let system = |what| move |source| MappingError::System { what, source };
        let bad = MappingError::BadRange { offset, len };
        let end = offset.checked_add(len).filter(|&end| len != 0 && end < 1 << 62).ok_or(bad)?;

        // Told at once: closing a file waits for whoever serves it, and an error may be told only after that.
        let told = |error: &MappingError| tracing::warn!(%error, "a file is not mapped");
        let Origin { bytes: have, page_bytes: page } = origin::examine(file).inspect_err(told)?;
        if have < end {
            return Err(MappingError::FileTooShort { have, need: end });
        }
        let map_offset = offset - offset % page;
        let map_len = (end - map_offset).next_multiple_of(page) as usize;
        // SAFETY: a new mapping at an address of the kernel's choice affects no existing memory.
        let map = unsafe {
            mmap(
                std::ptr::null_mut(),
                map_len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                file,
                map_offset,
            )
        }
        .map_err(system("map the file"))?;
        let Some(guard) = sigbus::Guard::new(map.addr(), map_len, page as usize) else {
            // SAFETY: mapped just above, not handed out yet.
            let _ = unsafe { munmap(map, map_len) };
            return Err(MappingError::TooMany);
        };
        let map = NonNull::new(map.cast()).expect("mmap without MAP_FIXED never returns address 0");
        Ok(Self {
            map,
            map_len,
            skip: (offset - map_offset) as usize,
            len: len as usize,
            guard,
            _place: place,
        })
    }

    /// Whether a file may be mapped at all, whatever its size. Asks nobody who may not answer.
    ///
    /// # Errors
    /// See [`MappingError`].
    pub fn check(file: impl AsFd) -> Result<(), MappingError> {
        origin::examine(file.as_fd()).map(drop)
    }

    /// Maps `len` bytes of new anonymous shared memory (a memfd), and returns the file too.
    ///
    /// # Errors
    /// As for [`Mapping::new`], or the file cannot be made.
    pub fn anonymous(name: &str, len: u64) -> Result<(Self, std::fs::File), MappingError> {
        use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
        let system = |what| move |source| MappingError::System { what, source };
        let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(system("create shared memory"))?;
        ftruncate(&fd, len).map_err(system("size shared memory"))?;
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(system("seal shared memory"))?;
        Ok((Self::new(&fd, 0, len)?, fd.into()))
    }
}

// SAFETY: `map` mapped `map_len` bytes for reading and writing, of which these are a part; `drop` alone unmaps them, and
// what mends a lost page puts another in its place.
unsafe impl Backing for Mapping {
    fn base(&self) -> NonNull<u8> {
        // SAFETY: `skip` bytes lie before the `len` bytes asked for, inside the mapping.
        unsafe { self.map.add(self.skip) }
    }

    fn len(&self) -> usize {
        self.len
    }

    fn is_poisoned(&self) -> bool {
        self.guard.is_poisoned()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // The guard goes first: a fault in an address range that is no longer ours must not be mended.
        self.guard.release();
        // SAFETY: mapped in `map` with this length; segments and areas that point here keep `self` alive.
        let _ = unsafe { munmap(self.map.as_ptr().cast(), self.map_len) };
    }
}

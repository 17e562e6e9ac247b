//! Keeps two services from writing one image.
//!
//! The lock belongs to the open file description (`fcntl(2)`, F_OFD_SETLK): it is gone when the last descriptor is,
//! however the process ends, and other descriptors of the same file do not drop it. QEMU locks single bytes of images
//! in the same way, so ours, which covers all, keeps it out too.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Locks the file for writing (nobody else may have it) or reading (nobody may write it).
///
/// # Errors
/// `WouldBlock` if somebody else has it.
pub(crate) fn lock(file: impl AsFd, write: bool) -> io::Result<()> {
    let kind = if write { libc::F_WRLCK } else { libc::F_RDLCK };
    let lock =
        libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: 0, l_len: 0, l_pid: 0 };
    // SAFETY: the descriptor is open and `lock` is a complete `struct flock`; the call only reads it.
    let result = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

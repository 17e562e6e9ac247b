//! Keeps two services from writing one image.
//!
//! The locks belong to the open file description (`fcntl(2)`, F_OFD_SETLK): they are gone when the last reference to it
//! is, however the process ends, and other descriptors of the same file do not drop them. A reference is also what an
//! io_uring has that knows the file. QEMU locks single bytes of images in the same way, at 100 and from 200 on, which
//! ours cover to keep it out too.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a lock is waited for that a killed process may still have. Healthy storage needs tens of milliseconds.
pub(crate) const WAIT: Duration = Duration::from_secs(10);
/// After which time the log says that something is waited for.
const QUIET: Duration = Duration::from_secs(1);
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(5);

/// A range of bytes. No data need be there: locks only agree on names.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Range {
    start: i64,
    /// 0: to the end of all offsets.
    len: i64,
}

/// Everything.
pub(crate) const ALL: Range = Range { start: 0, len: 0 };
/// Locked while requests are carried out. It has all bytes that an image can have, and those that QEMU locks.
pub(crate) const USE: Range = Range { start: 0, len: 1 << 62 };
/// Locked by whoever has said that the image is its own, also while it carries out nothing.
pub(crate) const OWNERSHIP: Range = Range { start: 1 << 62, len: 0 };

/// Locks a range for writing (nobody else may have it) or reading (nobody may write it).
///
/// # Errors
/// `WouldBlock` if somebody else has it.
pub(crate) fn lock(file: impl AsFd, range: Range, write: bool) -> io::Result<()> {
    ask(&file, libc::F_OFD_SETLK, range, kind(write)).map(|_| ())
}

/// Gives a range back.
///
/// # Errors
/// The system's.
pub(crate) fn unlock(file: impl AsFd, range: Range) -> io::Result<()> {
    ask(&file, libc::F_OFD_SETLK, range, libc::F_UNLCK).map(|_| ())
}

/// Whether [`lock`] would work now.
///
/// # Errors
/// As for [`lock`].
pub(crate) fn test(file: impl AsFd, range: Range, write: bool) -> io::Result<()> {
    let found = ask(&file, libc::F_OFD_GETLK, range, kind(write))?;
    if found == libc::F_UNLCK { Ok(()) } else { Err(io::ErrorKind::WouldBlock.into()) }
}

/// Makes attempts until one does not end in `WouldBlock`, or `limit` has passed.
///
/// # Errors
/// The last attempt's.
pub(crate) fn wait(
    path: &Path,
    limit: Duration,
    mut attempt: impl FnMut() -> io::Result<()>,
) -> io::Result<()> {
    let (begin, mut said) = (Instant::now(), false);
    loop {
        match attempt() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && begin.elapsed() < limit => {}
            result => return result,
        }
        if !said && begin.elapsed() >= QUIET && limit > QUIET {
            said = true;
            let limit_s = limit.as_secs();
            tracing::warn!(path = %path.display(), limit_s, "image locked: waiting for the process that uses it, or for requests that a killed one has left");
        }
        std::thread::sleep(PAUSE);
    }
}

fn kind(write: bool) -> i32 {
    if write { libc::F_WRLCK } else { libc::F_RDLCK }
}

/// Carries out `command`; what kind of lock the answer names.
fn ask(file: &impl AsFd, command: i32, range: Range, kind: i32) -> io::Result<i32> {
    let mut lock = libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: range.start,
        l_len: range.len,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open and `lock` is a complete `struct flock`, which is all that the call reads or writes.
    let result = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), command, &raw mut lock) };
    if result == 0 { Ok(lock.l_type.into()) } else { Err(io::Error::last_os_error()) }
}

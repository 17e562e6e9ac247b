//! Locks on images, between services and against QEMU.
//!
//! The locks belong to the open file description (`fcntl(2)`, F_OFD_SETLK): they are gone when the last reference to it
//! is, however the process ends, and other descriptors of the same file do not drop them. A reference is also what an
//! io_uring has that knows the file.
//!
//! Services lock a range each for what they do. QEMU has a protocol of its own: for each thing that it does to an image it
//! holds a read lock on a byte from 100 on, for each thing that others must not do one on a byte from 200 on, and looks
//! first whether the opposite byte is locked.
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

/// Locked while requests are carried out. It begins behind QEMU's bytes.
pub(crate) const USE: Range = Range { start: 1 << 10, len: (1 << 62) - (1 << 10) };
/// Locked by a service that has the image to itself, also while it carries out nothing.
pub(crate) const OWNERSHIP: Range = Range { start: 1 << 62, len: 1 };
/// Locked by an owner for as long as it keeps QEMU out. A service that shares the image with it, for a guest to be handed
/// over, finds QEMU's bytes locked and knows by this that it was not QEMU.
pub(crate) const GUARD: Range = Range { start: (1 << 62) + 1, len: 0 };

/// What QEMU tells apart: the offset of each thing's byte in both ranges.
const QEMU_CONSISTENT_READ: i64 = 0;
const QEMU_WRITE: i64 = 1;
const QEMU_WRITE_UNCHANGED: i64 = 2;
const QEMU_RESIZE: i64 = 3;
/// The first byte of what is done.
const QEMU_DOES: i64 = 100;
/// The first byte of what others must not do.
const QEMU_FORBIDS: i64 = 200;
/// What a service does to an image.
const READS: &[i64] = &[QEMU_CONSISTENT_READ];
const WRITES: &[i64] = &[QEMU_CONSISTENT_READ, QEMU_WRITE, QEMU_RESIZE];
/// What nobody else may do to it. To read it is up to the reader (`qemu-img -U`).
const FORBIDDEN: &[i64] = &[QEMU_WRITE, QEMU_WRITE_UNCHANGED, QEMU_RESIZE];

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

/// Keeps QEMU and its tools from writing the image, and from reading it as one that does not change if it is to be written.
///
/// # Errors
/// `WouldBlock` if one of them has the image. Nothing is locked then.
pub(crate) fn keep_qemu_out(file: impl AsFd, write: bool) -> io::Result<()> {
    // Looked at first so that waiting leaves no traces for others to meet.
    qemu_is_out(&file, write)?;
    let locked = qemu_bytes(write).try_for_each(|(own, _)| lock(&file, own, false));
    locked.and_then(|()| qemu_is_out(&file, write)).inspect_err(|_| {
        let _ = let_qemu_in(&file);
    })
}

/// Whether QEMU lets us do what we would, and does nothing that it must not do then. While another service has the guard,
/// it is that one's bytes which are locked.
fn qemu_is_out(file: impl AsFd, write: bool) -> io::Result<()> {
    match test(&file, GUARD, false) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
        Err(error) => Err(error),
        Ok(()) => qemu_bytes(write).try_for_each(|(_, opposite)| test(&file, opposite, true)),
    }
}

/// No longer keeps QEMU out.
///
/// # Errors
/// The system's.
pub(crate) fn let_qemu_in(file: impl AsFd) -> io::Result<()> {
    qemu_bytes(true).try_for_each(|(own, _)| unlock(&file, own))
}

/// The bytes to lock, each with the one that must not be locked then.
fn qemu_bytes(write: bool) -> impl Iterator<Item = (Range, Range)> {
    let byte = |start| Range { start, len: 1 };
    let done = if write { WRITES } else { READS };
    let done = done.iter().map(move |thing| (byte(QEMU_DOES + thing), byte(QEMU_FORBIDS + thing)));
    let forbidden = FORBIDDEN.iter().map(move |thing| (byte(QEMU_FORBIDS + thing), byte(QEMU_DOES + thing)));
    done.chain(forbidden)
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

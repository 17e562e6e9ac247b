//! The lease on a guest's memory: a lock on the record of requests in flight.
//!
//! Whoever gets that record carries out again what it finds there, and until that is done the guest's buffers must be
//! reached by nobody else: not by another service, and not by the kernel on behalf of one that was killed. So a session
//! locks the file, and the lock goes where the memory goes ([`virtio::memory::Lease`]).
//!
//! The lock is on an open file of our own, because that of the front end is the front end's to unlock. It can also keep the
//! lock to itself, which costs it its own device and nobody else anything.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::fs::{FileType, FlockOperation, Mode, OFlags, Stat, flock, fstat, fstatfs, open};
use rustix::io::Errno;
use virtio::memory::Lease;

/// How long a predecessor is waited for. Requests of a killed one take tens of milliseconds on healthy storage.
pub(crate) const WAIT: Duration = Duration::from_secs(10);
/// After which time the log says that something is waited for.
const QUIET: Duration = Duration::from_secs(1);
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(5);
/// `TMPFS_MAGIC` and `HUGETLBFS_MAGIC`, linux/magic.h: what shared memory is made of. Nobody else is asked when such
/// a file is opened or locked.
const MEMORY_MAGIC: [u64; 2] = [0x0102_1994, 0x958_458f6];

/// Somebody else has the lock.
#[derive(Debug, thiserror::Error)]
#[error(
    "it is locked, for {0:?} by now: another service serves this guest, or requests of a killed one do not end"
)]
pub struct LeaseError(pub Duration);

/// A lease, and on which file it is.
#[derive(Clone)]
pub(crate) struct RecordLease {
    pub(crate) lease: Lease,
    device_inode: (u64, u64),
}

impl RecordLease {
    /// Takes the lease for the file behind `record`, or shares `present` if that is for the same. Waits for up to `limit`.
    /// None if the file is none that can be locked: a decent front end's can.
    pub(crate) fn take(
        record: &OwnedFd,
        present: Option<&Self>,
        limit: Duration,
    ) -> Result<Option<Self>, LeaseError> {
        let without = |what: &str, error: Errno| {
            tracing::debug!(%error, "no lease on guest memory: {what}");
            Ok(None)
        };
        let stat = match shared_memory(record) {
            Ok(stat) => stat,
            Err(error) => return without("examining the record", error),
        };
        let device_inode = (stat.st_dev, stat.st_ino);
        if let Some(present) = present.filter(|present| present.device_inode == device_inode) {
            return Ok(Some(present.clone()));
        }
        let path = format!("/proc/self/fd/{}", record.as_raw_fd());
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let own = match open(&*path, flags, Mode::empty()) {
            Ok(own) => own,
            Err(error) => return without("opening the record", error),
        };
        match lock(&own, limit) {
            Ok(()) => Ok(Some(Self { lease: Lease::new(Locked(own)), device_inode })),
            Err(Errno::WOULDBLOCK) => Err(LeaseError(limit)),
            Err(error) => without("locking the record", error),
        }
    }
}

/// What the file is, if it is shared memory.
fn shared_memory(record: &OwnedFd) -> Result<Stat, Errno> {
    let stat = fstat(record)?;
    let is_memory = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
        && MEMORY_MAGIC.contains(&(fstatfs(record)?.f_type as u64));
    if is_memory { Ok(stat) } else { Err(Errno::INVAL) }
}

fn lock(file: &OwnedFd, limit: Duration) -> Result<(), Errno> {
    let (begin, mut said) = (Instant::now(), false);
    loop {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::INTR) => continue,
            Err(Errno::WOULDBLOCK) if begin.elapsed() < limit => {}
            result => return result,
        }
        if !said && begin.elapsed() >= QUIET {
            said = true;
            let limit_s = limit.as_secs();
            tracing::warn!(
                limit_s,
                "guest memory in use: waiting for another service, or for requests that a killed one has left"
            );
        }
        std::thread::sleep(PAUSE);
    }
}

/// A locked file.
struct Locked(OwnedFd);

impl AsFd for Locked {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        // Not left to the kernel, which may let go of what it was to keep some time after it could.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

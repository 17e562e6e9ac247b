//! Making a descriptor of our own from a bare number.
//!
//! [`Poller::wake_fds`](crate::Poller::wake_fds) gives numbers, because the descriptors belong to files that the
//! poller goes on using. Unsafe is needed once, to borrow such a number for the one call that duplicates it. That
//! call reads no memory and reports a number that is not open; what comes back is owned like any other descriptor.
#![allow(unsafe_code)]

use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

use rustix::io::{Errno, fcntl_dupfd_cloexec};

/// Another descriptor for the file behind `fd`, closed on exec. `EBADF` if `fd` is not open.
pub(crate) fn duplicate(fd: RawFd) -> rustix::io::Result<OwnedFd> {
    if fd < 0 {
        return Err(Errno::BADF);
    }
    // SAFETY: `fd` is not -1, and it is only passed to `fcntl(F_DUPFD_CLOEXEC)`, which fails with EBADF if it is
    // not open. That it stays open for the call is what `Poller::wake_fds` asks of its implementors.
    let file = unsafe { BorrowedFd::borrow_raw(fd) };
    fcntl_dupfd_cloexec(file, 0)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn a_duplicate_outlives_its_original_and_a_number_that_is_not_open_has_none() {
        let original = std::fs::File::open("/dev/null").unwrap();
        let fd = original.as_raw_fd();
        let copy = duplicate(fd).unwrap();
        drop(original);
        assert_ne!(copy.as_raw_fd(), fd);
        rustix::fs::fstat(&copy).unwrap();
        assert_eq!(duplicate(-1).unwrap_err(), Errno::BADF);
        assert_eq!(duplicate(i32::MAX).unwrap_err(), Errno::BADF);
    }
}

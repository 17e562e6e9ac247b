//! Facts about block devices that only an `ioctl(2)` tells.
//!
//! What such a call reads and writes depends on its number, which the compiler knows nothing of: each is made in one place
//! here, with the type that goes with it.
#![allow(unsafe_code)]

use std::os::fd::AsFd;

use rustix::ioctl::{Getter, ioctl, opcode};

/// `BLKROGET`, linux/fs.h.
const READ_ONLY: rustix::ioctl::Opcode = opcode::none(0x12, 94);

/// Whether a block device takes no writes. It can be opened for writing all the same.
pub(super) fn is_read_only(device: impl AsFd) -> rustix::io::Result<bool> {
    // SAFETY: this request writes one C `int` to its argument, and nothing else.
    let flag = unsafe { ioctl(device, Getter::<READ_ONLY, libc::c_int>::new()) }?;
    Ok(flag != 0)
}

//! Opens a file and finds out what it can do.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, SeekFrom, StatxFlags, fstat, fstatfs, ioctl_blkpbszget, ioctl_blksszget,
    openat, seek, statx,
};
use rustix::io::Errno;

use super::blocks::Blocks;
use super::bounce::{BOUNCE_BYTES, Bounce, PAGE_BYTES};
use super::{Direct, DirectAlign, Engine, FileOptions, Kind, Lock, Opened, device, hold, ring};
use crate::backend::BackendError;

/// `TMPFS_MAGIC`, linux/magic.h.
const TMPFS_MAGIC: u64 = 0x0102_1994;
/// What is said of a file that is locked.
const IN_USE: &str = "another process uses it (lock=late opens it all the same and waits when a guest comes, lock=off overrides)";
/// The least and most of what is announced as a unit.
const BLOCK_BYTES_MIN: u32 = 512;
const BLOCK_BYTES_MAX: u32 = 4096;

/// Opens `path`, a disk by itself.
pub(super) fn open(path: &Path, options: FileOptions) -> Result<Opened, BackendError> {
    let opened = open_part(path, options)?;
    let bytes = size(&opened.buffered).map_err(|e| failed(path, "reading its size", &e))?;
    if bytes < 512 {
        let hint =
            if opened.kind == Kind::Block { "the device has no medium" } else { "give it a size first" };
        let error = format!("it has {bytes} bytes, and a disk has at least 512: {hint}");
        return Err(failed(path, "its size", &error));
    }
    if bytes % 512 != 0 {
        tracing::warn!(path = %path.display(), bytes, "the bytes beyond the last whole sector cannot be reached");
    }
    Ok(opened)
}

fn failed(path: &Path, what: &str, error: &dyn std::fmt::Display) -> BackendError {
    BackendError(format!("opening {}: {what}: {error}", path.display()))
}

/// Opens `path`, a file of an image, which says itself how much of it is there.
pub(crate) fn open_part(path: &Path, options: FileOptions) -> Result<Opened, BackendError> {
    let failed = |what: &str, error: &dyn std::fmt::Display| failed(path, what, error);
    let name = CString::new(path.as_os_str().as_bytes()).map_err(|e| failed("bad path", &e))?;
    let access = if options.read_only { OFlags::RDONLY } else { OFlags::RDWR };
    let reopen =
        |flags| openat(rustix::fs::CWD, name.as_c_str(), access | OFlags::CLOEXEC | flags, Mode::empty());

    // Non-blocking, so that a FIFO does not stop us before it is refused.
    let buffered = reopen(OFlags::NONBLOCK).map_err(|e| failed(permission(options), &e))?;
    let stat = fstat(&buffered).map_err(|e| failed("examining it", &e))?;
    let fs = fstatfs(&buffered).map_err(|e| failed("examining its file system", &e))?;
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile if fs.f_type as u64 == TMPFS_MAGIC => Kind::Tmpfs,
        FileType::RegularFile => Kind::Regular,
        FileType::BlockDevice => Kind::Block,
        _ => return Err(failed("it must be a regular file or a block device", &"it is something else")),
    };
    rustix::fs::fcntl_setfl(&buffered, OFlags::empty()).map_err(|e| failed("making it wait", &e))?;
    let owner = match options.lock {
        Lock::On => Some(reopen(OFlags::NONBLOCK).map_err(|e| failed(permission(options), &e))?),
        Lock::Late | Lock::Off => None,
    };
    if let Some(owner) = &owner {
        hold::own(owner, &buffered, path, !options.read_only).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => failed("locking it", &IN_USE),
            _ => failed("locking it", &error),
        })?;
        if !same_file(owner, &stat) {
            return Err(failed("locking it", &"it was replaced by another file meanwhile"));
        }
    }
    let bytes = size(&buffered).map_err(|e| failed("reading its size", &e))?;
    if kind == Kind::Block && !options.read_only && device::is_read_only(&buffered).unwrap_or(false) {
        let error = "the device is read-only, and can only be served as a read-only disk";
        return Err(failed(permission(options), &error));
    }
    engine(path, kind, options).map_err(|e| failed("engine=uring", &e))?;
    let direct = match options.direct {
        Direct::Off => None,
        Direct::Auto if kind == Kind::Tmpfs => None,
        Direct::Auto | Direct::On => {
            let opened = reopen(OFlags::DIRECT).ok().filter(|fd| same_file(fd, &stat));
            let found = direct(opened, bytes, options);
            match found {
                Ok(direct) => Some(direct),
                Err(why) if options.direct == Direct::On => return Err(failed("direct=on", &why)),
                Err(why) => {
                    tracing::warn!(path = %path.display(), why, "the page cache is used");
                    None
                }
            }
        }
    };
    let natural = match kind {
        Kind::Block => ioctl_blkpbszget(&buffered).unwrap_or(BLOCK_BYTES_MIN),
        _ => u32::try_from(stat.st_blksize).unwrap_or(BLOCK_BYTES_MAX),
    };
    let block_bytes = natural.clamp(BLOCK_BYTES_MIN, BLOCK_BYTES_MAX).next_power_of_two();
    let unit = direct.as_ref().map(|(_, align)| align.file);
    let sector_bytes = (kind == Kind::Block).then(|| ioctl_blksszget(&buffered).unwrap_or(BLOCK_BYTES_MAX));
    // The page cache takes less of a file's blocks than its storage does.
    let logical = unit.or(sector_bytes.map(u64::from)).unwrap_or(BLOCK_BYTES_MIN.into());
    let zero_unit = match sector_bytes {
        Some(sector_bytes) => sector_bytes.into(),
        // A file system zeroes a part of a block by way of the page cache.
        _ if direct.is_some() => block_bytes.into(),
        _ => 1,
    };
    let opened = Opened {
        path: path.to_owned(),
        zero_unit: zero_unit.max(unit.unwrap_or(1)),
        blocks: unit.filter(|&unit| unit > 512 && !options.read_only).map(Blocks::new),
        // An image in it grows without asking.
        bytes: AtomicU64::new(if options.image { i64::MAX as u64 } else { bytes & !511 }),
        sizing: Mutex::default(),
        was_cut: AtomicBool::new(false),
        is_cached: AtomicBool::new(false),
        flush_failed: AtomicBool::new(false),
        short_said: AtomicBool::new(false),
        block_bytes,
        logical_block_bytes: logical.clamp(BLOCK_BYTES_MIN.into(), BLOCK_BYTES_MAX.into()) as u32,
        buffered,
        direct,
        owner,
        users: Mutex::default(),
        options,
        kind,
    };
    tracing::debug!(?opened, bytes, "opened");
    Ok(opened)
}

fn permission(options: FileOptions) -> &'static str {
    if options.read_only { "for reading" } else { "for reading and writing" }
}

/// Its size in bytes: that of a block device is where it ends.
pub(crate) fn size(file: impl AsFd) -> Result<u64, Errno> {
    seek(file, SeekFrom::End(0))
}

/// Whether io_uring is to be had. Where it may be something else, that is said here, and not only when a guest comes.
fn engine(path: &Path, kind: Kind, options: FileOptions) -> io::Result<()> {
    if !options.engine.wants_uring(kind) {
        return Ok(());
    }
    match ring::probe(options.sqpoll_ms) {
        Err(error) if options.engine == Engine::Auto => {
            tracing::warn!(path = %path.display(), %error, "no io_uring: I/O threads will wait for each request");
            Ok(())
        }
        result => result,
    }
}

/// Whether the path still leads to what was opened (and locked) first.
fn same_file(file: &OwnedFd, stat: &rustix::fs::Stat) -> bool {
    fstat(file).is_ok_and(|again| (again.st_dev, again.st_ino) == (stat.st_dev, stat.st_ino))
}

/// The way past the page cache, if it can be taken always: bytes that are reached both ways would differ.
fn direct(
    file: Option<OwnedFd>,
    bytes: u64,
    options: FileOptions,
) -> Result<(OwnedFd, DirectAlign), &'static str> {
    const CANNOT: &str = "its file system cannot bypass the page cache";
    let file = file.ok_or(CANNOT)?;
    let mut align = direct_align(&file, bytes).ok_or(CANNOT)?;
    align.file = align.file.max(options.unit_bytes_min);
    if align.memory > PAGE_BYTES || align.file > BOUNCE_BYTES / 2 {
        return Err("its storage wants transfers aligned to more than is supported without the page cache");
    }
    if !bytes.is_multiple_of(align.file) && align.file > 512 && !options.image {
        return Err(
            "its size is no multiple of its storage's blocks, which is all that can be had without the page cache",
        );
    }
    Ok((file, align))
}

/// What the file system says direct transfers must be aligned to, or, where it says nothing, what it accepts.
fn direct_align(file: &OwnedFd, bytes: u64) -> Option<DirectAlign> {
    if let Ok(found) = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
        && StatxFlags::from_bits_retain(found.stx_mask).contains(StatxFlags::DIOALIGN)
    {
        let (memory, file) = (found.stx_dio_mem_align, found.stx_dio_offset_align);
        return (memory.is_power_of_two() && file.is_power_of_two())
            .then(|| DirectAlign { memory: memory.max(1) as usize, file: u64::from(file).max(512) });
    }
    [512, 4096]
        .into_iter()
        .find(|&align| Bounce::probe(file, align, bytes))
        .map(|align| DirectAlign { memory: align, file: align as u64 })
}

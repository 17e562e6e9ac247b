//! Whose file it is that a peer wants mapped, found out without asking whoever may serve it.
//!
//! A user program can serve a file system (FUSE), and then `fstat`, `fstatfs` and every page fault wait for as long
//! as that program likes. `F_GET_SEALS` is answered by the kernel alone, and only for files that are memory: memfds,
//! shared memory, huge pages. Of any other file, `statx` without synchronization tells the mount and the device, and
//! the table of mounts tells what file system that is.

use std::os::fd::BorrowedFd;

use rustix::fs::{AtFlags, FileType, Statx, StatxFlags, fcntl_get_seals, fstat, fstatfs, statx};

use super::mapping::MappingError;

/// `HUGETLBFS_MAGIC`, linux/magic.h.
const HUGETLBFS_MAGIC: u64 = 0x958_458f6;
const PAGE_BYTES: u64 = 4096;
/// The mounts that this process sees (proc(5)).
const MOUNTS: &str = "/proc/self/mountinfo";

/// What a mapping needs to know of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Origin {
    /// Its size.
    pub(super) bytes: u64,
    /// The unit in which it can be mapped and unmapped.
    pub(super) page_bytes: u64,
}

/// Examines a file, and refuses it if a user program may serve it.
pub(super) fn examine(file: BorrowedFd<'_>) -> Result<Origin, MappingError> {
    let system = |what| move |source| MappingError::System { what, source };
    if fcntl_get_seals(file).is_ok() {
        let stat = fstat(file).map_err(system("examine the file"))?;
        let kind = fstatfs(file).map_err(system("examine the file system"))?.f_type as u64;
        // Huge pages can only be mapped and unmapped whole.
        let page_bytes = match kind {
            HUGETLBFS_MAGIC => (stat.st_blksize as u64).max(PAGE_BYTES),
            _ => PAGE_BYTES,
        };
        return Ok(Origin { bytes: u64::try_from(stat.st_size).unwrap_or(0), page_bytes });
    }
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let wanted = StatxFlags::TYPE | StatxFlags::SIZE | StatxFlags::MNT_ID;
    let found = statx(file, c"", flags, wanted).map_err(system("examine the file"))?;
    if FileType::from_raw_mode(found.stx_mode.into()) != FileType::RegularFile {
        return Err(MappingError::NotAFile);
    }
    // Not to be read: then only files on disks are known for what they are.
    let mounts = std::fs::read_to_string(MOUNTS).unwrap_or_default();
    check(&mounts, &found)?;
    Ok(Origin { bytes: found.stx_size, page_bytes: PAGE_BYTES })
}

/// Refuses a file that a user program serves, or may serve for all that can be seen from here.
fn check(mounts: &str, file: &Statx) -> Result<(), MappingError> {
    match file_system(mounts, file) {
        Some(name) if name.starts_with("fuse") || name == "virtiofs" => Err(MappingError::UserFileSystem),
        Some(_) => Ok(()),
        // Mounted elsewhere only, like all that a user can mount without privilege; those have no block device.
        None if file.stx_dev_major == 0 => Err(MappingError::UnknownFileSystem),
        None => Ok(()),
    }
}

/// The file system of a file, by its mount, or by its device if it was opened through a mount of another namespace.
fn file_system<'a>(mounts: &'a str, file: &Statx) -> Option<&'a str> {
    let device = format!("{}:{}", file.stx_dev_major, file.stx_dev_minor);
    let mount = (file.stx_mask & StatxFlags::MNT_ID.bits() != 0).then(|| file.stx_mnt_id.to_string());
    let column = |line: &'a str, index: usize| line.split(' ').nth(index);
    let by_mount = |line: &&'a str| column(line, 0) == mount.as_deref() && mount.is_some();
    let by_device = |line: &&'a str| column(line, 2) == Some(&device);
    let line = mounts.lines().find(by_mount).or_else(|| mounts.lines().find(by_device))?;
    line.split_once(" - ")?.1.split(' ').next()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    const TABLE: &str = "\
        27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n\
        31 27 0:40 / /home/me/mnt rw,nosuid - fuse.sshfs me@there:/ rw,user_id=1000\n\
        32 27 0:41 / /shared rw - virtiofs tag rw\n\
        33 27 0:42 / /var rw - btrfs /dev/vdb rw\n";

    fn file(mount: u64, major: u32, minor: u32) -> Statx {
        let here = std::fs::File::open("/").unwrap();
        let mut found = statx(&here, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID).unwrap();
        found.stx_mask |= StatxFlags::MNT_ID.bits();
        (found.stx_mnt_id, found.stx_dev_major, found.stx_dev_minor) = (mount, major, minor);
        found
    }

    #[test]
    fn files_that_user_programs_serve_are_told_from_others() {
        let refused = |mount, major, minor| check(TABLE, &file(mount, major, minor)).unwrap_err();
        assert!(matches!(refused(31, 0, 40), MappingError::UserFileSystem));
        assert!(matches!(refused(32, 0, 41), MappingError::UserFileSystem));
        assert!(matches!(refused(99, 0, 40), MappingError::UserFileSystem), "by its device");
        assert!(matches!(refused(99, 0, 77), MappingError::UnknownFileSystem));
        check(TABLE, &file(27, 254, 0)).unwrap();
        check(TABLE, &file(99, 254, 0)).unwrap();
        // A subvolume has a device of its own.
        check(TABLE, &file(33, 0, 55)).unwrap();
        check("", &file(99, 254, 0)).unwrap();
    }

    #[test]
    fn what_front_ends_pass_is_accepted() {
        let len = 3 * PAGE_BYTES;
        let fd = rustix::fs::memfd_create("memory", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let name = format!("exitless-origin-{}", std::process::id());
        let places = ["/dev/shm".into(), std::env::temp_dir(), std::env::current_dir().unwrap()];
        let files = places.map(|place| {
            let path = place.join(&name);
            let file = std::fs::File::create_new(&path).unwrap();
            std::fs::remove_file(path).unwrap();
            file.into()
        });
        for fd in std::iter::once(fd).chain(files) {
            rustix::fs::ftruncate(&fd, len).unwrap();
            assert_eq!(examine(fd.as_fd()).unwrap(), Origin { bytes: len, page_bytes: PAGE_BYTES });
        }
    }

    #[test]
    fn what_is_no_file_is_refused() {
        for path in ["/dev/null", "/"] {
            let file = std::fs::File::open(path).unwrap();
            assert!(matches!(examine(file.as_fd()), Err(MappingError::NotAFile)), "{path}");
        }
    }
}

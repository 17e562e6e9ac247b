//! What stands behind the disk: nothing, memory, a file on tmpfs, or a file on a disk opened with `O_DIRECT`.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{OFlags, fstatfs};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

/// `TMPFS_MAGIC`, linux/magic.h.
const TMPFS_MAGIC: u64 = 0x0102_1994;
const NULL_BYTES: u64 = 8 << 30;
/// Several times the last-level cache that one core can expect to have for itself.
const MEMORY_BYTES: u64 = 128 << 20;
const TMPFS_BYTES: u64 = 256 << 20;
const DISK_BYTES: u64 = 1 << 30;
const DISK_QUICK_BYTES: u64 = 256 << 20;

/// The kinds of backend that cases name and peers map to their own options.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum BackendKind {
    /// Completes without moving data.
    Null,
    /// The server's own memory.
    Memory,
    /// A file on tmpfs, through the server's file backend.
    Tmpfs,
    /// A file on a disk, through the server's file backend with `O_DIRECT`.
    Disk,
}

impl BackendKind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Memory => "memory",
            Self::Tmpfs => "tmpfs",
            Self::Disk => "disk",
        }
    }
}

/// The disk that a server is told to serve.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) kind: BackendKind,
    pub(crate) bytes: u64,
    /// The file, for the backends that have one.
    pub(crate) path: Option<PathBuf>,
}

/// The scratch files of a run. They are made when first needed and removed when this is dropped.
pub(crate) struct Storage {
    disk_folder: PathBuf,
    disk_bytes: u64,
    tmpfs: Option<(TempDir, Target)>,
    disk: Option<(TempDir, Target)>,
}

impl Storage {
    /// Where the disk file goes.
    pub(crate) fn folder(&self) -> &Path {
        &self.disk_folder
    }

    /// `disk_folder` is where the disk file goes.
    pub(crate) fn new(disk_folder: Option<&Path>, quick: bool) -> Self {
        let default = if is_tmpfs(&std::env::temp_dir()) { "/var/tmp".into() } else { std::env::temp_dir() };
        Self {
            disk_folder: disk_folder.map_or(default, Path::to_owned),
            disk_bytes: if quick { DISK_QUICK_BYTES } else { DISK_BYTES },
            tmpfs: None,
            disk: None,
        }
    }

    /// The target of `kind`; the inner error says why this machine has none.
    pub(crate) fn target(&mut self, kind: BackendKind) -> Result<Result<Target, String>> {
        match kind {
            BackendKind::Null => Ok(Ok(Target { kind, bytes: NULL_BYTES, path: None })),
            BackendKind::Memory => Ok(Ok(Target { kind, bytes: MEMORY_BYTES, path: None })),
            BackendKind::Tmpfs => {
                let shm = Path::new("/dev/shm");
                if !is_tmpfs(shm) {
                    return Ok(Err("/dev/shm is not a tmpfs".into()));
                }
                if self.tmpfs.is_none() {
                    self.tmpfs = Some(make(kind, shm, TMPFS_BYTES)?);
                }
                Ok(Ok(self.tmpfs.as_ref().expect("made just above").1.clone()))
            }
            BackendKind::Disk => self.disk(),
        }
    }

    fn disk(&mut self) -> Result<Result<Target, String>> {
        let folder = self.disk_folder.clone();
        if is_tmpfs(&folder) {
            return Ok(Err(format!("{} is a tmpfs; name a folder on a disk with --dir", folder.display())));
        }
        if self.disk.is_none() {
            self.disk = Some(make(BackendKind::Disk, &folder, self.disk_bytes)?);
        }
        let target = self.disk.as_ref().expect("made just above").1.clone();
        let path = target.path.as_deref().unwrap_or(&folder);
        let direct = OpenOptions::new().read(true).custom_flags(OFlags::DIRECT.bits() as i32).open(path);
        if let Err(error) = direct {
            return Ok(Err(format!("{} does not do O_DIRECT: {error}", folder.display())));
        }
        Ok(Ok(target))
    }
}

fn is_tmpfs(folder: &Path) -> bool {
    File::open(folder)
        .ok()
        .and_then(|f| fstatfs(f).ok())
        .is_some_and(|stat| stat.f_type as u64 == TMPFS_MAGIC)
}

/// A file full of data that was really written: a hole, or an extent that was only reserved, is read without a disk.
fn make(kind: BackendKind, folder: &Path, bytes: u64) -> Result<(TempDir, Target)> {
    let scratch = tempfile::Builder::new().prefix("exitless-bench-").tempdir_in(folder);
    let scratch = scratch.with_context(|| format!("cannot make a folder in {}", folder.display()))?;
    let path = scratch.path().join("disk.img");
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&path)?;
        let mut block = vec![0_u8; 1 << 20];
        let mut word = 0_u64;
        for _ in 0..bytes >> 20 {
            for bytes in block.chunks_exact_mut(8) {
                word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
                bytes.copy_from_slice(&word.to_le_bytes());
            }
            file.write_all(&block)?;
        }
        file.sync_all()
    };
    write().with_context(|| format!("cannot write {bytes} bytes to {}", path.display()))?;
    Ok((scratch, Target { kind, bytes, path: Some(path) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_files_are_full_and_go_away() {
        let (scratch, target) = make(BackendKind::Tmpfs, &std::env::temp_dir(), 2 << 20).unwrap();
        let path = target.path.unwrap();
        let data = std::fs::read(&path).unwrap();
        assert_eq!(data.len(), 2 << 20);
        assert!(data.chunks_exact(4096).all(|block| block.iter().any(|&byte| byte != 0)));
        drop(scratch);
        assert!(!path.exists());
    }

    #[test]
    fn null_and_memory_need_no_file() {
        let mut storage = Storage::new(None, true);
        for kind in [BackendKind::Null, BackendKind::Memory] {
            assert!(storage.target(kind).unwrap().unwrap().path.is_none());
        }
    }
}

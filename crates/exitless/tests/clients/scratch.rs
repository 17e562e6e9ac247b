//! One directory per test for sockets and images, gone when the test ends.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// A directory nobody else uses. Its path stays short: a Unix socket address holds 107 bytes.
pub(crate) struct Scratch {
    dir: PathBuf,
}

impl Scratch {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("exitless-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(name);
        fs::create_dir(&dir).expect("create a scratch directory");
        Self { dir }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A raw disk image of `mib` mebibytes, all zeroes and not yet allocated.
    pub(crate) fn image(&self, name: &str, mib: u64) -> PathBuf {
        let path = self.path(name);
        let file = fs::File::create_new(&path).expect("create an image");
        file.set_len(mib << 20).expect("size the image");
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// The MD5 sum of a file's contents, in hexadecimal.
pub(crate) fn md5(path: &Path) -> String {
    let sum = output(Command::new("md5sum").arg(path));
    sum.split_whitespace().next().expect("md5sum prints a sum").to_owned()
}

/// What a command that must succeed prints on stdout.
pub(crate) fn output(command: &mut Command) -> String {
    let done = command.output().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    let stdout = String::from_utf8_lossy(&done.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{command:?}: {}\n{stdout}{stderr}", done.status);
    stdout
}

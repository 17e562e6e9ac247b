//! Builds what a guest boots into: busybox, driver modules, programs of this machine with their libraries, and the jobs.
//!
//! The archive is the kernel's uncompressed "newc" cpio format (Documentation/driver-api/early-userspace/buffer-format).
//! It is kept between runs under a name that depends on everything in it.

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::kernel::Kernel;
use crate::{compile, needs};

const INIT: &str = include_str!("guest/init");
const JOBS: [(&str, &str); 9] = [
    ("endless", include_str!("guest/jobs/endless")),
    ("entropy", include_str!("guest/jobs/entropy")),
    ("filesystem", include_str!("guest/jobs/filesystem")),
    ("migration", include_str!("guest/jobs/migration")),
    ("multiqueue", include_str!("guest/jobs/multiqueue")),
    ("nested", include_str!("guest/jobs/nested")),
    ("probe", include_str!("guest/jobs/probe")),
    ("readonly", include_str!("guest/jobs/readonly")),
    ("restart", include_str!("guest/jobs/restart")),
];

const EXECUTABLE: u32 = 0o100_755;
const DIRECTORY: u32 = 0o040_755;

/// Files by their path in the guest, without the leading slash.
type Tree = BTreeMap<String, Vec<u8>>;

/// The archive for guests of `kernel`, with these `programs` from this machine besides busybox.
pub(crate) fn build(name: &str, kernel: &Kernel, programs: &[&str]) -> PathBuf {
    build_with(name, kernel, programs, &[])
}

/// The same with more `files`: paths in the guest, and what is there. Programs among them come with their libraries.
pub(crate) fn build_with(name: &str, kernel: &Kernel, programs: &[&str], files: &[(&str, &Path)]) -> PathBuf {
    let mut tree = Tree::new();
    tree.insert("init".into(), INIT.into());
    for (job, script) in JOBS {
        tree.insert(format!("jobs/{job}"), script.into());
    }
    for (index, module) in kernel.modules.iter().enumerate() {
        tree.insert(format!("modules/{index:02}.ko"), load_module(module));
    }
    tree.insert(
        "bin/busybox".into(),
        read(&needs::program("busybox").expect("busybox is a need of every guest")),
    );
    tree.insert("bin/ledger".into(), read(&compile::ledger().unwrap_or_else(|reason| panic!("{reason}"))));
    for name in programs {
        let path =
            needs::program(name).unwrap_or_else(|| panic!("{name} is not among the needs of its test"));
        add_program(&mut tree, &format!("usr/bin/{name}"), &path);
    }
    for (inside, path) in files {
        add_program(&mut tree, inside, path);
    }
    let mut hash = DefaultHasher::new();
    tree.hash(&mut hash);
    let archive = needs::cache_dir().join(format!("{name}-{:016x}.cpio", hash.finish()));
    if !archive.exists() {
        compile::remove_older(name);
        let fresh = archive.with_extension("new");
        fs::write(&fresh, cpio(&tree)).expect("write an initramfs");
        fs::rename(&fresh, &archive).expect("put an initramfs in place");
    }
    archive
}

/// Adds a program as `inside`, and the libraries `ldd` finds for it under their own paths: none for other files.
fn add_program(tree: &mut Tree, inside: &str, path: &Path) {
    let libraries = Command::new("ldd").arg(path).output().expect("run ldd");
    let libraries = String::from_utf8_lossy(&libraries.stdout).into_owned();
    for library in libraries.split_whitespace().filter(|word| word.starts_with('/') && !word.ends_with(':')) {
        let inside = library.trim_start_matches('/').to_owned();
        tree.entry(inside).or_insert_with(|| read(Path::new(library)));
    }
    tree.insert(inside.to_owned(), read(path));
}

fn load_module(path: &Path) -> Vec<u8> {
    let unpacker = match path.extension().and_then(|ending| ending.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return read(path),
    };
    let done = Command::new(unpacker).arg("-dc").arg(path).output().expect("unpack a kernel module");
    assert!(done.status.success(), "cannot unpack {}: {}", path.display(), done.status);
    done.stdout
}

fn read(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()))
}

fn cpio(tree: &Tree) -> Vec<u8> {
    let mut archive = Vec::new();
    let mut known = vec![String::new()];
    for (path, contents) in tree {
        for (end, _) in path.match_indices('/') {
            let parent = path[..end].to_owned();
            if !known.contains(&parent) {
                entry(&mut archive, &parent, DIRECTORY, &[]);
                known.push(parent);
            }
        }
        entry(&mut archive, path, EXECUTABLE, contents);
    }
    entry(&mut archive, "TRAILER!!!", 0, &[]);
    archive
}

fn entry(archive: &mut Vec<u8>, path: &str, mode: u32, contents: &[u8]) {
    // Magic, then thirteen numbers of eight hexadecimal digits: inode, mode, uid, gid, links, mtime, size, the device
    // and the special file's device as two numbers each, the name's length with its zero, and no checksum.
    let size = contents.len();
    let name_bytes = path.len() + 1;
    write!(archive, "07070100000000{mode:08x}{0:08x}{0:08x}{1:08x}{0:08x}{size:08x}", 0, 1)
        .expect("write to memory");
    write!(archive, "{0:08x}{0:08x}{0:08x}{0:08x}{name_bytes:08x}{0:08x}{path}\0", 0)
        .expect("write to memory");
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend_from_slice(contents);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

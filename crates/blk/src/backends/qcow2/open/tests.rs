//! Changes to an image while it is opened.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use qcow2::create::{NewImage, create};
use qcow2::header::Compression;
use qcow2::layout::Layout;

use super::super::check::check;
use super::*;

const BYTES: u64 = 1 << 20;

fn plainly() -> Qcow2Options {
    Qcow2Options::default()
}

fn follow() -> Qcow2Options {
    Qcow2Options { backing: true, ..plainly() }
}

fn read_only() -> Qcow2Options {
    Qcow2Options { read_only: true, ..follow() }
}

fn late() -> Qcow2Options {
    Qcow2Options { lock: Lock::Late, ..follow() }
}

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("exitless-qcow2-open-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// An image of 1 MiB. Clusters: header, refcount table, refcount block, L1 table.
    fn image(&self, name: &str, version: u32, backing: Option<&str>) -> PathBuf {
        let new = NewImage {
            version,
            layout: Layout { cluster_bits: 16, refcount_order: 4, extended: false, external_data: false },
            disk_bytes: BYTES,
            backing: backing.map(|name| (name.to_owned(), "qcow2".to_owned())),
            data_file: None,
            compression: Compression::Deflate,
        };
        let path = self.0.join(name);
        let file = std::fs::File::create(&path).unwrap();
        for (offset, data) in create(&new) {
            file.write_all_at(&data, offset).unwrap();
        }
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Changes bytes of an image.
fn put(image: &Path, offset: u64, bytes: &[u8]) {
    std::fs::File::options().write(true).open(image).unwrap().write_all_at(bytes, offset).unwrap();
}

fn get(image: &Path, offset: u64) -> u8 {
    let mut byte = [0];
    std::fs::File::open(image).unwrap().read_exact_at(&mut byte, offset).unwrap();
    byte[0]
}

#[track_caller]
fn refused(image: &Path, options: Qcow2Options, why: &str) {
    let error = open(image, options).expect_err("it is refused").to_string();
    assert!(error.contains(why), "{error}, not {why:?}");
}

#[test]
fn a_corrupt_image_can_only_be_read() {
    let folder = Folder::new("corrupt");
    let image = folder.image("a", 3, None);
    put(&image, 79, &[2]);
    refused(&image, plainly(), "marked corrupt");
    assert!(open(&image, read_only()).is_ok());
    assert_eq!(get(&image, 79), 2);
    assert_eq!(open(&folder.image("b", 3, Some("a")), follow()).unwrap().layers.len(), 2);
}

#[test]
fn a_dirty_image_is_repaired_when_it_is_opened_for_writing() {
    let folder = Folder::new("dirty");
    for version in [3, 2] {
        let image = folder.image("a", version, None);
        // The header's refcount is lost, and one is leaked: cluster 2 has the refcounts.
        put(&image, 2 << 16, &[0, 0]);
        put(&image, (2 << 16) + 20, &[0, 1]);
        let before = check(&image, false).unwrap();
        assert_eq!((before.corruptions, before.leaks), (1, 1));
        if version == 2 {
            // It cannot say that it is dirty, and is taken to be sound.
            drop(open(&image, plainly()).unwrap());
            assert_eq!(check(&image, false).unwrap(), before);
            continue;
        }
        put(&image, 79, &[1]);
        drop(open(&image, read_only()).unwrap());
        assert_eq!((get(&image, 79), check(&image, false).unwrap()), (1, before));
        drop(open(&image, plainly()).unwrap());
        let after = check(&image, false).unwrap();
        assert_eq!((get(&image, 79), after.corruptions, after.leaks), (0, 0, 0));
        // More is wrong than refcounts: an L1 entry leads into the refcount table.
        put(&image, 79, &[1]);
        put(&image, 3 << 16, &[0x80, 0, 0, 0, 0, 1, 0, 0]);
        refused(&image, plainly(), "more is wrong than refcounts");
        assert_eq!(get(&image, 79), 1);
    }
}

#[test]
fn features_that_are_cleared_by_who_does_not_know_them_are() {
    let folder = Folder::new("autoclear");
    let image = folder.image("a", 3, None);
    put(&image, 88, &[0, 0, 0, 0, 0, 0, 0, 0x84]);
    drop(open(&image, read_only()).unwrap());
    assert_eq!(get(&image, 95), 0x84);
    drop(open(&image, plainly()).unwrap());
    assert_eq!(get(&image, 95), 0);
}

fn qemu_img(words: &[&str]) -> String {
    let output = Command::new("qemu-img").args(words).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{words:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

#[test]
fn bitmaps_are_inconsistent_for_qemu_and_leak_nothing() {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        return needs::skip("no qemu-img");
    }
    let folder = Folder::new("bitmaps");
    let image = folder.image("a", 3, None);
    let path = image.to_str().unwrap();
    for name in ["one", "another"] {
        qemu_img(&["bitmap", "--add", path, name]);
    }
    drop(open(&image, read_only()).unwrap());
    let in_use = || qemu_img(&["info", "--output=json", path]).matches("\"in-use\"").count();
    assert_eq!(in_use(), 0);
    drop(open(&image, plainly()).unwrap());
    assert_eq!(in_use(), 2);
    qemu_img(&["check", path]);
    assert_eq!(check(&image, false).unwrap().leaks, 0);
    // They go as those do that QEMU itself left so.
    qemu_img(&["bitmap", "--remove", path, "one"]);
    drop(open(&image, plainly()).unwrap());
    assert_eq!(in_use(), 1);
}

#[test]
fn an_image_that_is_opened_late_is_read_again_and_made_ready_when_it_is_locked() {
    let folder = Folder::new("late");
    folder.image("base", 3, None);
    let image = folder.image("a", 3, Some("base"));
    let source = open(&image, follow()).unwrap();
    let mut target = open(&image, late()).unwrap();
    let queue = source.hold(Duration::ZERO).unwrap();
    assert!(target.hold(Duration::ZERO).unwrap_err().to_string().contains("another process uses it"));
    // What the source does meanwhile: the disk grows, and it is left dirty.
    put(&image, 24, &(2 * BYTES).to_be_bytes());
    put(&image, 79, &[1]);
    drop(queue);
    let holds = target.hold(Duration::ZERO).unwrap();
    drop(source);
    prepare(&mut target, late()).unwrap();
    assert_eq!((target.layers[0].disk_bytes(), get(&image, 79)), (2 * BYTES, 0));
    // Now it is the target's.
    let other = open(&image, late()).unwrap();
    assert!(other.hold(Duration::ZERO).is_err());
    drop(holds);
    drop(open(&image, follow()).unwrap());
    // Another image by the same name is not taken over.
    put(&image, 112 + 8, b"qcow3");
    let error = prepare(&mut target, late()).unwrap_err().to_string();
    assert!(error.contains("made anew"), "{error}");
}

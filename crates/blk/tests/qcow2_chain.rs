//! The files that a qcow2 image leads to: which are opened, which are refused, and what becomes of the image meanwhile.
#![allow(clippy::unwrap_used, reason = "tests")]

mod fake;

use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use blk::Backend;
use blk::backends::qcow2::{Qcow2, Qcow2Options};
use fake::{Rig, Ring};
use qcow2::create::{NewImage, create};
use qcow2::header::Compression;
use qcow2::layout::Layout;

const BYTES: u64 = 1 << 20;

fn plainly() -> Qcow2Options {
    Qcow2Options::default()
}

fn follow() -> Qcow2Options {
    Qcow2Options { backing: true, ..plainly() }
}

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let name = format!("qcow2-chain-{}-{name}", std::process::id());
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// An image backed by `backing`: its name and format.
    fn image(&self, name: &str, backing: Option<(&str, &str)>) -> PathBuf {
        let backing = backing.map(|(name, format)| (name.to_owned(), format.to_owned()));
        self.new_image(name, NewImage { backing, ..plain() })
    }

    fn new_image(&self, name: &str, new: NewImage) -> PathBuf {
        let path = self.at(name);
        let file = std::fs::File::create(&path).unwrap();
        for (offset, data) in create(&new) {
            file.write_all_at(&data, offset).unwrap();
        }
        path
    }

    /// A file that has `byte` everywhere.
    fn raw(&self, name: &str, byte: u8, bytes: u64) -> PathBuf {
        let path = self.at(name);
        std::fs::write(&path, vec![byte; bytes as usize]).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn plain() -> NewImage {
    NewImage {
        version: 3,
        layout: Layout { cluster_bits: 16, refcount_order: 4, extended: false, external_data: false },
        disk_bytes: BYTES,
        backing: None,
        data_file: None,
        compression: Compression::Deflate,
    }
}

/// Changes bytes of a header.
fn put(image: &Path, offset: u64, bytes: &[u8]) {
    std::fs::File::options().write(true).open(image).unwrap().write_all_at(bytes, offset).unwrap();
}

#[track_caller]
fn refused(image: &Path, options: Qcow2Options, why: &[&str]) {
    let error = Qcow2::open(image, options).err().expect("it is refused").to_string();
    assert!(why.iter().all(|why| error.contains(why)), "{error}, not {why:?}");
}

fn read(image: &Path, sector: u64) -> u8 {
    let disk = Qcow2::open(image, follow()).unwrap();
    let data = Rig::new(Arc::new(disk), Ring::SPLIT).read(sector, 512);
    assert!(data.iter().all(|&byte| byte == data[0]));
    data[0]
}

#[test]
fn names_with_protocols_are_refused() {
    let folder = Folder::new("protocols");
    for name in [
        "json:{\"driver\":\"file\",\"filename\":\"/etc/passwd\"}",
        "nbd:localhost:10809",
        "nbd+unix:///export?socket=/run/s",
        "http://localhost/a",
        "file:/etc/passwd",
        "rbd:a/b",
        "fat:rw:/etc",
    ] {
        for format in ["raw", "qcow2"] {
            let image = folder.image("a", Some((name, format)));
            refused(&image, follow(), &["protocols", name.split(':').next().unwrap()]);
        }
        let layout = Layout { external_data: true, ..plain().layout };
        let image =
            folder.new_image("a", NewImage { layout, data_file: Some((name.into(), false)), ..plain() });
        refused(&image, follow(), &["protocols"]);
    }
    // A colon behind a slash is a part of a path.
    folder.raw("x:y", 3, BYTES);
    assert_eq!(read(&folder.image("a", Some(("./x:y", "raw"))), 0), 3);
}

#[test]
fn nothing_is_followed_unless_that_is_allowed() {
    let folder = Folder::new("not-followed");
    folder.raw("base", 3, BYTES);
    refused(&folder.image("a", Some(("base", "raw"))), plainly(), &["\"base\"", "backing=on"]);
    let layout = Layout { external_data: true, ..plain().layout };
    let image =
        folder.new_image("b", NewImage { layout, data_file: Some(("base".into(), false)), ..plain() });
    refused(&image, plainly(), &["\"base\"", "backing=on"]);
}

#[test]
fn loops_are_refused_by_name() {
    let folder = Folder::new("loops");
    refused(&folder.image("self", Some(("self", "qcow2"))), follow(), &["self", "loop"]);
    let a = folder.image("a", Some(("b", "qcow2")));
    folder.image("b", Some(("c", "qcow2")));
    folder.image("c", Some(("a", "qcow2")));
    refused(&a, follow(), &["/a:", "loop", "backing file of", "/c)"]);
    // By other names.
    symlink("d", folder.at("link")).unwrap();
    refused(&folder.image("d", Some(("link", "qcow2"))), follow(), &["loop"]);
    let e = folder.image("e", Some(("hard", "raw")));
    std::fs::hard_link(&e, folder.at("hard")).unwrap();
    refused(&e, follow(), &["loop"]);
    let layout = Layout { external_data: true, ..plain().layout };
    let f = folder.new_image("f", NewImage { layout, data_file: Some(("f".into(), false)), ..plain() });
    refused(&f, follow(), &["loop", "data file of"]);
}

#[test]
fn what_is_neither_a_file_nor_a_block_device_is_refused_without_waiting_for_it() {
    let folder = Folder::new("kinds");
    std::fs::create_dir(folder.at("folder")).unwrap();
    assert!(Command::new("mkfifo").arg(folder.at("fifo")).status().unwrap().success());
    let _socket = std::os::unix::net::UnixListener::bind(folder.at("socket")).unwrap();
    for name in ["folder", "fifo", "socket", "/dev/null", "/dev/zero"] {
        for format in ["raw", "qcow2"] {
            let image = folder.image("a", Some((name, format)));
            refused(&image, follow(), &[name, "regular file or a block device"]);
        }
        refused(&folder.at(name), follow(), &[name, "regular file or a block device"]);
    }
    refused(&folder.image("a", Some(("missing", "raw"))), follow(), &["missing", "No such file"]);
}

#[test]
fn a_chain_has_a_limit() {
    let folder = Folder::new("depth");
    folder.raw("0", 9, BYTES);
    let name = |layer: usize| layer.to_string();
    for layer in 1..66 {
        let format = if layer == 1 { "raw" } else { "qcow2" };
        folder.image(&name(layer), Some((&name(layer - 1), format)));
    }
    assert_eq!(read(&folder.at("63"), 5), 9, "64 layers");
    refused(&folder.at("64"), follow(), &["64 layers"]);
}

#[test]
fn relative_names_begin_where_their_image_is() {
    let folder = Folder::new("relative");
    std::fs::create_dir_all(folder.at("tops/deep")).unwrap();
    std::fs::create_dir(folder.at("bases")).unwrap();
    folder.raw("bases/raw", 6, BYTES);
    folder.image("bases/middle", Some(("raw", "raw")));
    let top = folder.image("tops/deep/top", Some(("../../bases/middle", "qcow2")));
    assert_eq!(read(&top, 100), 6);
    // Absolute ones do not.
    let base = folder.at("bases/raw");
    assert_eq!(read(&folder.image("tops/top", Some((base.to_str().unwrap(), "raw"))), 0), 6);
}

#[test]
fn formats_are_what_is_said_and_else_what_the_file_begins_with() {
    let folder = Folder::new("formats");
    let inner = folder.image("inner", None);
    // A guest's raw disk with a header on it is what it is said to be.
    assert_eq!(
        Rig::new(
            Arc::new(Qcow2::open(&folder.image("a", Some(("inner", "raw"))), follow()).unwrap()),
            Ring::SPLIT
        )
        .read(0, 512)[..4],
        *b"QFI\xfb"
    );
    refused(&folder.image("a", Some(("inner", "vmdk"))), follow(), &["\"vmdk\"", "raw and qcow2"]);
    folder.raw("raw", 4, BYTES);
    refused(&folder.image("a", Some(("raw", "qcow2"))), follow(), &["raw", "is no qcow2 image"]);
    // The extension with the format, which is the first, becomes one of an unknown type.
    let unsaid = |name: &str, format: &str| {
        let image = folder.image("a", Some((name, format)));
        put(&image, 112, &[0x12, 0x34, 0x56, 0x78]);
        image
    };
    assert_eq!(read(&unsaid("raw", "qcow2"), 0), 4);
    assert_eq!(read(&unsaid("inner", "raw"), 0), 0);
    folder.image("inner", Some(("raw", "raw")));
    refused(&unsaid("inner", "raw"), follow(), &[inner.to_str().unwrap(), "names another file"]);
}

#[test]
fn a_base_may_be_shorter_or_longer_than_its_overlay() {
    let folder = Folder::new("lengths");
    folder.raw("longer", 5, 2 * BYTES);
    assert_eq!(read(&folder.image("a", Some(("longer", "raw"))), BYTES / 512 - 1), 5);
    folder.raw("shorter", 5, BYTES / 2);
    let image = folder.image("a", Some(("shorter", "raw")));
    assert_eq!((read(&image, BYTES / 1024 - 1), read(&image, BYTES / 1024)), (5, 0));
    folder.raw("empty", 5, 0);
    assert_eq!(read(&folder.image("a", Some(("empty", "raw"))), 0), 0);
}

#[test]
fn encryption_and_unknown_features_are_refused_by_name() {
    let folder = Folder::new("features");
    for (method, name) in [(1, "AES"), (2, "LUKS")] {
        let image = folder.image("a", None);
        put(&image, 35, &[method]);
        refused(&image, plainly(), &["encrypted", name]);
        folder.image("b", Some(("a", "qcow2")));
        refused(&folder.at("b"), follow(), &["encrypted", "backing file of"]);
    }
    let image = folder.image("a", None);
    put(&image, 78, &[1]);
    refused(&image, plainly(), &["bit 8"]);
}

#[test]
fn a_data_file_is_opened_with_its_image() {
    let folder = Folder::new("data-file");
    folder.raw("data", 7, BYTES);
    let layout = Layout { external_data: true, ..plain().layout };
    let new = NewImage { layout, data_file: Some(("data".into(), true)), ..plain() };
    let image = folder.new_image("a", new);
    assert!(Qcow2::open(&image, follow()).is_ok());
    std::fs::remove_file(folder.at("data")).unwrap();
    refused(&image, follow(), &["data", "No such file", "data file of"]);
}

#[test]
fn a_disk_has_at_least_a_sector() {
    let folder = Folder::new("small");
    let image = folder.new_image("a", NewImage { disk_bytes: 0, ..plain() });
    refused(&image, plainly(), &["0 bytes", "at least 512"]);
    assert_eq!(
        Qcow2::open(&folder.new_image("a", NewImage { disk_bytes: 512, ..plain() }), plainly())
            .unwrap()
            .geometry()
            .bytes,
        512
    );
}

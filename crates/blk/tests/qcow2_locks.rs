//! QEMU's tools and a service never write what the other reads or writes, anywhere in a backing chain.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use blk::backends::file::Lock;
use blk::backends::qcow2::check::check;
use blk::backends::qcow2::{Qcow2, Qcow2Options};

const WRITE_LOCK: &str = "Failed to get \"write\" lock";

/// A chain of `top.qcow2`, `middle.qcow2` and `base.raw`; and `other.qcow2` over the same `middle.qcow2`; and
/// `apart.qcow2` with its data in `data`.
struct Folder(PathBuf);

impl Folder {
    /// None if this host has none of the tools.
    fn new(name: &str) -> Option<Self> {
        for tool in ["qemu-img", "qemu-io", "qemu-storage-daemon"] {
            if Command::new(tool).arg("--version").output().is_err() {
                needs::skip(format_args!("no {tool}"));
                return None;
            }
        }
        let name = format!("qcow2-locks-{}-{name}", std::process::id());
        let folder = Self(Path::new(env!("CARGO_TARGET_TMPDIR")).join(name));
        std::fs::create_dir_all(&folder.0).unwrap();
        std::fs::write(folder.0.join("base.raw"), vec![1; 1 << 20]).unwrap();
        for words in [
            "-b base.raw -F raw middle.qcow2",
            "-b middle.qcow2 -F qcow2 top.qcow2",
            "-b middle.qcow2 -F qcow2 other.qcow2",
            "-o data_file=data apart.qcow2 1M",
        ] {
            folder.tool("qemu-img", &format!("create -q -f qcow2 {words}"), None).unwrap();
        }
        Some(folder)
    }

    fn open(&self, image: &str, options: Qcow2Options) -> Result<Qcow2, String> {
        let options = Qcow2Options { backing: true, ..options };
        Qcow2::open(&self.0.join(image), options).map_err(|error| error.to_string())
    }

    fn serve(&self, image: &str) -> Qcow2 {
        self.open(image, Qcow2Options::default()).unwrap()
    }

    /// Runs a tool, which may be `qemu-io` with something to do; its complaint if it fails.
    fn tool(&self, tool: &str, words: &str, io: Option<&str>) -> Result<(), String> {
        let mut command = Command::new(tool);
        command.args(io.iter().flat_map(|io| ["-c", io])).args(words.split_whitespace());
        let output = command.current_dir(&self.0).stdin(Stdio::null()).output().unwrap();
        if output.status.success() { Ok(()) } else { Err(String::from_utf8(output.stderr).unwrap()) }
    }

    fn read(&self, image: &str, format: &str) -> Result<(), String> {
        self.tool("qemu-io", &format!("-r -f {format} {image}"), Some("read 0 512"))
    }

    /// All ways in which tools change an image.
    fn writes(&self, image: &str) -> [Result<(), String>; 3] {
        let format = if image.ends_with("qcow2") { "qcow2" } else { "raw" };
        [
            self.tool("qemu-io", &format!("-f {format} {image}"), Some("write 0 512")),
            self.tool("qemu-img", &format!("resize -q -f {format} {image} 1M"), None),
            self.tool("qemu-img", &format!("bench -w -c 1 -f {format} {image}"), None),
        ]
    }

    #[track_caller]
    fn is_kept(&self, image: &str) {
        for result in self.writes(image) {
            let error = result.expect_err(image);
            assert!(error.contains(WRITE_LOCK), "{image}: {error}");
        }
    }

    #[track_caller]
    fn is_free(&self, image: &str) {
        for result in self.writes(image) {
            result.expect(image);
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A tool that has an image open until it is dropped.
struct Tool(Child);

impl Tool {
    /// `qemu-io`, when it has the image.
    fn io(folder: &Folder, options: &[&str], image: &str) -> Self {
        Self::start(folder, "qemu-io", &[options, &[image]].concat(), b"read 0 512\n", "read 512/512")
    }

    /// `qemu-storage-daemon` with a node that may be written.
    fn daemon(folder: &Folder, image: &str) -> Self {
        let node = if image.ends_with("qcow2") {
            format!("driver=qcow2,node-name=n,file.driver=file,file.filename={image}")
        } else {
            format!("driver=raw,node-name=n,file.driver=file,file.filename={image}")
        };
        let export = "type=nbd,id=e,node-name=n,writable=on";
        let server = format!("addr.type=unix,addr.path={}", folder.0.join("nbd").display());
        let words = [
            "--blockdev",
            &node,
            "--nbd-server",
            &server,
            "--export",
            export,
            "--chardev",
            "stdio,id=m",
            "--monitor",
            "chardev=m",
        ];
        Self::start(folder, "qemu-storage-daemon", &words, b"", "QMP")
    }

    fn start(folder: &Folder, tool: &str, words: &[&str], input: &[u8], ready: &str) -> Self {
        let mut command = Command::new(tool);
        command.args(words).current_dir(&folder.0).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut tool = Self(command.spawn().unwrap());
        tool.0.stdin.as_mut().unwrap().write_all(input).unwrap();
        let mut lines = BufReader::new(tool.0.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains(ready)), "{words:?}");
        tool
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn what_is_served_and_all_that_it_is_backed_by_cannot_be_written() {
    let Some(folder) = Folder::new("kept") else { return };
    let disk = folder.serve("top.qcow2");
    for image in ["top.qcow2", "middle.qcow2", "base.raw"] {
        folder.is_kept(image);
    }
    // The base is only read, and can be: by whoever only looks, and through another overlay.
    folder.read("base.raw", "raw").unwrap();
    folder.is_free("other.qcow2");
    let other = folder.serve("other.qcow2");
    folder.is_kept("other.qcow2");
    drop(disk);
    folder.is_free("top.qcow2");
    folder.is_kept("base.raw");
    drop(other);
    for image in ["other.qcow2", "top.qcow2", "middle.qcow2", "base.raw"] {
        folder.is_free(image);
    }
}

#[test]
fn a_base_that_qemu_writes_is_not_served() {
    let Some(folder) = Folder::new("refused") else { return };
    for image in ["top.qcow2", "middle.qcow2", "base.raw"] {
        let format = if image == "base.raw" { "raw" } else { "qcow2" };
        for daemon in [false, true] {
            let tool = match daemon {
                false => Tool::io(&folder, &["-f", format], image),
                true => Tool::daemon(&folder, image),
            };
            for read_only in [false, true] {
                let error = folder
                    .open("top.qcow2", Qcow2Options { read_only, ..Qcow2Options::default() })
                    .err()
                    .expect(image);
                let (path, top) = (folder.0.join(image), image == "top.qcow2");
                assert!(error.contains(&format!("opening {}: locking it", path.display())), "{error}");
                assert!(error.contains("another process uses it"), "{error}");
                assert_eq!(error.contains("backing file of"), !top, "{error}");
            }
            folder.open("top.qcow2", Qcow2Options { lock: Lock::Off, ..Qcow2Options::default() }).unwrap();
            drop(tool);
            folder.serve("top.qcow2");
        }
    }
}

#[test]
fn a_daemon_does_not_get_what_is_served() {
    let Some(folder) = Folder::new("daemon") else { return };
    let disk = folder.serve("top.qcow2");
    for (driver, image) in [("qcow2", "top.qcow2"), ("qcow2", "middle.qcow2"), ("raw", "base.raw")] {
        let node = format!("--blockdev driver={driver},node-name=n,file.driver=file,file.filename={image}");
        let export =
            "--nbd-server addr.type=unix,addr.path=nbd --export type=nbd,id=e,node-name=n,writable=on";
        let error = folder.tool("qemu-storage-daemon", &format!("{node} {export}"), None).unwrap_err();
        assert!(error.contains(WRITE_LOCK), "{error}");
    }
    drop(disk);
    drop(Tool::daemon(&folder, "base.raw"));
}

#[test]
fn a_data_file_is_locked_as_its_image_is() {
    let Some(folder) = Folder::new("data") else { return };
    let disk = folder.serve("apart.qcow2");
    folder.is_kept("apart.qcow2");
    folder.is_kept("data");
    drop(disk);
    folder.is_free("apart.qcow2");
    folder.is_free("data");
    let tool = Tool::io(&folder, &["-f", "raw"], "data");
    let error = folder.open("apart.qcow2", Qcow2Options::default()).err().unwrap();
    assert!(error.contains("/data: locking it") && error.contains("data file of"), "{error}");
    drop(tool);
    folder.serve("apart.qcow2");
}

#[test]
fn an_overlay_is_read_together_and_written_alone() {
    let Some(folder) = Folder::new("together") else { return };
    let read_only = Qcow2Options { read_only: true, ..Qcow2Options::default() };
    let readers =
        [folder.open("top.qcow2", read_only).unwrap(), folder.open("top.qcow2", read_only).unwrap()];
    let tool = Tool::io(&folder, &["-r", "-f", "qcow2"], "top.qcow2");
    assert!(folder.open("top.qcow2", Qcow2Options::default()).is_err());
    folder.is_kept("top.qcow2");
    drop((readers, tool));
    let disk = folder.serve("top.qcow2");
    assert!(folder.open("top.qcow2", read_only).is_err());
    // It is the base of nothing that could be served meanwhile.
    folder.tool("qemu-img", "create -q -u -f qcow2 -b top.qcow2 -F qcow2 over.qcow2 1M", None).unwrap();
    let error = folder.open("over.qcow2", Qcow2Options::default()).err().unwrap();
    assert!(error.contains("top.qcow2: locking it"), "{error}");
    drop(disk);
    folder.serve("over.qcow2");
}

#[test]
fn without_locks_nobody_is_kept_out() {
    let Some(folder) = Folder::new("off") else { return };
    let off = Qcow2Options { lock: Lock::Off, ..Qcow2Options::default() };
    let disks = [folder.open("top.qcow2", off).unwrap(), folder.open("top.qcow2", off).unwrap()];
    for image in ["top.qcow2", "middle.qcow2", "base.raw"] {
        folder.is_free(image);
    }
    drop(disks);
}

#[test]
fn an_image_is_checked_while_nobody_writes_it() {
    let Some(folder) = Folder::new("check") else { return };
    let image = folder.0.join("top.qcow2");
    let disk = folder.serve("top.qcow2");
    let error = check(&image, false).unwrap_err().to_string();
    assert!(error.contains("another process writes it"), "{error}");
    assert!(check(&image, true).is_ok());
    // A base is only read by both.
    assert!(check(&folder.0.join("middle.qcow2"), false).is_ok());
    drop(disk);
    let tool = Tool::io(&folder, &["-f", "qcow2"], "top.qcow2");
    assert!(check(&image, false).is_err());
    drop(tool);
    let _reader = Tool::io(&folder, &["-r", "-f", "qcow2"], "top.qcow2");
    assert!(check(&image, false).is_ok());
}

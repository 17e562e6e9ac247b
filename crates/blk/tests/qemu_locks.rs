//! QEMU's tools and a service never write one image at the same time.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use blk::backends::file::{Engine, File, FileOptions, Lock};
use blk::{Backend, BackendError, Channel};
use virtio::Memory;

const BYTES: u64 = 1 << 20;

struct Image(PathBuf);

impl Image {
    /// None if this host has none of the tools.
    fn new(name: &str) -> Option<Self> {
        for tool in ["qemu-img", "qemu-io"] {
            if Command::new(tool).arg("--version").output().is_err() {
                needs::skip(format_args!("no {tool}"));
                return None;
            }
        }
        let name = format!("exitless-blk-{}-{name}", std::process::id());
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::File::create(&path).unwrap().set_len(BYTES).unwrap();
        Some(Self(path))
    }

    fn open(&self, lock: Lock, read_only: bool) -> Result<File, BackendError> {
        File::open(&self.0, FileOptions { lock, read_only, ..FileOptions::default() })
    }

    /// Runs a tool on the image; its complaint if it fails.
    fn tool(&self, tool: &str, before: &[&str], after: &[&str]) -> Result<(), String> {
        let mut command = Command::new(tool);
        let output = command.args(before).arg(&self.0).args(after).stdin(Stdio::null()).output().unwrap();
        if output.status.success() { Ok(()) } else { Err(String::from_utf8(output.stderr).unwrap()) }
    }

    fn write(&self) -> Result<(), String> {
        self.tool("qemu-io", &["-f", "raw", "-c", "write 0 512"], &[])
    }

    fn resize(&self) -> Result<(), String> {
        self.tool("qemu-img", &["resize", "-q", "-f", "raw"], &["1M"])
    }

    fn read(&self) -> Result<(), String> {
        self.tool("qemu-io", &["-r", "-U", "-f", "raw", "-c", "read 0 512"], &[])
    }

    /// Asserts that no tool writes it now, and that it can be looked at.
    fn is_kept(&self, when: &str) {
        for error in [self.write(), self.resize()].map(|result| result.expect_err(when)) {
            assert!(error.contains("Failed to get \"write\" lock"), "{when}: {error}");
        }
        self.read().expect(when);
    }

    fn is_free(&self, when: &str) {
        for result in [self.write(), self.resize(), self.read()] {
            result.expect(when);
        }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A tool that has an image open until it is dropped.
struct Tool(Child);

impl Tool {
    fn open(image: &Image, options: &[&str]) -> Self {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw"]).args(options).arg(&image.0).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // When it has carried out something, it has the image.
        child.stdin.as_mut().unwrap().write_all(b"read 0 512\n").unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("read 512/512")));
        Self(child)
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(disk: &File) -> Box<dyn Channel> {
    disk.channel(&Arc::new(Memory::default()), 8).and_then(|builder| builder()).unwrap()
}

#[test]
fn an_image_is_kept_from_opening_to_closing() {
    let Some(image) = Image::new("kept") else { return };
    for engine in [Engine::Uring, Engine::Inline].into_iter().cycle().take(4) {
        let disk = File::open(&image.0, FileOptions { engine, ..FileOptions::default() }).unwrap();
        image.is_kept("no queue has run");
        // A guest that restarts, or a front end that comes again.
        for _ in 0..2 {
            let queues = [start(&disk), start(&disk)];
            image.is_kept("queues run");
            drop(queues);
            image.is_kept("no queue runs");
        }
        disk.resize(Some(BYTES)).unwrap();
        image.is_kept("it was resized");
        drop(disk);
        image.is_free("it is closed");
    }
}

#[test]
fn an_image_that_is_opened_late_is_kept_while_queues_run() {
    let Some(image) = Image::new("late") else { return };
    let disk = image.open(Lock::Late, false).unwrap();
    for _ in 0..2 {
        image.is_free("no queue runs");
        let queue = start(&disk);
        image.is_kept("a queue runs");
        drop(queue);
    }
    image.is_free("the last queue has stopped");
}

#[test]
fn an_image_is_kept_while_a_guest_is_handed_over() {
    let Some(image) = Image::new("handed-over") else { return };
    let source = image.open(Lock::On, false).unwrap();
    let target = image.open(Lock::Late, false).unwrap();
    drop(start(&source));
    let queue = start(&target);
    image.is_kept("the target has it");
    drop(queue);
    image.is_kept("it may go back");
    let queue = start(&target);
    drop(source);
    image.is_kept("the target has it alone");
    drop(queue);
    image.is_free("the guest is gone");
}

#[test]
fn an_image_that_qemu_writes_is_refused() {
    let Some(image) = Image::new("refused") else { return };
    let late = image.open(Lock::Late, false).unwrap();
    let tool = Tool::open(&image, &[]);
    for read_only in [false, true] {
        let error = image.open(Lock::On, read_only).unwrap_err().to_string();
        assert!(error.contains("another process uses it"), "{error}");
    }
    // It needs the lock that queues need, and does not wait for it.
    let error = late.resize(Some(BYTES)).unwrap_err().to_string();
    assert!(error.contains("another process uses it"), "{error}");
    image.open(Lock::Off, false).unwrap();
    drop(tool);
    late.resize(Some(BYTES)).unwrap();
    image.open(Lock::On, false).unwrap();
    image.is_free("nothing was left behind");
}

#[test]
fn an_image_is_read_together() {
    let Some(image) = Image::new("readers") else { return };
    let reader = Tool::open(&image, &["-r"]);
    let disks = [Lock::On, Lock::On, Lock::Late].map(|lock| image.open(lock, true).unwrap());
    let queues = disks.each_ref().map(start);
    image.tool("qemu-io", &["-r", "-f", "raw", "-c", "read 0 512"], &[]).expect("without -U too");
    image.is_kept("readers run");
    drop((queues, reader));
    image.is_kept("readers have it open");
    drop(disks);
    image.is_free("the readers are gone");
}

//! Particulars of qcow2 images.
#![allow(clippy::unwrap_used, reason = "tests")]

mod fake;

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use blk::Backend;
use blk::backends::file::Lock;
use blk::backends::qcow2::{Qcow2, Qcow2Options};
use fake::{DISCARD, FLUSH, OK, Rig, Ring, format_qcow2, pattern, range};

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path =
            PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-{name}.qcow2", std::process::id()));
        std::fs::File::create(&path).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// `qemu-img` with these arguments; None if this host has none.
fn qemu_img(args: &[&str]) -> Option<String> {
    let output = Command::new("qemu-img").args(args).output().ok()?;
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {args:?}: {text}");
    Some(text)
}

#[test]
fn an_image_outlives_its_service_and_is_sound() {
    let file = Scratch::new("sound");
    format_qcow2(&file.0, 64 << 20);
    let data = pattern(200_704, 1);
    {
        let mut rig = Rig::new(Arc::new(Qcow2::open(&file.0, Qcow2Options::default()).unwrap()), Ring::SPLIT);
        rig.write(777, &data);
        rig.write(100_000, &data);
        assert_eq!(rig.status(DISCARD, 0, &range(100_000, 128, 0), 0), OK);
        assert_eq!(rig.status(FLUSH, 0, &[], 0), OK);
    }
    if qemu_img(&["check", "-U", file.0.to_str().unwrap()]).is_none() {
        println!("skipped: no qemu-img");
    }
    let read_only = Qcow2Options { read_only: true, ..Qcow2Options::default() };
    let mut rig = Rig::new(Arc::new(Qcow2::open(&file.0, read_only).unwrap()), Ring::SPLIT);
    assert_eq!(rig.read(777, data.len()), data);
}

#[test]
fn an_image_that_was_let_go_of_is_whole_for_the_next_host() {
    let file = Scratch::new("settled");
    format_qcow2(&file.0, 64 << 20);
    let storage = Arc::new(Qcow2::open(&file.0, Qcow2Options::default()).unwrap());
    let data = pattern(200_704, 1);
    let mut rig = Rig::new(storage.clone(), Ring::SPLIT);
    rig.write(777, &data);
    storage.settle().unwrap();
    // The service has not ended: what it would write then comes too late.
    let next = Qcow2Options { read_only: true, lock: Lock::Off, ..Qcow2Options::default() };
    let mut next = Rig::new(Arc::new(Qcow2::open(&file.0, next).unwrap()), Ring::SPLIT);
    assert!(next.read(777, data.len()) == data);
}

#[test]
fn an_image_has_one_writer() {
    let file = Scratch::new("locked");
    format_qcow2(&file.0, 1 << 20);
    let _writer = Qcow2::open(&file.0, Qcow2Options::default()).unwrap();
    let error = Qcow2::open(&file.0, Qcow2Options::default()).err().unwrap().to_string();
    assert!(error.contains("another process uses it"), "{error}");
}

#[test]
fn a_backing_file_is_followed_only_on_request() {
    let (base, top) = (Scratch::new("base"), Scratch::new("top"));
    format_qcow2(&base.0, 1 << 20);
    let (base_path, top_path) = (base.0.to_str().unwrap(), top.0.to_str().unwrap());
    Rig::new(Arc::new(Qcow2::open(&base.0, Qcow2Options::default()).unwrap()), Ring::SPLIT)
        .write(8, &[3; 4096]);
    if qemu_img(&["create", "-q", "-f", "qcow2", "-b", base_path, "-F", "qcow2", top_path]).is_none() {
        println!("skipped: no qemu-img");
        return;
    }
    let error = Qcow2::open(&top.0, Qcow2Options::default()).err().unwrap().to_string();
    assert!(error.contains("backing=on"), "{error}");
    let allowed = Qcow2Options { backing: true, ..Qcow2Options::default() };
    let mut rig = Rig::new(Arc::new(Qcow2::open(&top.0, allowed).unwrap()), Ring::SPLIT);
    assert_eq!(rig.read(8, 4096), [3; 4096]);
    rig.write(9, &[4; 512]);
    assert_eq!(rig.read(8, 1536), [[3; 512], [4; 512], [3; 512]].concat());
}

#[test]
fn what_is_no_image_is_refused() {
    let file = Scratch::new("raw");
    std::fs::write(&file.0, vec![1; 1 << 20]).unwrap();
    let error = Qcow2::open(&file.0, Qcow2Options::default()).err().unwrap().to_string();
    assert!(error.contains("is no qcow2 image"), "{error}");
    format_qcow2(&file.0, 3 << 20);
    assert_eq!(Qcow2::open(&file.0, Qcow2Options::default()).unwrap().geometry().bytes, 3 << 20);
}

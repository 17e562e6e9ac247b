//! `exitless check` beside `qemu-img check`, on images that are sound, leak and are corrupt.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod process;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::Command;

use process::{Scratch, output, text};
use serde_json::Value;

/// An image, and how it is harmed.
struct Image(String);

impl Image {
    /// Data in 20 of 1024 clusters; `None` where the tools are missing.
    fn new(scratch: &Scratch, options: &str) -> Option<Self> {
        for tool in ["qemu-img", "qemu-io"] {
            if Command::new(tool).arg("--version").output().is_err() {
                needs::skip(format_args!("no {tool}"));
                return None;
            }
        }
        let image = Self(scratch.path("image.qcow2"));
        qemu("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, &image.0, "64M"]);
        qemu("qemu-io", &["-c", "write -P 1 0 1M", "-c", "write -P 2 40M 256k", &image.0]);
        Some(image)
    }

    fn word(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        File::open(&self.0).unwrap().read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes) & 0x00ff_ffff_ffff_fe00
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        File::options().write(true).open(&self.0).unwrap().write_all_at(bytes, at).unwrap();
    }

    /// The first L2 table.
    fn table(&self) -> u64 {
        self.word(self.word(40))
    }

    /// Where the refcount of a cluster is, which has 16 bits.
    fn refcount(&self, cluster: u64) -> u64 {
        self.word(self.word(48)) + cluster * 2
    }

    /// What was mapped here no longer is.
    fn leak(&self, index: u64) {
        self.put(self.table() + index * 8, &[0; 8]);
    }

    /// Asserts that both programs say the same; returns the exit code.
    #[track_caller]
    fn compare(&self) -> i32 {
        let ours = output(&["check", "--json", &self.0]);
        let said: Value = serde_json::from_slice(&ours.stdout).unwrap();
        let theirs = Command::new("qemu-img").args(["check", "--output=json", &self.0]).output().unwrap();
        let expected: Value = serde_json::from_slice(&theirs.stdout).unwrap();
        for key in [
            "filename",
            "format",
            "check-errors",
            "corruptions",
            "leaks",
            "image-end-offset",
            "total-clusters",
            "allocated-clusters",
            "compressed-clusters",
        ] {
            // QEMU leaves out what is none.
            let number = |value: &Value| if value.is_null() { Value::from(0) } else { value.clone() };
            assert_eq!(number(&said[key]), number(&expected[key]), "{key}: {said}, QEMU says {expected}");
        }
        assert_eq!(ours.status.code(), theirs.status.code(), "{said}");
        // In words too.
        let words = output(&["check", &self.0]);
        assert_eq!(words.status.code(), ours.status.code());
        let findings = said["findings"].as_array().unwrap();
        for finding in findings {
            assert!(text(&words.stdout).contains(finding.as_str().unwrap()), "{}", text(&words.stdout));
        }
        ours.status.code().unwrap()
    }
}

fn qemu(tool: &str, words: &[&str]) {
    let output = Command::new(tool).args(words).output().unwrap();
    assert!(output.status.success(), "{words:?}: {}", text(&output.stderr));
}

#[test]
fn a_check_says_what_qemu_img_says() {
    let scratch = Scratch::new();
    for options in ["compat=1.1", "compat=0.10", "cluster_size=4k"] {
        let Some(image) = Image::new(&scratch, options) else { return };
        let before = fs::read(&image.0).unwrap();
        assert_eq!(image.compare(), 0, "{options}");
        image.leak(0);
        image.leak(3);
        assert_eq!(image.compare(), 3, "{options}");
        // A cluster in use that counts as free: nothing keeps it from being used again.
        let data = image.word(image.table() + 8) / if options == "cluster_size=4k" { 4096 } else { 65536 };
        image.put(image.refcount(data), &[0, 0]);
        assert_eq!(image.compare(), 2, "{options}: leaks and a corruption");
        fs::write(&image.0, &before).unwrap();
        // One that is said to be shared, by its refcount and not by its entry.
        image.put(image.refcount(data), &[0, 2]);
        assert_eq!(image.compare(), 2, "{options}");
        fs::write(&image.0, &before).unwrap();
        image.put(image.table() + 8, &[0]);
        assert_eq!(image.compare(), 2, "{options}: an entry's bit 63");
        fs::remove_file(&image.0).unwrap();
    }
}

#[test]
fn what_cannot_be_checked_is_told_apart_from_what_is_corrupt() {
    let scratch = Scratch::new();
    let path = scratch.path("raw");
    fs::write(&path, vec![0; 4096]).unwrap();
    for (path, why) in [(path, "no qcow2 image"), (scratch.path("none"), "No such file")] {
        let output = output(&["check", &path]);
        assert_eq!(output.status.code(), Some(1));
        let error = text(&output.stderr);
        assert!(error.contains(why) && error.contains(&path), "{error}");
    }
}

//! A file system made by one kernel through the service must be the same file system to everybody else.

use std::path::Path;
use std::process::Command;

use crate::guest::Results;
use crate::linux;
use crate::needs::{self, Need, Turn, program};
use crate::scratch::{Scratch, md5, output};
use crate::service::{self, Disk, Service};

/// Where the job puts its only partition.
const PARTITION_BYTE: u64 = 2048 * 512;
const PROGRAMS: [&str; 3] = ["sfdisk", "mkfs.ext4", "e2fsck"];
const DISK_MIB: u64 = 96;

#[test]
fn an_ext4_made_in_a_guest_on_a_raw_image_reads_the_same_on_the_host() {
    let Some(_turn) = turn(&["debugfs", "md5sum"]) else { return };
    let scratch = Scratch::new();
    let image = scratch.image("disk", DISK_MIB);
    let results = run(&scratch, Disk::Raw(image.clone()), &[]);
    compare(&scratch, &image, &results);
}

#[test]
fn an_ext4_made_in_a_guest_on_a_qcow2_image_reads_the_same_on_the_host() {
    let Some(_turn) = turn(&["debugfs", "md5sum", "qemu-img"]) else { return };
    let scratch = Scratch::new();
    let (image, raw) = (scratch.path("qcow2"), scratch.path("raw"));
    let qemu_img = || Command::new(program("qemu-img").unwrap());
    output(qemu_img().args(["create", "-q", "-f", "qcow2"]).arg(&image).arg(format!("{DISK_MIB}M")));
    let results = run(&scratch, Disk::Qcow2(image.clone()), &[]);
    output(qemu_img().args(["check", "-q", "-f", "qcow2"]).arg(&image));
    output(qemu_img().args(["convert", "-f", "qcow2", "-O", "raw"]).arg(&image).arg(&raw));
    compare(&scratch, &raw, &results);
}

#[test]
fn an_ext4_in_memory_keeps_its_files() {
    if !service::is_ours() {
        return needs::skip("the peer has no disk in memory");
    }
    let Some(_turn) = turn(&[]) else { return };
    run(&Scratch::new(), Disk::Memory(DISK_MIB), &[]);
}

#[test]
fn an_ext4_is_made_under_every_polling_policy() {
    if !service::is_ours() {
        return needs::skip("the peer has one policy");
    }
    let Some(_turn) = turn(&[]) else { return };
    for policy in ["notify", "hybrid", "poll"] {
        let scratch = Scratch::new();
        run(&scratch, Disk::Raw(scratch.image("disk", DISK_MIB)), &["--poll", policy]);
    }
}

fn turn(programs: &[&'static str]) -> Option<Turn> {
    let programs = PROGRAMS.iter().chain(programs).map(|name| Need::Program(name));
    needs::turn(&programs.chain([Need::Linux]).collect::<Vec<_>>())
}

fn run(scratch: &Scratch, disk: Disk, options: &[&str]) -> Results {
    // This driver accepts packed rings and then starts them with the wrong wrap counters.
    let options = [&["--without", "packed"], options].concat();
    let mut service = Service::start("service", disk, &scratch.path("blk"), &options);
    let results = linux::boot(scratch, &service.socket(), "filesystem", &PROGRAMS).finish();
    results.all_ok();
    service.terminate();
    results
}

/// Reads a raw image without mounting it, and without the service.
fn compare(scratch: &Scratch, image: &Path, results: &Results) {
    let partition = format!("{}?offset={PARTITION_BYTE}", image.display());
    output(Command::new(program("e2fsck").expect("a need")).args(["-f", "-n", &partition]));
    let copies = scratch.path("files");
    std::fs::create_dir(&copies).expect("create a directory for the copies");
    let request = format!("rdump / {}", copies.display());
    output(Command::new(program("debugfs").expect("a need")).args(["-R", &request, &partition]));

    let sums = results.lines_after("SUM ");
    assert_eq!(sums.len().to_string(), results.ok("files"));
    assert!(sums.len() > 200, "only {} files", sums.len());
    for line in sums {
        let (sum, file) = line.split_once("  ./").expect("md5sum prints a sum and a file");
        assert_eq!(md5(&copies.join(file)), sum, "{file}");
    }
}

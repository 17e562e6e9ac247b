//! A disk that must not change, in each kind of guest.

use std::fs;
use std::io::Write;
use std::path::Path;

use crate::guest::Guest;
use crate::linux;
use crate::needs::{self, Need};
use crate::scratch::{Scratch, md5};
use crate::service::{Disk, Service};
use crate::uml::Uml;

const JOB: &str = "readonly";

#[test]
fn a_read_only_disk_can_be_read_and_nothing_else_by_user_mode_linux() {
    let Some(_turn) = needs::turn(&[Need::Uml, Need::Program("md5sum")]) else { return };
    let uml = Uml::find().expect("Uml is among the needs");
    read(|scratch, socket| uml.boot(scratch, socket, JOB, &[]));
}

#[test]
fn a_read_only_disk_can_be_read_and_nothing_else_in_an_emulated_pc() {
    let Some(_turn) = needs::turn(&[Need::PcKernel, Need::Program("md5sum")]) else { return };
    read(|scratch, socket| linux::emulated(scratch, socket, JOB, &[]));
}

fn read(boot: impl FnOnce(&Scratch, &Path) -> Guest) {
    let scratch = Scratch::new();
    let image = scratch.image("disk", 16);
    let mut file = fs::OpenOptions::new().write(true).open(&image).expect("open the image");
    (0..1_u32 << 20).for_each(|word| {
        file.write_all(&word.wrapping_mul(0x9e37_79b9).to_le_bytes()).expect("fill the image")
    });
    let before = md5(&image);

    let disk = Disk::ReadOnly(image.clone());
    let mut service = Service::start("service", disk, &scratch.path("blk"), &["--without", "packed"]);
    let results = boot(&scratch, &service.socket()).finish();
    results.all_ok();
    service.terminate();

    assert_eq!(results.ok("read-only"), "1");
    assert_eq!(results.ok("image"), before);
    assert_eq!(md5(&image), before);
}

//! A disk that must not change.

use std::fs;
use std::io::Write;

use crate::needs::{self, Need};
use crate::scratch::{Scratch, md5};
use crate::service::{Disk, Service};
use crate::uml;

#[test]
fn a_read_only_disk_can_be_read_and_nothing_else() {
    let Some(_turn) = needs::turn(&[Need::UmlKernel, Need::Program("md5sum")]) else { return };
    let scratch = Scratch::new();
    let image = scratch.image("disk", 16);
    let mut file = fs::OpenOptions::new().write(true).open(&image).unwrap();
    (0..1_u32 << 20).for_each(|word| file.write_all(&word.wrapping_mul(0x9e37_79b9).to_le_bytes()).unwrap());
    let before = md5(&image);

    let disk = Disk::ReadOnly(image.clone());
    let mut service = Service::start("service", disk, &scratch.path("blk"), &["--without", "packed"]);
    let results = uml::boot(&scratch, &service.socket(), "readonly", &[]).finish();
    results.all_ok();
    service.terminate();

    assert_eq!(results.ok("read-only"), "1");
    assert_eq!(results.ok("image"), before);
    assert_eq!(md5(&image), before);
}

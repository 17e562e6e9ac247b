//! Guests come and go; the service stays.

use crate::linux;
use crate::needs::{self, Need};
use crate::scratch::Scratch;
use crate::service::{Disk, Service};

#[test]
fn a_service_outlives_guests_killed_in_the_middle_of_their_io() {
    let programs = ["sfdisk", "mkfs.ext4", "e2fsck"];
    let [sfdisk, mkfs, e2fsck] = programs.map(Need::Program);
    let Some(_turn) = needs::turn(&[Need::Linux, sfdisk, mkfs, e2fsck]) else { return };
    let scratch = Scratch::new();
    let disk = Disk::Raw(scratch.image("disk", 96));
    let mut service = Service::start("service", disk, &scratch.path("blk"), &["--without", "packed"]);
    for _ in 0..3 {
        let mut guest = linux::boot(&scratch, &service.socket(), "endless", &[]);
        guest.wait_beats(2);
        guest.kill();
        service.assert_running();
    }
    linux::boot(&scratch, &service.socket(), "filesystem", &programs).finish().all_ok();
    service.terminate();
}

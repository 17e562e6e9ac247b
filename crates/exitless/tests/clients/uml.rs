//! User-Mode Linux: the kernel as an ordinary process. Boots in a second, has one CPU and drives one queue.

use std::path::Path;

use crate::guest::Guest;
use crate::scratch::Scratch;
use crate::{initramfs, kernel, process};

/// Boots a guest that runs `job` with a disk from the vhost-user-blk service at `socket`.
pub(crate) fn boot(scratch: &Scratch, socket: &Path, job: &str, programs: &[&str]) -> Guest {
    let kernel = kernel::uml().expect("UmlKernel is among the needs of this test");
    let initrd = initramfs::build("uml", &kernel, programs);
    let mut command = process::command(&kernel.image);
    command
        .args(["mem=256M", "rdinit=/init", "con=null", "con0=null,fd:1", "quiet", "umid=guest"])
        .arg(format!("initrd={}", initrd.display()))
        .arg(format!("uml_dir={}", scratch.path("").display()))
        .arg(format!("virtio_uml.device={}:2", socket.display()))
        .arg(format!("job={job}"));
    Guest::boot("uml", &mut command)
}

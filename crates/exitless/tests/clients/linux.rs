//! A Linux guest with one disk, whichever way to one works here: User-Mode Linux, which is faster, or QEMU.

use std::path::Path;

use crate::guest::Guest;
use crate::qemu::{self, Setup};
use crate::scratch::Scratch;
use crate::uml::Uml;

/// Whether there is one, or the reasons why not.
pub(crate) fn works() -> Result<(), String> {
    let Err(uml) = Uml::find() else { return Ok(()) };
    qemu::works().map_err(|qemu| format!("{uml}; instead of it: {qemu}"))
}

/// Boots a guest that runs `job` with a disk from the vhost-user-blk service at `socket`.
pub(crate) fn boot(scratch: &Scratch, socket: &Path, job: &str, programs: &[&str]) -> Guest {
    match Uml::find() {
        Ok(uml) => uml.boot(scratch, socket, job, programs),
        Err(reason) => {
            println!("in QEMU. {reason}");
            emulated(scratch, socket, job, programs)
        }
    }
}

/// The same in QEMU in any case.
pub(crate) fn emulated(scratch: &Scratch, socket: &Path, job: &str, programs: &[&str]) -> Guest {
    let socket = socket.to_owned();
    let setup = Setup { name: "qemu", socket, job, programs, packed: false, incoming: None };
    qemu::boot(scratch, &setup).guest
}

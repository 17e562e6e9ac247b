//! What tests with guests need from the machine, and whose turn it is.

use std::env;
use std::fs::File;
use std::path::{Path, PathBuf};

pub(crate) use ::needs::skip;

use crate::uml::Uml;
use crate::{kernel, linux, probe, qemu, service};

/// One thing that must be there before a test can start.
pub(crate) enum Need {
    /// A program of this name, in `PATH` or in one of the directories for administrators.
    Program(&'static str),
    /// QEMU and a kernel for its guests, with its modules.
    PcKernel,
    /// The same, with KVM for AMD processors.
    HostKernel,
    /// Some way to a Linux guest with one disk.
    Linux,
    /// User-Mode Linux with its virtio block driver.
    Uml,
    /// The same, whether it works or not.
    UmlKernel,
}

/// The right to run guests: each wants all cores of a small machine, so they take turns, across processes too.
pub(crate) struct Turn {
    _lock: File,
}

/// Where built guests are kept between runs.
pub(crate) fn cache_dir() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

/// Waits for this test's turn to run guests, or returns `None` after recording why it is skipped.
pub(crate) fn turn(needs: &[Need]) -> Option<Turn> {
    if env::var_os("EXITLESS_QUICK").is_some() {
        skip("no guests in a quick run");
        return None;
    }
    let lock = File::create(cache_dir().join("guests.lock")).expect("create the lock that guests queue at");
    lock.lock().expect("lock out other guests");
    // Probes are guests too.
    if let Err(reason) = needs.iter().try_for_each(met).and_then(|()| service::works()) {
        skip(reason);
        return None;
    }
    Some(Turn { _lock: lock })
}

/// The path of a program, also for users whose `PATH` lacks the directories for administrators.
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let admin = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    env::split_paths(&path).chain(admin).map(|dir| dir.join(name)).find(|file| file.is_file())
}

/// Whether the program of this name is there and works, or the reason why not.
pub(crate) fn works(name: &str) -> Result<(), String> {
    probe::program(name, &program(name).ok_or_else(|| format!("no {name} installed"))?)
}

fn met(need: &Need) -> Result<(), String> {
    match need {
        Need::Program(name) => works(name),
        Need::PcKernel => qemu::works(),
        Need::HostKernel => kernel::host().and(qemu::works()),
        Need::Linux => linux::works(),
        Need::Uml => Uml::find().map(drop),
        Need::UmlKernel => kernel::uml().and(works("busybox")),
    }
}

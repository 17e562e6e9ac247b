//! What tests with guests need from the machine, and whose turn it is.

use std::env;
use std::fs::File;
use std::path::{Path, PathBuf};

pub(crate) use ::needs::skip;

use crate::{kernel, service};

/// One thing that must be there before a test can start.
pub(crate) enum Need {
    /// A program of this name, in `PATH` or in one of the directories for administrators.
    Program(&'static str),
    /// A kernel for QEMU guests, with its modules.
    PcKernel,
    /// The same kernel, with KVM for AMD processors.
    HostKernel,
    /// User-Mode Linux with its virtio block driver.
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
    if let Some(reason) = missing(needs) {
        skip(reason);
        return None;
    }
    let lock = File::create(cache_dir().join("guests.lock")).expect("create the lock that guests queue at");
    lock.lock().expect("lock out other guests");
    Some(Turn { _lock: lock })
}

/// The path of a program, also for users whose `PATH` lacks the directories for administrators.
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let admin = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    env::split_paths(&path).chain(admin).map(|dir| dir.join(name)).find(|file| file.is_file())
}

fn missing(needs: &[Need]) -> Option<String> {
    if env::var_os("EXITLESS_QUICK").is_some() {
        return Some("no guests in a quick run".into());
    }
    let unmet = needs.iter().find_map(|need| match need {
        Need::Program(name) => program(name).is_none().then(|| format!("no {name} installed")),
        Need::PcKernel => kernel::pc().err(),
        Need::HostKernel => kernel::host().err(),
        Need::UmlKernel => kernel::uml().err(),
    });
    let linux = needs.iter().any(|need| matches!(need, Need::PcKernel | Need::UmlKernel));
    let busybox = || (linux && program("busybox").is_none()).then(|| "no busybox installed".into());
    unmet.or_else(busybox).or_else(service::missing)
}

//! What a test needs from the machine, and how a test that cannot have it is skipped and counted. For tests only.
//!
//! libtest knows no "skipped at run time", so such a test passes for the runner. To keep the count honest it also
//! prints `skipped: test: reason` and appends that line to the file named by `EXITLESS_SKIPS`, which `./test` subtracts
//! from the number of passed tests.

#![warn(missing_docs)]

use std::env;
use std::fmt::Display;
use std::fs::OpenOptions;
use std::io::{self, Write};

use kvm_ioctls::Kvm;

/// What virtual machines need.
const KVM: &str = "/dev/kvm";

/// Records that the running test passes by default for `reason`.
///
/// # Panics
/// The file named by `EXITLESS_SKIPS` cannot be written: the count would be wrong.
pub fn skip(reason: impl Display) {
    let line = format!("skipped: {}: {reason}", test_name());
    println!("{line}");
    if let Some(list) = env::var_os("EXITLESS_SKIPS")
        && let Err(error) = append(list.as_ref(), &line)
    {
        panic!("cannot append to {}: {error}", list.display());
    }
}

/// Whether virtual machines can be run here. If not, the running test is recorded as skipped.
#[must_use]
pub fn kvm() -> bool {
    let made = machine();
    if let Err(reason) = &made {
        skip(reason);
    }
    made.is_ok()
}

/// Makes a machine with a processor, and forgets it: a device that can be opened need not work.
fn machine() -> Result<(), String> {
    let kvm = Kvm::new().map_err(|error| format!("cannot open {KVM}: {error}"))?;
    let machine = kvm.create_vm().and_then(|vm| vm.create_irq_chip().and_then(|()| vm.create_vcpu(0)));
    machine.map(drop).map_err(|error| format!("{KVM} makes no machine: {error}"))
}

fn append(path: &std::path::Path, line: &str) -> io::Result<()> {
    // One write, so that lines of tests that run at the same time do not mix.
    OpenOptions::new().create(true).append(true).open(path)?.write_all(format!("{line}\n").as_bytes())
}

/// libtest names the thread of a test after it, unless it runs tests one at a time on the main thread.
fn test_name() -> String {
    let thread = std::thread::current();
    match thread.name() {
        Some(name) if name != "main" => name.to_owned(),
        _ => env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_else(|| "a test".into()),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_skipped_test_is_known_by_name() {
        assert!(super::test_name().contains("a_skipped_test_is_known_by_name"));
    }

    #[test]
    fn a_machine_is_made_or_the_reason_names_the_device() {
        match super::machine() {
            Ok(()) => println!("{} makes machines", super::KVM),
            Err(reason) => assert!(reason.contains(super::KVM), "{reason}"),
        }
    }

    #[test]
    fn lines_are_appended() {
        let path = std::env::temp_dir().join(format!("exitless-needs-{}", std::process::id()));
        super::append(&path, "skipped: a: b").and_then(|()| super::append(&path, "skipped: c: d")).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "skipped: a: b\nskipped: c: d\n");
        std::fs::remove_file(path).unwrap();
    }
}

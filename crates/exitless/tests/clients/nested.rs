//! Stock Linux in our monitor, where this machine's KVM runs no stock kernels: QEMU emulates an AMD processor with its
//! virtualization, Linux on it offers `/dev/kvm`, and the monitor boots a second Linux there.
//!
//! Both guests are emulated, one of them twice: it takes a minute, so it is part of full runs only. A file beside the
//! built guests says when it last passed.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};
use std::{env, fs};

use crate::guest::Guest;
use crate::needs::{self, Need};
use crate::qemu::KERNEL_OPTIONS;
use crate::{initramfs, kernel, process};

const PROGRAMS: [&str; 3] = ["sfdisk", "mkfs.ext4", "e2fsck"];
/// One CPU with `svm`: with several, virtualization is switched on and off on all of them whenever the first machine
/// comes and the last one goes, and now and then one of the emulated CPUs misses that. Memory for the inner guest, for
/// what is unpacked, and for the archive itself.
const MACHINE: [&str; 10] =
    ["-accel", "tcg,thread=multi", "-M", "q35", "-cpu", "max,+svm", "-smp", "1", "-m", "2G"];
const CONSOLE: [&str; 7] =
    ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"];

#[test]
fn linux_makes_a_file_system_on_a_disk_of_the_monitor() {
    if env::var_os("EXITLESS_FULL").is_none() {
        return needs::skip(format!("a minute of nested emulation, for full runs; {}", last_passed()));
    }
    let program = Path::new(env!("CARGO_BIN_EXE_exitless"));
    let programs = PROGRAMS.map(Need::Program);
    let others = [Need::Program("qemu-system-x86_64"), Need::PcKernel, Need::HostKernel];
    let Some(_turn) = needs::turn(&programs.into_iter().chain(others).collect::<Vec<_>>()) else { return };
    let inner = kernel::pc().expect("PcKernel is among the needs of this test");
    let outer = kernel::host().expect("HostKernel is among the needs of this test");
    let inner_initrd = initramfs::build("pc-nested", &inner, &PROGRAMS);
    let files: [(&str, &Path); 3] =
        [("inner/exitless", program), ("inner/kernel", &inner.image), ("inner/initrd", &inner_initrd)];
    let initrd = initramfs::build_with("host", &outer, &[], &files);

    let mut command =
        process::command(&needs::program("qemu-system-x86_64").expect("QEMU is among the needs"));
    command.args(MACHINE).args(CONSOLE).arg("-kernel").arg(&outer.image).arg("-initrd").arg(initrd);
    command.args(["-append", &format!("{KERNEL_OPTIONS} job=nested")]);
    let results = Guest::boot("nested", &mut command).finish();
    results.all_ok();
    assert_eq!(results.ok("inner-end"), "filesystem");
    assert_eq!(results.ok("inner-monitor-exit-code"), "0");
    let counted = results.lines_after("MONITOR ");
    assert!(counted.iter().any(|line| line.starts_with("power off")), "{counted:?}");
    let passed = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is after 1970").as_secs();
    fs::write(marker(), passed.to_string()).expect("leave a mark");
}

fn marker() -> PathBuf {
    needs::cache_dir().join("nested.passed")
}

fn last_passed() -> String {
    let passed = fs::read_to_string(marker()).ok().and_then(|text| text.parse::<u64>().ok());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok().map(|now| now.as_secs());
    match passed.zip(now) {
        Some((passed, now)) => format!("it last passed here {} hours ago", now.saturating_sub(passed) / 3600),
        None => "it has not passed here yet".to_owned(),
    }
}

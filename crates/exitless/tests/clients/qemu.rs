//! QEMU with an emulated PC: two CPUs, and a vhost-user-blk PCI disk with two queues.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::guest::Guest;
use crate::kernel::Kernel;
use crate::qmp::Qmp;
use crate::scratch::Scratch;
use crate::{initramfs, kernel, needs, probe, process};

const QEMU: &str = "qemu-system-x86_64";
/// Without watchdogs, and without a check at boot that expects four timer interrupts within 40 ms: an emulated processor
/// on a loaded machine stands still for longer.
pub(crate) const KERNEL_OPTIONS: &str =
    "console=ttyS0 quiet rdinit=/init mitigations=off nokaslr nowatchdog no_timer_check panic=-1";

/// 512 MiB and two pages. Before QEMU 9.0 a migration loses writes of emulated CPUs to RAM whose size is a multiple of
/// 64 pages: the fast path that reads 64 dirty bits at once leaves stale "dirty" entries in the CPUs' TLBs
/// ("physmem: Fix migration dirty bitmap coherency with TCG memory access").
const RAM: &str = "524296K";

/// How a guest is set up beyond what all of them share.
pub(crate) struct Setup<'a> {
    /// Names its files and its output; unique within the test.
    pub(crate) name: &'a str,
    pub(crate) socket: PathBuf,
    pub(crate) job: &'a str,
    /// Programs of this machine that the job runs.
    pub(crate) programs: &'a [&'a str],
    /// Offer the packed ring format to the driver.
    pub(crate) packed: bool,
    /// Wait for a running guest to arrive at this socket instead of booting one.
    pub(crate) incoming: Option<PathBuf>,
}

pub(crate) struct Qemu {
    pub(crate) guest: Guest,
    pub(crate) qmp: Qmp,
}

/// Whether the emulated PC boots the kernel for it, or the reason why not.
pub(crate) fn works() -> Result<(), String> {
    let qemu = needs::program(QEMU).ok_or("no qemu-system-x86_64 installed")?;
    let kernel = kernel::pc()?;
    needs::works("busybox")?;
    let reason = |reason| format!("QEMU does not boot {}: {reason}", kernel.image.display());
    probe::once("qemu", || probe::boots(&mut pc(&qemu, &kernel, "probe", &[]))).map_err(reason)
}

/// Boots a guest. When the service goes away, QEMU tries to connect again every second.
pub(crate) fn boot(scratch: &Scratch, setup: &Setup<'_>) -> Qemu {
    boot_with(scratch, setup, &[])
}

/// The same with `more` on QEMU's command line.
pub(crate) fn boot_with(scratch: &Scratch, setup: &Setup<'_>, more: &[&str]) -> Qemu {
    let qemu = needs::program(QEMU).expect("QEMU is among the needs");
    let kernel = kernel::pc().expect("PcKernel is among the needs of this test");
    let control = scratch.path(&format!("{}.qmp", setup.name));
    let packed = if setup.packed { "on" } else { "off" };
    let mut command = pc(&qemu, &kernel, setup.job, setup.programs);
    command
        .arg("-chardev")
        .arg(format!("socket,id=disk,path={},reconnect=1", setup.socket.display()))
        .args([
            "-device",
            &format!("vhost-user-blk-pci,chardev=disk,num-queues=2,page-per-vq=on,packed={packed}"),
        ])
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", control.display()));
    command.args(more);
    if let Some(incoming) = &setup.incoming {
        command.arg("-incoming").arg(format!("unix:{}", incoming.display()));
    }
    let guest = Guest::boot(setup.name, &mut command);
    Qemu { guest, qmp: Qmp::connect(&control) }
}

/// The machine without a disk.
fn pc(qemu: &Path, kernel: &Kernel, job: &str, programs: &[&str]) -> Command {
    let initrd = initramfs::build(&format!("pc-{}", programs.join("-")), kernel, programs);
    let mut command = process::command(qemu);
    command
        .args(["-accel", "tcg,thread=multi", "-M", "q35", "-cpu", "max", "-smp", "2", "-m", RAM])
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"])
        .args([
            "-object",
            &format!("memory-backend-memfd,id=ram,size={RAM},share=on"),
            "-numa",
            "node,memdev=ram",
        ])
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(initrd)
        .arg("-append")
        .arg(format!("{KERNEL_OPTIONS} job={job}"));
    command
}

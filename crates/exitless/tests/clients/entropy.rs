//! A guest that draws on the host's entropy.

use crate::needs::{self, Need};
use crate::process::{self, Process};
use crate::qemu::{self, Setup};
use crate::scratch::Scratch;
use crate::service::{self, Disk, Service};

#[test]
fn linux_reads_entropy_of_the_host() {
    if !service::is_ours() {
        return needs::skip("the peer has no entropy device");
    }
    let needs = [Need::Program("qemu-system-x86_64"), Need::PcKernel];
    let Some(_turn) = needs::turn(&needs) else { return };
    let scratch = Scratch::new();
    let mut disk = Service::start("disk", Disk::Memory(16), &scratch.path("blk"), &[]);
    let socket = scratch.path("rng");
    let mut command = process::command(service::program());
    let mut entropy = Process::spawn("entropy", command.args(["rng", "--socket"]).arg(&socket));
    entropy.wait_for("readiness", service::LIMIT, |lines| {
        lines.iter().any(|line| line.starts_with("ready: socket")).then_some(())
    });
    let setup = Setup {
        name: "qemu",
        socket: disk.socket(),
        job: "entropy",
        programs: &[],
        packed: false,
        incoming: None,
    };
    let chardev = format!("socket,id=entropy,path={}", socket.display());
    let device = ["-chardev", &chardev, "-device", "vhost-user-rng-pci,chardev=entropy"];
    let results = qemu::boot_with(&scratch, &setup, &device).guest.finish();
    results.all_ok();
    disk.terminate();
    assert_eq!(results.ok("bytes"), "65536");
    let compressed = results.ok("compressed").parse::<u32>().expect("a number");
    assert!(compressed > 65_000, "64 KiB of entropy shrink to {compressed} bytes");
    entropy.terminate();
    assert!(entropy.wait(service::LIMIT).success());
}

//! The embedded guest in stock QEMU, with KVM where that works: it boots, drives QEMU's own disk and ours through QEMU,
//! and says what it finds, errors included.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::needs::{self, Need, Turn};
use crate::probe;
use crate::process::{self, Process};
use crate::scratch::Scratch;
use crate::service::{Disk, Service};

/// The limit for a guest's run: where ring 0 is interpreted, its firmware needs seconds.
const LIFE: Duration = Duration::from_secs(480);
const DISK_MIB: u64 = 64;

/// What the guest is given to drive.
enum Device {
    /// A disk of QEMU's in a raw image.
    Qemu(PathBuf),
    /// A disk of QEMU's that forgets what is written to it.
    Forgetful,
    /// One that takes 60 s for a request, six times as long as the guest waits. QEMU resets nothing and does not end before.
    Silent,
    /// A disk behind this socket.
    Service(PathBuf),
}

/// What the guest said, and how its machine ended.
struct Answer {
    lines: Vec<Value>,
    /// None if it was killed.
    status: Option<i32>,
    console: String,
}

fn turn() -> Option<Turn> {
    needs::turn(&[Need::Program("qemu-system-x86_64")])
}

/// An accelerator of QEMU's, and the processor that goes with it.
type Accelerator = [&'static str; 2];

/// Some versions ask for what some hosts' KVM does not have, unless this feature is off.
const KVM: Accelerator = ["kvm", "host,-arch-capabilities"];
const EMULATED: Accelerator = ["tcg,thread=multi", "max"];

/// Whether QEMU gets the guest to say anything with KVM, or the reason why not.
fn kvm_works() -> Result<(), String> {
    probe::once("qemu-kvm", || {
        fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .map_err(|error| format!("/dev/kvm: {error}"))?;
        let scratch = Scratch::new();
        let mut command = command(&scratch, KVM, "job=blk ms=50", &Device::Forgetful);
        let (_, lines) = probe::output(&mut command)?;
        let said = lines.iter().any(|line| line.starts_with('{'));
        if said { Ok(()) } else { Err(format!("QEMU with KVM: {}", probe::telling(&lines))) }
    })
}

/// Boots the guest with two processors and `options` on its command line, with KVM if that works.
fn boot(scratch: &Scratch, options: &str, device: &Device) -> Answer {
    let accelerator = if kvm_works().is_ok() { KVM } else { EMULATED };
    boot_with(scratch, accelerator, options, device)
}

fn boot_with(scratch: &Scratch, accelerator: Accelerator, options: &str, device: &Device) -> Answer {
    let mut process = Process::spawn("guest", &mut command(scratch, accelerator, options, device));
    if let Device::Silent = device {
        let is_over =
            |lines: &[String]| lines.iter().any(|line| line.starts_with("{\"error\"")).then_some(());
        process.wait_for("an error", LIFE, is_over);
        process.kill();
    }
    let (status, console) = process.finish(LIFE);
    let said = console.iter().filter(|line| line.starts_with('{'));
    let lines = said.map(|line| serde_json::from_str(line).expect("the guest says JSON")).collect();
    Answer { lines, status: status.code(), console: console.join("\n") }
}

fn command(scratch: &Scratch, [accelerator, cpu]: Accelerator, options: &str, device: &Device) -> Command {
    let image = scratch.path("guest.elf");
    fs::write(&image, exitless::guest::ELF).expect("write the guest's image");
    let mut command =
        process::command(&needs::program("qemu-system-x86_64").expect("QEMU is among the needs"));
    command
        .args(["-accel", accelerator, "-M", "q35", "-cpu", cpu, "-smp", "2", "-m", "256M"])
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"])
        .args(["-device", "isa-debug-exit,iobase=0x501,iosize=1"])
        .args(["-object", "memory-backend-memfd,id=ram,size=256M,share=on", "-numa", "node,memdev=ram"])
        .arg("-kernel")
        .arg(&image)
        .args(["-append", options]);
    let (drive, front) = match device {
        Device::Qemu(image) => (format!("file={},format=raw", image.display()), "virtio-blk-pci,drive=disk"),
        Device::Forgetful => ("file=null-co://,format=raw".to_owned(), "virtio-blk-pci,drive=disk"),
        Device::Silent => {
            ("driver=null-co,size=1G,latency-ns=60000000000".to_owned(), "virtio-blk-pci,drive=disk")
        }
        Device::Service(socket) => {
            command.arg("-chardev").arg(format!("socket,id=disk,path={}", socket.display()));
            (String::new(), "vhost-user-blk-pci,chardev=disk")
        }
    };
    if !drive.is_empty() {
        command.args(["-drive", &format!("if=none,id=disk,{drive}")]);
    }
    command.args(["-device", &format!("{front},num-queues=2,disable-legacy=on,packed=on")]);
    command
}

impl Answer {
    /// The results of a job that went well.
    #[track_caller]
    fn results(&self) -> Vec<&Value> {
        // isa-debug-exit makes an odd number of any status.
        assert_eq!(self.status, Some(1), "{}", self.console);
        let ready = self.lines.first().and_then(|line| line.get("ready"));
        let ready = ready.unwrap_or_else(|| panic!("the guest was not ready\n{}", self.console));
        assert_eq!((&ready["cpus"], &ready["disks"]), (&2.into(), &1.into()));
        self.lines.iter().filter_map(|line| line.get("result")).collect()
    }

    /// What the guest gave as the reason of its end.
    #[track_caller]
    fn error(&self) -> &str {
        assert_eq!(self.status, Some(3), "{}", self.console);
        self.reason()
    }

    /// The same, however its machine ended.
    #[track_caller]
    fn reason(&self) -> &str {
        let error = self.lines.last().and_then(|line| line.get("error")?.as_str());
        error.unwrap_or_else(|| panic!("the guest gave no reason\n{}", self.console))
    }
}

/// A number of a result.
#[track_caller]
fn number(result: &Value, name: &str) -> f64 {
    result[name].as_f64().unwrap_or_else(|| panic!("no number `{name}` in {result}"))
}

/// Boots with every format, count of queues and way to wait, one change at a time from boot to boot.
fn drive(scratch: &Scratch, device: &Device) {
    for (ring, jobs, irq) in [("split", 1, 0), ("split", 2, 1), ("packed", 2, 0), ("packed", 1, 1)] {
        let options =
            format!("job=blk ms=100 verify=1 ring={ring} jobs={jobs} irq={irq} id={ring}-{jobs}-{irq}");
        let answer = boot(scratch, &options, device);
        let results = answer.results();
        let [result] = results[..] else { panic!("not one result\n{}", answer.console) };
        assert_eq!(result["id"], format!("{ring}-{jobs}-{irq}"));
        assert_eq!((&result["ring"], &result["jobs"]), (&ring.into(), &jobs.into()));
        let bytes = (DISK_MIB << 20).min(jobs * (16 << 20));
        assert_eq!(result["verified_bytes"], bytes, "{}", answer.console);
        assert_eq!(result["errors"], 0, "{}", answer.console);
        assert_eq!(result["lost_interrupts"], 0, "{}", answer.console);
        assert!(number(result, "requests") > 0.0 && number(result, "p50_us") > 0.0, "{}", answer.console);
        assert_eq!(number(result, "interrupts") > 0.0, irq == 1, "{}", answer.console);
    }
}

#[test]
fn the_embedded_guest_says_something_in_qemu_with_kvm() {
    let Some(_turn) = turn() else { return };
    if let Err(reason) = kvm_works() {
        needs::skip(reason);
    }
}

#[test]
fn the_embedded_guest_verifies_a_disk_of_qemus() {
    let Some(_turn) = turn() else { return };
    let scratch = Scratch::new();
    let image = scratch.image("disk", DISK_MIB);
    drive(&scratch, &Device::Qemu(image.clone()));
    let content = fs::read(&image).expect("read the image");
    let written = content.chunks(4096).filter(|block| block.iter().any(|&byte| byte != 0)).count();
    assert!(written >= 8192, "{written} blocks of the image were written");
}

#[test]
fn the_embedded_guest_verifies_a_disk_of_ours_through_qemu() {
    let Some(_turn) = turn() else { return };
    if !crate::service::is_ours() {
        return needs::skip("the peer has no packed rings");
    }
    let scratch = Scratch::new();
    let disk = Disk::Raw(scratch.image("disk", DISK_MIB));
    let mut service = Service::start("service", disk, &scratch.path("blk"), &[]);
    drive(&scratch, &Device::Service(service.socket()));
    service.terminate();
}

#[test]
fn the_embedded_guest_tours_measures_events_and_measures_itself() {
    let Some(_turn) = turn() else { return };
    let scratch = Scratch::new();
    let device = Device::Forgetful;

    let tour = boot(&scratch, "ms=50", &device);
    let seen: Vec<_> = tour.results().iter().map(|r| (r["ring"].clone(), r["irq"].clone())).collect();
    let expected = [("split", 0), ("split", 1), ("packed", 0), ("packed", 1)];
    assert_eq!(seen, expected.map(|(ring, irq)| (ring.into(), irq.into())));
    assert!(tour.results().iter().all(|result| result["lost_interrupts"] == 0), "{}", tour.console);

    let events = boot(&scratch, "job=events ms=100 kick=always", &device);
    for name in ["asleep_rounds", "awake_rounds", "asleep_p50_us", "awake_p50_us"] {
        assert!(number(events.results()[0], name) > 0.0, "{name}\n{}", events.console);
    }
    assert_eq!(events.results()[0]["lost_interrupts"], 0, "{}", events.console);
    let ring = boot(&scratch, "job=ring ms=100", &device);
    for name in ["line_rounds", "split_rounds", "packed_rounds", "clock_hz", "service_us", "exit_us"] {
        assert!(number(ring.results()[0], name) > 0.0, "{name}\n{}", ring.console);
    }
}

#[test]
fn the_embedded_guest_says_what_went_wrong() {
    let Some(_turn) = turn() else { return };
    let scratch = Scratch::new();
    for (options, part) in [
        ("job=blk colour=blue", "unknown key `colour`"),
        ("job=blk disk=1", "disk 1 is asked for"),
        ("job=blk jobs=3", "3 jobs need a queue each"),
        ("job=blk ms=50 verify=1", "is not as it was written"),
        ("job=blk qd=256 bs=1m indirect=1", "no memory left"),
        ("job=fault", "fault 6: "),
    ] {
        let answer = boot(&scratch, options, &Device::Forgetful);
        assert!(answer.error().contains(part), "`{options}` ended with: {}", answer.error());
    }
}

#[test]
fn the_embedded_guest_gives_up_a_disk_that_is_silent_with_interrupts_too() {
    let Some(_turn) = turn() else { return };
    let scratch = Scratch::new();
    let options = "job=blk qd=4 ms=50 irq=1";
    // Both kinds of processors have a timer of their own.
    let answers =
        [boot(&scratch, options, &Device::Silent), boot_with(&scratch, EMULATED, options, &Device::Silent)];
    for answer in answers {
        let expected = "disk 0: queue 0: 4 requests are in flight and none came back for 10 s";
        assert_eq!(answer.reason(), expected);
    }
}

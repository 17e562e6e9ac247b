//! Commands to a running service that had better be refused, or given up.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod process;

use std::fs;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use process::{LIMIT, Scratch, Service, output, text};
use rustix::process::{Signal, kill_process};

#[test]
fn a_disk_is_made_smaller_only_by_somebody_who_means_it() {
    const KEPT: u64 = 1 << 20;
    let scratch = Scratch::new();
    let (socket, control, image) =
        (scratch.path("disk.sock"), scratch.path("c.sock"), scratch.path("disk.raw"));
    fs::write(&image, vec![7; 2 << 20]).unwrap();
    let backend = format!("file:{image}");
    let arguments =
        ["blk", "--socket", &socket, "--backend", &backend, "--control", &control, "--name", "vm1"];
    let service = Service::start(&arguments);
    service.line("control: ");
    let size = || fs::metadata(&image).unwrap().len();
    let resize = |arguments: &[&str]| {
        let output =
            output(&[&["ctl", "--control", &control, "resize", "--device", "vm1"], arguments].concat());
        (output.status.code(), text(&output.stdout).to_owned() + text(&output.stderr))
    };
    // A unit that was forgotten, a size that is less than a block whatever is said, and one that is smaller.
    for bytes in ["64", "511"] {
        for flags in [&[][..], &["--shrink"], &["--shrink", "--force"]] {
            let (code, refusal) = resize(&[&[bytes], flags].concat());
            assert_eq!(code, Some(1));
            assert!(refusal.contains("less than one block"), "{refusal}");
        }
    }
    let loses = "error: device `vm1`: going from 2097152 to 1048576 bytes would destroy the last 1048576 bytes \
        and what is in them";
    let (code, refusal) = resize(&["1M"]);
    assert_eq!(code, Some(1));
    assert_eq!(refusal, format!("{loses}; --shrink does that (a size without unit is in bytes)\n"));
    let guest = UnixStream::connect(&socket).unwrap();
    let connected = || output(&["ctl", "--control", &control, "list", "--json"]).stdout;
    let deadline = Instant::now() + LIMIT;
    while !text(&connected()).contains(&format!("\"peer_pid\":{}", std::process::id())) {
        assert!(Instant::now() < deadline, "the front end is not seen");
    }
    let (code, refusal) = resize(&["1M", "--shrink"]);
    assert_eq!(code, Some(1));
    assert_eq!(refusal, format!("{loses}, and a guest is connected; --force does it all the same\n"));
    assert_eq!(size(), 2 << 20, "nothing was changed");
    // To grow it takes nothing of that.
    assert_eq!(resize(&["3M", "--shrink"]).0, Some(0));
    assert_eq!(resize(&["2M", "--shrink", "--force"]).0, Some(0));
    assert_eq!(size(), 2 << 20);
    drop(guest);
    while resize(&["1M", "--shrink"]).0 != Some(0) {
        assert!(Instant::now() < deadline, "the front end is not gone");
    }
    assert_eq!(size(), KEPT);
    assert_eq!(fs::read(&image).unwrap(), vec![7; KEPT as usize]);
}

#[test]
fn a_service_that_was_stopped_is_not_waited_for_long() {
    let scratch = Scratch::new();
    let control = scratch.path("c.sock");
    let service = Service::ready(&scratch.path("a.sock"), &["--control", &control, "--name", "vm1"]);
    service.line("control: ");
    kill_process(service.pid(), Signal::STOP).unwrap();
    for command in [&["list"][..], &["resize", "--device", "vm1", "2G"]] {
        let silent = output(&[&["ctl", "--control", &control], command].concat());
        assert_eq!(silent.status.code(), Some(1));
        let reason =
            "no answer for 5 s: the service is stopped, or hangs; it may still do what it was told\n";
        assert!(text(&silent.stderr).ends_with(reason), "{}", text(&silent.stderr));
    }
    kill_process(service.pid(), Signal::CONT).unwrap();
}

//! `exitless run` with the embedded guest, under the real KVM.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::io::{Read, Write};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tiny::Program;

#[path = "../../vmm/tests/tiny/mod.rs"]
mod tiny;

fn exitless(arguments: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_exitless"));
    command.arg("run").args(arguments.split_whitespace()).stdin(Stdio::null()).output().unwrap()
}

/// The lines of JSON of a run that must succeed.
fn results(arguments: &str) -> Vec<Value> {
    let output = exitless(&format!("{arguments} --json"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "exitless run {arguments}: {}\n{stderr}", output.status);
    let stdout = String::from_utf8(output.stdout).unwrap();
    stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A verified job, repeated for longer until the machine has found time for requests; returns its figures.
fn verified(arguments: &str) -> Value {
    let result = [0.2, 1.0, 5.0].iter().find_map(|seconds| {
        let job = format!("--guest-job blk --verify --seconds {seconds} --disk mem:16M,queues=2");
        let mut results = results(&format!("{job} {arguments}"));
        assert_eq!(results.len(), 1, "{arguments}");
        results.pop().filter(|result| result["requests"].as_u64().unwrap() > 0)
    });
    let result = result.unwrap_or_else(|| panic!("{arguments}: not one request"));
    assert_eq!(result["errors"], 0, "{arguments}: {result}");
    assert_eq!(result["lost_interrupts"], 0, "{arguments}: {result}");
    assert!(result["verified_bytes"].as_u64().unwrap() > 0, "{arguments}: {result}");
    result
}

#[test]
fn data_is_what_was_written_over_every_ring_policy_and_way_of_completion() {
    if !needs::kvm() {
        return;
    }
    for jobs in [1, 2] {
        for ring in ["split", "packed"] {
            for completion in ["polled", "interrupt"] {
                for poll in ["notify", "hybrid", "poll"] {
                    verified(&format!(
                        "--jobs {jobs} --ring {ring} --completion {completion} --poll {poll} --io-threads 1"
                    ));
                }
            }
        }
    }
}

#[test]
fn a_polled_job_needs_no_kick_and_no_interrupt() {
    if !needs::kvm() {
        return;
    }
    let result = verified("--poll poll");
    assert_eq!((&result["kicks"], &result["interrupts"]), (&0.into(), &0.into()), "{result}");
}

#[test]
fn a_mapped_doorbell_spares_a_driver_that_always_kicks_the_exits() {
    if !needs::kvm() {
        return;
    }
    let mapped = verified("--poll poll --always-kick --doorbell map");
    let trapped = verified("--poll poll --always-kick --doorbell trap");
    let (mapped, trapped) = (mapped["kicks"].as_u64().unwrap(), trapped["kicks"].as_u64().unwrap());
    assert!(mapped == 0 && trapped > 10, "{mapped} and {trapped} kicks caused exits");
}

#[test]
fn writes_reach_an_image_file() {
    if !needs::kvm() {
        return;
    }
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(16 << 20).unwrap();
    let disk = image.path().display();
    let arguments = format!("--guest-job blk --verify --rw randwrite --seconds 0.2 --disk file:{disk}");
    assert_eq!(results(&arguments)[0]["errors"], 0);
    let written = std::fs::read(image.path()).unwrap();
    assert!(written.iter().any(|&byte| byte != 0), "the image is as empty as before");
}

#[test]
fn the_tour_shows_every_disk() {
    if !needs::kvm() {
        return;
    }
    let output = exitless("");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    assert!(text.lines().filter(|line| line.contains("randread")).count() >= 2, "{text}");
    assert!(text.contains("exits/req"), "{text}");
}

/// Told to end, it waits for storage and consoles, but not for ever: the limit is half a minute, and so is this test.
#[test]
fn a_machine_whose_console_is_stuck_ends_when_it_is_told_to() {
    if std::env::var_os("EXITLESS_FULL").is_none() {
        return needs::skip("half a minute of waiting, for full runs");
    }
    if !needs::kvm() {
        return;
    }
    let program = Program::new();
    let start = program.here();
    let mut kernel = tempfile::NamedTempFile::new().unwrap();
    kernel.write_all(program.print(&"x".repeat(1000)).jump(start).elf()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_exitless"));
    command.arg("run").arg("--kernel").arg(kernel.path()).stdin(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut console = child.stdout.take().unwrap();
    console.read_exact(&mut [0; 1000]).unwrap();
    // What room the pipe has is filled from here too, and nobody reads it.
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&console));
    let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::NONBLOCK;
    let pipe = rustix::fs::open(path, flags, rustix::fs::Mode::empty()).unwrap();
    while rustix::io::write(&pipe, b"x").is_ok() {}
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let deadline = Instant::now() + Duration::from_secs(120);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("it does not end");
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    assert_eq!(status.code(), Some(1));
}

#[test]
fn what_cannot_be_run_is_refused_with_the_reason() {
    if !needs::kvm() {
        return;
    }
    for (arguments, reason) in [
        ("--kernel /nowhere/vmlinuz", "/nowhere/vmlinuz"),
        ("--disk file:/nowhere/disk.raw", "/nowhere/disk.raw"),
        ("--mem 1M", "memory"),
        ("--cpus 0", "at least 1"),
        ("--disk tape:x", "tape"),
    ] {
        let output = exitless(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{arguments}");
        assert!(stderr.to_lowercase().contains(reason), "{arguments}: {stderr}");
    }
}

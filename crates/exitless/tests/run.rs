//! `exitless run` with the embedded guest, under the real KVM.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tiny::Program;

#[path = "../../vmm/tests/tiny/mod.rs"]
mod tiny;

fn exitless(arguments: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_exitless"));
    command.arg("run").args(arguments.split_whitespace()).stdin(Stdio::null()).output().unwrap()
}

/// Whether a run succeeded, or only found no time for a request, as happens where the machine has much else to do.
fn went_well(output: &Output) -> bool {
    let stderr = String::from_utf8_lossy(&output.stderr);
    output.status.success() || stderr.contains("no request came back while it was measured")
}

/// The lines of JSON of a run that must succeed.
fn results(arguments: &str) -> Vec<Value> {
    let output = exitless(&format!("{arguments} --json"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(went_well(&output), "exitless run {arguments}: {}\n{stderr}", output.status);
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
    assert!(went_well(&output), "{text}");
    assert!(text.lines().filter(|line| line.contains("randread")).count() >= 2, "{text}");
    assert!(text.contains("exits/req"), "{text}");
}

/// A run in a shell that first does something to itself.
fn exitless_after(command: &str, arguments: &str) -> Output {
    let line = format!("{command}; exec {} run {arguments}", env!("CARGO_BIN_EXE_exitless"));
    Command::new("sh").args(["-c", &line]).stdin(Stdio::null()).output().unwrap()
}

#[test]
fn descriptors_are_had_as_far_as_the_hard_limit_and_what_is_short_is_said_at_once() {
    if !needs::kvm() {
        return;
    }
    let arguments = "--guest-job blk --seconds 0.1 --disk null:1G,queues=64";
    let output = exitless_after("ulimit -Sn 40", arguments);
    assert!(went_well(&output), "{}", String::from_utf8_lossy(&output.stderr));
    let output = exitless_after("ulimit -n 300", arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("the limit is 300") && output.stdout.is_empty(), "{stderr}");
}

#[test]
fn requests_that_failed_are_no_work() {
    if !needs::kvm() {
        return;
    }
    // No file may be longer than the guest's memory and a little: writes beyond that fail.
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(128 << 20).unwrap();
    let arguments = format!(
        "--guest-job blk --rw randwrite --seconds 0.2 --qd 4 --mem 32M --log error --disk file:{},direct=off",
        image.path().display()
    );
    let limit = "trap '' XFSZ; ulimit -f 80000";
    let output = exitless_after(limit, &format!("{arguments} --json"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let line: Value = serde_json::from_slice(&output.stdout).unwrap();
    let count = |name: &str| line[name].as_u64().unwrap_or_else(|| panic!("no {name}: {line}"));
    assert!(count("errors") > 0, "{line}");
    assert!(count("requests") + count("errors") <= count("returned"), "{line}");
    assert!(
        stderr.contains(&format!("{} of {} requests failed", count("errors"), count("returned"))),
        "{stderr}"
    );

    let output = exitless_after(limit, &arguments);
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{stdout}");
    assert!(stdout.contains(" requests failed\n"), "{stdout}");
}

/// A run that was started and is to be signalled.
fn started(arguments: &str) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_exitless"));
    command.arg("run").args(arguments.split_whitespace()).stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

#[test]
fn a_signal_ends_a_job_early_and_what_was_measured_is_told() {
    if !needs::kvm() {
        return;
    }
    for job in ["blk", "blk --jobs 2 --completion interrupt", "events --completion interrupt", "rng", "tour"]
    {
        let metrics = tempfile::tempdir().unwrap();
        let socket = metrics.path().join("metrics");
        let mut child =
            started(&format!("--guest-job {job} --seconds 3000 --json --metrics unix:{}", socket.display()));
        // Until it works: the rate of a tour's jobs is none of this test's business.
        wait_for_requests(&mut child, &socket);
        signal(&child, Signal::TERM);
        let output = child.wait_with_output().unwrap();
        let (stdout, stderr) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(1), "{job}: {stderr}");
        if job == "tour" {
            continue;
        }
        assert!(stderr.contains("cut short by a signal"), "{job}: {stderr}");
        let line: Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
        assert_eq!(line["cut_short"], 1, "{job}: {line}");
        assert!(line["seconds"].as_f64().is_none_or(|seconds| seconds < 3000.0), "{job}: {line}");
    }
}

/// Waits until the machine behind a metrics socket has made many requests.
fn wait_for_requests(child: &mut Child, socket: &std::path::Path) {
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none(), "it makes no requests");
        if requests(socket).is_some_and(|requests| requests > 100) {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn requests(socket: &std::path::Path) -> Option<u64> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").ok()?;
    let mut page = String::new();
    stream.read_to_string(&mut page).ok()?;
    let samples = page.lines().filter(|line| line.starts_with("exitless_queue_requests_total{"));
    samples.map(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok()).sum()
}

/// A kernel of a few instructions; what it prints first is `>`.
fn kernel(program: Program) -> tempfile::NamedTempFile {
    let mut kernel = tempfile::NamedTempFile::new().unwrap();
    kernel.write_all(program.elf()).unwrap();
    kernel
}

#[test]
fn a_first_signal_presses_the_power_button_and_a_second_one_stops() {
    if !needs::kvm() {
        return;
    }
    const POWER_BUTTON: u16 = 1 << 8;
    let listening = || Program::new().out16(0x602, POWER_BUTTON).print(">");
    let good = kernel(listening().wait_for_port(0x600, POWER_BUTTON).out16(0x604, 0x3400).halt());
    let deaf = kernel(listening().wait_for_port(0x600, POWER_BUTTON).print("!").halt());
    for (kernel, obeys) in [(good, true), (deaf, false)] {
        let mut child = started(&format!("--mem 64M --kernel {}", kernel.path().display()));
        let mut console = child.stdout.take().unwrap();
        console.read_exact(&mut [0; 1]).unwrap();
        signal(&child, Signal::TERM);
        if !obeys {
            console.read_exact(&mut [0; 1]).unwrap();
            assert!(child.try_wait().unwrap().is_none(), "the guest was not waited for");
            signal(&child, Signal::TERM);
        }
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(stderr.contains("SIGTERM: the guest is asked"), "{stderr}");
        assert_eq!(output.status.code(), Some(if obeys { 0 } else { 1 }), "{stderr}");
        assert_eq!(stderr.contains("cut off"), !obeys, "{stderr}");
    }
}

#[test]
fn a_guest_that_never_came_up_is_a_failure_and_says_why() {
    if !needs::kvm() {
        return;
    }
    let words = "Kernel panic - not syncing: no init\n";
    for (program, code, reason) in [
        (Program::new().triple_fault(), 1, "triple fault"),
        (Program::new().out8(0x505, 1).halt(), 1, "its kernel panicked"),
        (Program::new().print(words).out8(0x64, 0xFE).halt(), 1, "by what it said"),
        (Program::new().print("rebooting\n").jump(0xF_FFF0), 0, ""),
    ] {
        let kernel = kernel(program);
        let output = exitless(&format!("--mem 64M --kernel {}", kernel.path().display()));
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{reason}: {stderr}");
        assert!(stderr.contains(reason), "{stderr}");
    }
    let mut cut = kernel(Program::new().exit(0));
    let bytes = cut.as_file().metadata().unwrap().len();
    cut.as_file_mut().set_len(bytes - 1).unwrap();
    let output = exitless(&format!("--mem 64M --kernel {}", cut.path().display()));
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
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
    let kernel = kernel(program.print(&"x".repeat(1000)).jump(start));
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
    signal(&child, Signal::TERM);
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
        ("--guest-job blk --qd 256 --bs 1M", "--mem"),
        ("--vcpu-cpus 1023", "may not run on cpu 1023"),
        ("--io-cpus 1023", "may not run on cpu 1023"),
    ] {
        let output = exitless(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments}");
        assert!(stderr.to_lowercase().contains(reason), "{arguments}: {stderr}");
    }
}

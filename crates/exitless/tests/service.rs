//! The program as a process: it says when it is ready, keeps others off its socket, answers, and ends cleanly.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod process;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blk::Backend;
use blk::backends::file::{File, FileOptions, Lock};
use process::{LIMIT, Scratch, Service, exitless, output, text};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use virtio::Memory;

#[test]
fn a_service_says_where_it_is_and_leaves_nothing_behind() {
    for signal in [Signal::TERM, Signal::INT] {
        let scratch = Scratch::new();
        let socket = scratch.path("vm1-disk.sock");
        let mut service =
            Service::start(&["blk", "--socket", &socket, "--backend", "null:8G", "--queues", "2"]);
        let ready = service.line("ready: ");
        assert!(
            ready.starts_with(&format!("ready: socket {socket} (virtio-blk, 2 queues, I/O thread")),
            "{ready}"
        );
        assert!(ready.ends_with(", hybrid)"), "{ready}");
        let file = fs::metadata(&socket).unwrap();
        assert!(file.file_type().is_socket());
        assert_eq!(file.permissions().mode() & 0o777, 0o600);
        UnixStream::connect(&socket).unwrap();
        assert_eq!(service.end(signal), Some(0));
        assert!(!Path::new(&socket).exists());
        service.line("stopping: SIG");
        service.line("stopped: ");
    }
}

#[test]
fn a_connected_front_end_does_not_keep_a_service_from_ending() {
    let scratch = Scratch::new();
    let socket = scratch.path("a.sock");
    let mut service = Service::ready(&socket, &[]);
    let mut front_end = UnixStream::connect(&socket).unwrap();
    assert_eq!(service.end(Signal::TERM), Some(0));
    assert_eq!(front_end.read(&mut [0]).unwrap_or(0), 0, "the connection is closed");
}

/// Whoever started a service may have read its readiness and gone, while it logs every connection.
#[test]
fn a_service_whose_log_nobody_reads_goes_on_serving() {
    let scratch = Scratch::new();
    let socket = scratch.path("disk.sock");
    let mut child = exitless(&["blk", "--socket", &socket, "--backend", "null:1G", "--log", "trace"])
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().starts_with("ready: ")));
    drop(lines);
    for _ in 0..3 {
        let mut front_end = UnixStream::connect(&socket).unwrap();
        front_end.set_read_timeout(Some(LIMIT)).unwrap();
        // GET_FEATURES
        front_end.write_all(&[1_u32, 1, 0].map(u32::to_ne_bytes).concat()).unwrap();
        front_end.read_exact(&mut [0; 20]).unwrap();
    }
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

/// A pager that is held, a collector that hangs: the pipe is full and stays so.
#[test]
fn a_service_whose_output_is_blocked_serves_and_ends() {
    for json in [false, true] {
        let scratch = Scratch::new();
        let socket = scratch.path("disk.sock");
        let (_reader, blocked) = rustix::pipe::pipe().unwrap();
        rustix::fs::fcntl_setfl(&blocked, rustix::fs::OFlags::NONBLOCK).unwrap();
        while rustix::io::write(&blocked, &[0; 4096]).is_ok() {}
        rustix::fs::fcntl_setfl(&blocked, rustix::fs::OFlags::empty()).unwrap();
        let mut command = exitless(&["blk", "--socket", &socket, "--backend", "null:1G", "--log", "trace"]);
        command.stdin(Stdio::null()).stderr(blocked.try_clone().unwrap());
        if json {
            command.arg("--json").stdout(blocked);
        }
        let mut child = command.spawn().unwrap();
        let connected = || UnixStream::connect(&socket).ok();
        let deadline = Instant::now() + LIMIT;
        let mut front_end = loop {
            if let Some(front_end) = connected() {
                break front_end;
            }
            assert!(Instant::now() < deadline, "no socket");
            std::thread::sleep(Duration::from_millis(10));
        };
        front_end.set_read_timeout(Some(LIMIT)).unwrap();
        front_end.write_all(&[1_u32, 1, 0].map(u32::to_ne_bytes).concat()).unwrap();
        front_end.read_exact(&mut [0; 20]).unwrap();
        kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
        let code = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status.code();
            }
            if Instant::now() > deadline {
                child.kill().unwrap();
                panic!("it does not end, json {json}");
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        assert_eq!(code, Some(0));
    }
}

#[test]
fn the_socket_of_a_service_that_was_killed_is_replaced() {
    let scratch = Scratch::new();
    let socket = scratch.path("a.sock");
    let control = scratch.path("c.sock");
    let mut service = Service::ready(&socket, &["--control", &control]);
    service.line("control: ");
    assert_eq!(service.end(Signal::KILL), None);
    assert!(Path::new(&socket).exists() && Path::new(&control).exists());
    let service = Service::ready(&socket, &["--control", &control]);
    service.line("control: ");
    UnixStream::connect(&socket).unwrap();
    assert!(output(&["ctl", "--control", &control, "list"]).status.success());
}

#[test]
fn a_socket_that_is_in_use_is_refused_with_the_process_that_has_it() {
    let scratch = Scratch::new();
    let (socket, control) = (scratch.path("a.sock"), scratch.path("c.sock"));
    let mut first = Service::ready(&socket, &["--control", &control]);
    first.line("control: ");
    let owner = first.pid().to_string();
    for taken in [
        ["rng", "--socket", &socket, "--control", &scratch.path("d.sock")],
        ["rng", "--socket", &scratch.path("b.sock"), "--control", &control],
    ] {
        let second = output(&taken);
        assert_eq!(second.status.code(), Some(1));
        let message = text(&second.stderr);
        assert!(message.contains("in use by process ") && message.contains(&owner), "{message}");
    }
    UnixStream::connect(&socket).unwrap();
    assert_eq!(first.end(Signal::TERM), Some(0));
    assert_eq!(fs::read_dir(&scratch.0).unwrap().count(), 0, "the second ones left nothing either");
}

#[test]
fn what_is_not_a_socket_is_never_replaced() {
    let scratch = Scratch::new();
    let file = scratch.path("precious");
    fs::write(&file, "data").unwrap();
    for option in ["--socket", "--control"] {
        let other = if option == "--socket" { "--control" } else { "--socket" };
        let result = output(&["rng", option, &file, other, &scratch.path("b.sock")]);
        assert_eq!(result.status.code(), Some(1));
        assert!(text(&result.stderr).contains("not a socket"), "{}", text(&result.stderr));
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "data");
}

#[test]
fn permissions_and_group_of_the_socket_are_as_told() {
    use std::os::unix::fs::MetadataExt;
    let scratch = Scratch::new();
    let socket = scratch.path("a.sock");
    let group = fs::metadata(&scratch.0).unwrap().gid().to_string();
    let _service = Service::ready(&socket, &["--socket-mode", "660", "--socket-group", &group]);
    let file = fs::metadata(&socket).unwrap();
    assert_eq!((file.mode() & 0o777, file.gid().to_string()), (0o660, group));
}

#[test]
fn one_process_serves_the_devices_of_a_file_and_tells_machines_so() {
    let scratch = Scratch::new();
    let (disk, rng, control) = (scratch.path("disk.sock"), scratch.path("rng.sock"), scratch.path("c.sock"));
    let config = scratch.path("vm.toml");
    let file = format!(
        "control = '{control}'\n[[blk]]\nsocket = '{disk}'\nbackend = 'null:1G'\nqueues = 3\npoll = 'notify'\n\
         [[rng]]\nsocket = '{rng}'\nbandwidth = '64K'\n"
    );
    fs::write(&config, file).unwrap();
    let mut service = Service::start(&["serve", "--config", &config, "--json"]);
    let ready = [service.event(), service.event()];
    assert_eq!(ready[0]["event"], "ready");
    assert_eq!((&ready[0]["device"], &ready[0]["kind"]), (&"disk".into(), &"virtio-blk".into()));
    assert_eq!((&ready[0]["queues"], &ready[0]["poll"]), (&3.into(), &"notify".into()));
    assert_eq!((&ready[1]["kind"], &ready[1]["socket"]), (&"virtio-rng".into(), &rng.as_str().into()));
    assert!(ready.iter().all(|ready| !ready["cpus"].as_array().unwrap().is_empty()));
    assert_eq!(service.event()["event"], "control");
    let sockets = [&disk, &rng].map(|socket| UnixStream::connect(socket).unwrap());

    let list = output(&["ctl", "--control", &control, "list", "--json"]);
    let list: Value = serde_json::from_slice(&list.stdout).unwrap();
    let names = list["devices"].as_array().unwrap().iter().map(|device| device["name"].as_str().unwrap());
    assert_eq!(names.collect::<Vec<_>>(), ["disk", "rng"]);

    drop(sockets);
    assert_eq!(service.end(Signal::TERM), Some(0));
    assert_eq!(service.event()["event"], "stopping");
    assert_eq!(service.event()["event"], "stopped");
    assert!(![disk, rng, control].iter().any(|socket| Path::new(socket).exists()));
}

#[test]
fn a_running_service_can_be_asked_and_told_things() {
    let scratch = Scratch::new();
    let (socket, control) = (scratch.path("disk.sock"), scratch.path("c.sock"));
    let service = Service::ready(&socket, &["--control", &control, "--name", "vm1"]);
    service.line("control: ");
    assert_eq!(fs::metadata(&control).unwrap().permissions().mode() & 0o777, 0o600);
    let ctl = |arguments: &[&str]| {
        let output = output(&[&["ctl", "--control", &control], arguments].concat());
        (output.status.code(), text(&output.stdout).to_owned() + text(&output.stderr))
    };
    let (code, list) = ctl(&["list"]);
    assert_eq!(code, Some(0));
    let words: Vec<_> = list.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(words, ["vm1", "blk", "1G", "1", "0", "hybrid", "-", &socket]);
    assert_eq!(
        ctl(&["resize", "--device", "vm1", "3G"]),
        (Some(0), "vm1: 3.0 GiB (3221225472 bytes)\n".to_owned())
    );
    assert_eq!(
        ctl(&["resize", "--device", "vm1", "--json"]),
        (Some(0), "{\"resized\":{\"device\":\"vm1\",\"bytes\":3221225472}}\n".to_owned())
    );
    assert_eq!(ctl(&["limit", "--device", "vm1", "--iops", "9"]).0, Some(0));
    assert!(ctl(&["stats"]).1.starts_with("DISK  READS  READ"));
    let (code, missing) = ctl(&["resize", "--device", "vm2", "1G"]);
    assert_eq!((code, missing.as_str()), (Some(1), "error: there is no device `vm2`; there are `vm1`\n"));
    let nobody = output(&["ctl", "--control", &scratch.path("none"), "list"]);
    assert_eq!(nobody.status.code(), Some(1));
}

#[test]
fn a_disk_that_is_larger_than_memory_is_warned_of() {
    for (size, warned) in [("1M", false), ("20T", true)] {
        let scratch = Scratch::new();
        let service = Service::start(&[
            "blk",
            "--socket",
            &scratch.path("a.sock"),
            "--backend",
            &format!("mem:{size}"),
        ]);
        let mut said = String::new();
        while !said.contains("ready: ") {
            said += &service.line("");
        }
        assert_eq!(said.contains("larger than this host's memory and swap"), warned, "{said}");
    }
}

#[test]
fn an_idle_service_stays_small() {
    const RESIDENT_KIB_MAX: u64 = 16 << 10;
    let scratch = Scratch::new();
    let service = Service::ready(&scratch.path("a.sock"), &["--control", &scratch.path("c.sock")]);
    service.line("control: ");
    let status = fs::read_to_string(format!("/proc/{}/status", service.child.id())).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let resident: u64 = resident.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(resident <= RESIDENT_KIB_MAX, "{resident} KiB");
}

#[test]
fn only_disks_can_be_resized() {
    let scratch = Scratch::new();
    let control = scratch.path("c.sock");
    let service = Service::start(&["rng", "--socket", &scratch.path("rng.sock"), "--control", &control]);
    service.line("control: ");
    let refused = output(&["ctl", "--control", &control, "resize", "--device", "rng", "1G"]);
    assert_eq!(
        text(&refused.stderr),
        "error: device `rng`: it is a rng device, and only disks can do that\n"
    );
}

#[test]
fn a_mistake_of_the_callers_has_an_exit_code_of_its_own() {
    let scratch = Scratch::new();
    let socket = scratch.path("a.sock");
    let config = scratch.path("vm.toml");
    fs::write(&config, "[[blk]]\nsocket = 'a'\nbackend = 'null:1G'\nqueus = 2\n").unwrap();
    let disk = ["blk", "--socket", &socket, "--backend"];
    let with = |more: &[&'static str]| [&disk[..], more].concat();
    for (arguments, says) in [
        (vec!["serve", "--config", &config], "vm.toml:4:1: unknown key `blk.queus`; did you mean `queues`?"),
        (vec!["serve", "--config", &socket], "cannot read the configuration file"),
        (with(&["tape:1G"]), "tape"),
        (with(&["null:much"]), "null:"),
        (with(&["file:"]), "expected a path after the colon"),
        (with(&["null:1G", "--queues", "1000"]), "1000 queues: a disk has 1 to 256"),
        (with(&["null:1G", "--serial", "a-serial-that-is-too-long"]), "up to 20 printable ASCII characters"),
        (with(&["null:1G", "--cpus", "1023"]), "this process may not run on CPU 1023"),
        (vec!["blk"], "--socket <PATH>"),
    ] {
        let result = output(&arguments);
        assert_eq!(result.status.code(), Some(2), "{arguments:?}: {}", text(&result.stderr));
        assert!(text(&result.stderr).contains(says), "{arguments:?}: {}", text(&result.stderr));
        assert!(!Path::new(&socket).exists());
    }
    for (socket, backend) in
        [(&*scratch.path("no/such/folder.sock"), "null:1G"), (&socket, "file:/no/such/file")]
    {
        let missing = output(&["blk", "--socket", socket, "--backend", backend]);
        assert_eq!(missing.status.code(), Some(1), "{socket} {backend}");
        assert!(text(&missing.stderr).contains("/no/such/"), "{}", text(&missing.stderr));
        assert_eq!(text(&missing.stderr).matches("No such file").count(), 1, "{}", text(&missing.stderr));
    }
}

#[test]
fn help_and_completions_go_to_stdout() {
    for arguments in [vec!["--help"], vec!["blk", "--help"], vec!["--version"], vec!["completions", "bash"]] {
        let result = output(&arguments);
        assert_eq!(result.status.code(), Some(0), "{arguments:?}");
        assert!(!result.stdout.is_empty() && result.stderr.is_empty(), "{arguments:?}");
    }
}

#[test]
fn a_terminal_that_goes_ends_a_service_unless_it_was_started_to_stay() {
    let scratch = Scratch::new();
    let socket = scratch.path("a.sock");
    let arguments = ["blk", "--socket", &socket, "--backend", "null:1G"];
    let mut stays = Service::start_after("trap '' HUP", &arguments);
    stays.line("ready: ");
    kill_process(stays.pid(), Signal::HUP).unwrap();
    assert_eq!(stays.end(Signal::TERM), Some(0));
    stays.line("stopping: SIGTERM");
    if is_ignored(Signal::HUP) {
        return needs::skip("SIGHUP is ignored here, and a shell cannot change that");
    }
    let mut goes = Service::start(&arguments);
    goes.line("ready: ");
    assert_eq!(goes.end(Signal::HUP), Some(0));
    goes.line("stopping: SIGHUP");
    goes.line("stopped: ");
}

/// Whether this process has a signal ignored, and so those that it starts.
fn is_ignored(signal: Signal) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
    u64::from_str_radix(mask.trim(), 16).unwrap() >> (signal.as_raw() - 1) & 1 == 1
}

#[test]
fn a_service_that_waits_for_its_image_ends_when_it_is_told_to() {
    let scratch = Scratch::new();
    let (first, socket, image) = (scratch.path("first.sock"), scratch.path("a.sock"), scratch.path("a.raw"));
    fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    // Held as a queue holds it that runs elsewhere.
    let late = FileOptions { lock: Lock::Late, ..FileOptions::default() };
    let user = File::open(Path::new(&image), late).unwrap();
    let _running = user.channel(&Arc::new(Memory::default()), 8).unwrap();
    let config = scratch.path("vm.toml");
    let file = format!(
        "[[blk]]\nsocket = '{first}'\nbackend = 'null:1G'\n[[blk]]\nsocket = '{socket}'\nbackend = 'file:{image}'\n"
    );
    fs::write(&config, file).unwrap();
    let mut service = Service::start(&["serve", "--config", &config]);
    service.lines_until_one(|line| line.contains("image locked: waiting"));
    assert_eq!(service.end(Signal::TERM), Some(0));
    service.line("stopping: SIGTERM");
    service.line("stopped: ");
    assert!(![first, socket].iter().any(|socket| Path::new(socket).exists()));
}

#[test]
fn a_limit_of_file_sizes_fails_a_resize_and_not_the_service() {
    let scratch = Scratch::new();
    let (socket, control, image) = (scratch.path("a.sock"), scratch.path("c.sock"), scratch.path("a.raw"));
    fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let (backend, limit) = (format!("file:{image}"), "ulimit -f 4096");
    let mut service = Service::start_after(
        limit,
        &["blk", "--socket", &socket, "--backend", &backend, "--control", &control],
    );
    service.line("control: ");
    let resize = |size| output(&["ctl", "--control", &control, "resize", "--device", "a", size]);
    let refused = resize("1G");
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("File too large"), "{}", text(&refused.stderr));
    assert!(resize("2M").status.success());
    assert_eq!(service.end(Signal::TERM), Some(0));
}

#[test]
fn too_few_descriptors_are_refused_before_a_guest_comes() {
    let scratch = Scratch::new();
    let (socket, image) = (scratch.path("a.sock"), scratch.path("a.raw"));
    fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    // For 100 queues too few in any case, and for a few enough.
    let start = |queues| {
        let backend = format!("file:{image},engine=uring");
        let arguments = ["blk", "--socket", &socket, "--backend", &backend, "--queues", queues];
        Service::start_after("ulimit -n 256", &arguments)
    };
    let mut refused = start("100");
    let error = refused.line("error: ");
    assert!(error.contains("100 queues need at least ") && error.contains("the limit is 256"), "{error}");
    assert_eq!(refused.code(), Some(1));
    start("16").line("ready: ");
}

#[test]
fn a_quota_is_mentioned_where_queues_are_polled() {
    let folder = format!("exitless-{}", std::process::id());
    let Some(group) = Quota::half_a_cpu(&folder) else { return };
    let scratch = Scratch::new();
    let socket = scratch.path("a.sock");
    for (mode, mentioned) in [("poll", true), ("hybrid", false), ("notify", false)] {
        let enter = format!("echo $$ > {}/cgroup.procs", group.0.display());
        let arguments = ["blk", "--socket", &socket, "--backend", "null:1G", "--poll", mode];
        let mut service = Service::start_after(&enter, &arguments);
        let lines = service.lines_until("ready: ");
        assert_eq!(lines.iter().any(|line| line.contains("CPU quota")), mentioned, "{mode}: {lines:#?}");
        assert_eq!(service.end(Signal::TERM), Some(0));
    }
}

/// A control group.
struct Quota(PathBuf);

impl Quota {
    /// None if none can be made here.
    fn half_a_cpu(name: &str) -> Option<Self> {
        let version =
            [("/sys/fs/cgroup/cpu", "cpu.cfs_quota_us", "50000"), ("/sys/fs/cgroup", "cpu.max", "50000")];
        for (root, file, value) in version {
            let path = Path::new(root).join(name);
            if fs::create_dir(&path).is_ok() {
                let group = Self(path);
                if group.0.join(file).exists() && fs::write(group.0.join(file), value).is_ok() {
                    return Some(group);
                }
            }
        }
        needs::skip("no control group with a CPU quota can be made");
        None
    }
}

impl Drop for Quota {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn an_image_is_kept_from_qemu_while_nobody_is_connected() {
    let scratch = Scratch::new();
    let (socket, image) = (scratch.path("a.sock"), scratch.path("a.raw"));
    fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let qemu_io = || Command::new("qemu-io").args(["-f", "raw", "-c", "write 0 512", &image]).output();
    if let Err(error) = qemu_io() {
        return needs::skip(format_args!("no qemu-io: {error}"));
    }
    let backend = format!("file:{image}");
    for signal in [Signal::TERM, Signal::KILL] {
        let mut service = Service::start(&["blk", "--socket", &socket, "--backend", &backend]);
        service.line("ready: ");
        assert!(!qemu_io().unwrap().status.success(), "it writes what a service has");
        service.end(signal);
        assert!(qemu_io().unwrap().status.success(), "it is kept from what nobody has");
    }
}

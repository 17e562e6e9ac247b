//! `--metrics`: what a scraper sees of a machine under the real KVM, and of a service.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

#[path = "../../vmm/tests/tiny/mod.rs"]
mod tiny;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tiny::Program;

const LONG: Duration = Duration::from_secs(180);

/// The program, running; ended when it is dropped.
struct Exitless {
    child: Child,
    stderr: BufReader<ChildStderr>,
}

impl Exitless {
    fn start(arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_exitless"));
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        Self { child, stderr }
    }

    /// What follows `beginning` in the first line on stderr that has it.
    fn said(&mut self, beginning: &str) -> String {
        let mut all = String::new();
        loop {
            let mut line = String::new();
            assert!(self.stderr.read_line(&mut line).unwrap() > 0, "no `{beginning}` in {all}");
            if let Some(rest) = line.trim_end().strip_prefix(beginning) {
                return rest.to_owned();
            }
            all += &line;
        }
    }

    /// Types on the guest's console.
    fn typed(&mut self, keys: &[u8]) {
        self.child.stdin.as_mut().unwrap().write_all(keys).unwrap();
    }

    fn stop(mut self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Exitless {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The page behind an answer.
fn scrape(mut stream: impl Read + Write) -> String {
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, page) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    page.to_owned()
}

fn value(page: &str, sample: &str) -> f64 {
    let found = page.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' ')?.parse().ok());
    found.unwrap_or_else(|| panic!("no `{sample}` in:\n{page}"))
}

#[test]
fn a_running_machine_shows_its_counters_and_no_client_keeps_it_from_ending() {
    if !needs::kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (kernel, socket) = (path("kernel"), path("metrics.sock"));
    std::fs::write(&kernel, Program::new().print(">").echo_until(b'q').exit(0).elf()).unwrap();
    // What a killed one leaves behind.
    drop(UnixListener::bind(&socket).unwrap());
    let metrics = format!("unix:{socket}");
    let arguments =
        ["run", "--kernel", &kernel, "--mem", "64M", "--disk", "null:1G,queues=2", "--metrics", &metrics];
    let mut machine = Exitless::start(&arguments);
    assert_eq!(machine.said("metrics: "), metrics);
    machine.child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();

    let connect = || {
        let stream = UnixStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream
    };
    let silent = connect();
    let exits = |page: &str| value(page, "exitless_vm_user_exits_total{vcpu=\"0\",reason=\"port_reads\"}");
    let first = scrape(connect());
    // The guest looks at its console all the time; the page is as old as 100 ms at most.
    let mut second = scrape(connect());
    while exits(&second) == exits(&first) {
        second = scrape(connect());
    }
    assert!(exits(&second) > exits(&first));
    assert!(value(&second, "exitless_vm_vcpu_exits_total{vcpu=\"0\"}") > 0.0);
    assert!(value(&second, "exitless_vm_inside_seconds_total{vcpu=\"0\"}") > 0.0);
    assert_eq!(second.matches("exitless_queue_requests_total{device=\"disk0\",queue=").count(), 2);

    machine.typed(b"q");
    assert!(machine.child.wait().unwrap().success());
    assert!(std::fs::symlink_metadata(&socket).is_err(), "the socket goes with the machine");
    drop(silent);
}

#[test]
fn an_address_that_cannot_be_had_is_refused_before_anything_runs() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    let file = format!("unix:{}", file.display());
    let mut cases = vec![(["--metrics", "localhost:9100"], 2, "unix:PATH or IP:PORT")];
    if needs::kvm() {
        cases.push((["--metrics", &taken], 1, "in use"));
        cases.push((["--metrics", &file], 1, "is not a socket"));
    }
    for (arguments, code, reason) in cases {
        let mut command = Command::new(env!("CARGO_BIN_EXE_exitless"));
        let output = command.arg("run").args(arguments).stdin(Stdio::null()).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
        assert!(stderr.contains(reason), "{arguments:?}: {stderr}");
        assert!(output.stdout.is_empty(), "{arguments:?}");
    }
}

#[test]
fn a_service_shows_its_devices() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("vm1.sock").to_str().unwrap().to_owned();
    let arguments = ["blk", "--socket", &socket, "--backend", "null:1G", "--metrics", "127.0.0.1:0"];
    let mut service = Exitless::start(&arguments);
    let address = service.said("metrics: http://");
    let page = scrape(TcpStream::connect(address.strip_suffix("/metrics").unwrap()).unwrap());
    assert_eq!(value(&page, "exitless_device_connected{device=\"vm1\",kind=\"blk\"}"), 0.0);
    assert_eq!(value(&page, "exitless_disk_requests_total{device=\"vm1\",type=\"read\"}"), 0.0);
    service.stop();
}

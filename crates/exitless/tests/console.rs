//! A kernel's console on a real terminal: whose the keys are, how one gets out, and what is left behind.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

#[path = "../../vmm/tests/tiny/mod.rs"]
mod tiny;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};
use tempfile::NamedTempFile;
use tiny::Program;

/// A terminal: the end at which somebody types, and the end that programs have.
struct Terminal {
    keys: File,
    end: OwnedFd,
}

impl Terminal {
    fn new() -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let keys = openpt(flags).unwrap();
        unlockpt(&keys).unwrap();
        let end = ioctl_tiocgptpeer(&keys, flags).unwrap();
        // Settings that are nobody's default.
        let mut settings = tcgetattr(&end).unwrap();
        settings.local_modes.toggle(LocalModes::ECHOK);
        tcsetattr(&end, OptionalActions::Now, &settings).unwrap();
        Self { keys: keys.into(), end }
    }

    fn settings(&self) -> String {
        format!("{:?}", tcgetattr(&self.end).unwrap())
    }

    fn edits_lines_or_makes_signals(&self) -> bool {
        tcgetattr(&self.end).unwrap().local_modes.intersects(LocalModes::ICANON | LocalModes::ISIG)
    }
}

/// A machine that runs a program, which begins by printing `>`.
struct Machine {
    child: Child,
    _kernel: NamedTempFile,
}

impl Machine {
    fn start(program: Program, stdin: impl Into<Stdio>, arguments: &[&str]) -> Self {
        let mut kernel = NamedTempFile::new().unwrap();
        kernel.write_all(program.elf()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_exitless"));
        command.arg("run").arg("--kernel").arg(kernel.path()).args(["--mem", "64M"]).args(arguments);
        command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut machine = Self { child: command.spawn().unwrap(), _kernel: kernel };
        assert_eq!(machine.printed(1), b">");
        machine
    }

    /// The next bytes of the guest's console.
    fn printed(&mut self, bytes: usize) -> Vec<u8> {
        let mut printed = vec![0; bytes];
        self.child.stdout.as_mut().unwrap().read_exact(&mut printed).unwrap();
        printed
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for the end; how it was, and what was said on stderr.
    fn end(mut self) -> (ExitStatus, String) {
        drop(self.child.stdin.take());
        let output = self.child.wait_with_output().unwrap();
        (output.status, String::from_utf8(output.stderr).unwrap())
    }
}

#[test]
fn keys_reach_the_guest_as_they_are_and_the_way_out_is_told() {
    if !needs::kvm() {
        return;
    }
    let mut terminal = Terminal::new();
    let before = terminal.settings();
    let program = Program::new().print(">").echo_until(b'q').exit(0);
    let mut machine = Machine::start(program, terminal.end.try_clone().unwrap(), &[]);
    assert!(!terminal.edits_lines_or_makes_signals());
    // Ctrl-C, Ctrl-Z, Ctrl-D, Tab, Return, Backspace, an arrow, and a Ctrl-A of the guest's own.
    terminal.keys.write_all(b"a\x03\x1a\x04\t\r\x7f\x1b[A\x01\x01q").unwrap();
    assert_eq!(machine.printed(12), b"a\x03\x1a\x04\t\r\x7f\x1b[A\x01q");
    let (status, stderr) = machine.end();
    assert!(status.success(), "{stderr}");
    assert_eq!(terminal.settings(), before);
    assert_eq!(stderr.matches("Ctrl-A x ends the machine").count(), 1, "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
}

#[test]
fn the_way_out_is_open_however_little_the_guest_reads() {
    if !needs::kvm() {
        return;
    }
    let mut terminal = Terminal::new();
    let before = terminal.settings();
    let machine =
        Machine::start(Program::new().print(">").halt(), terminal.end.try_clone().unwrap(), &["--quiet"]);
    terminal.keys.write_all(&[b'z'; 20_000]).unwrap();
    terminal.keys.write_all(b"\x01x").unwrap();
    let (status, stderr) = machine.end();
    assert!(status.success(), "{stderr}");
    assert_eq!(stderr, "");
    assert_eq!(terminal.settings(), before);
}

#[test]
fn signals_and_failures_give_the_terminal_back() {
    if !needs::kvm() {
        return;
    }
    let terminal = Terminal::new();
    let before = terminal.settings();
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let machine =
            Machine::start(Program::new().print(">").halt(), terminal.end.try_clone().unwrap(), &[]);
        assert_ne!(terminal.settings(), before);
        machine.signal(signal);
        let (status, stderr) = machine.end();
        assert!(status.success(), "{signal:?}: {stderr}");
        assert_eq!(terminal.settings(), before, "{signal:?}");
    }
    let machine = Machine::start(Program::new().print(">").exit(42), terminal.end.try_clone().unwrap(), &[]);
    let (status, stderr) = machine.end();
    assert_eq!(status.code(), Some(1));
    assert!(stderr.contains("the guest ended with status 42"), "{stderr}");
    assert_eq!(terminal.settings(), before);
}

#[test]
fn what_comes_from_a_pipe_knows_no_escapes_and_loses_nothing() {
    if !needs::kvm() {
        return;
    }
    let program = Program::new().print(">").echo_until(b'q').exit(0);
    let mut machine = Machine::start(program, Stdio::piped(), &[]);
    let typed: Vec<u8> = (0..600_u32).map(|at| b"\x01x\n"[at as usize % 3]).chain([b'q']).collect();
    machine.child.stdin.as_mut().unwrap().write_all(&typed).unwrap();
    assert_eq!(machine.printed(typed.len()), typed);
    let (status, stderr) = machine.end();
    assert!(status.success(), "{stderr}");
    assert_eq!(stderr, "");
}

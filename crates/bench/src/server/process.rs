//! A server as a process: started, waited for until its socket accepts, killed when dropped.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use super::spawn::spawn;

const LOOK_EVERY: Duration = Duration::from_millis(5);
/// How long a server may take to end after SIGTERM before it is killed.
const END_WITHIN: Duration = Duration::from_secs(2);
/// How much of what a server printed is shown when it fails.
const OUTPUT_LINES_SHOWN: usize = 12;

/// A running server. Dropping it ends the process.
pub(crate) struct Process {
    child: Child,
    /// Everything it prints.
    log: PathBuf,
}

impl Process {
    /// Starts `command` on `cpu`; its output goes to a file in `dir`.
    pub(crate) fn start(command: &[String], dir: &Path, cpu: Option<u32>) -> Result<Self> {
        let (program, arguments) = command.split_first().context("a peer without a command")?;
        let log = dir.join("output.txt");
        let output = File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
        let errors = output.try_clone().context("cannot duplicate a file")?;
        let mut command = Command::new(program);
        command.args(arguments).current_dir(dir).stdin(Stdio::null()).stdout(output).stderr(errors);
        let child = spawn(&mut command, cpu).with_context(|| format!("cannot start {program}"))?;
        Ok(Self { child, log })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until `socket` accepts a connection.
    pub(crate) fn wait_ready(&mut self, socket: &Path, within: Duration, stop: &AtomicBool) -> Result<()> {
        let deadline = Instant::now() + within;
        // A connection made only to look could be taken for the front end, so a listening socket is looked up instead.
        while !is_listening(socket) {
            if let Some(status) = self.child.try_wait().context("cannot wait for the server")? {
                bail!("the server ended with {status} before it listened");
            }
            ensure!(Instant::now() < deadline, "the server did not listen within {} s", within.as_secs());
            ensure!(!stop.load(Ordering::Relaxed), "interrupted");
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }

    /// Waits until the process ends by itself.
    pub(crate) fn wait(&mut self, within: Duration, stop: &AtomicBool) -> Result<ExitStatus> {
        let deadline = Instant::now() + within;
        loop {
            if let Some(status) = self.child.try_wait().context("cannot wait for a process")? {
                return Ok(status);
            }
            ensure!(Instant::now() < deadline, "it did not end within {} s", within.as_secs());
            ensure!(!stop.load(Ordering::Relaxed), "interrupted");
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Everything that was printed.
    pub(crate) fn output(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// The end of what the server printed, indented, for an error message.
    pub(crate) fn last_output(&self) -> String {
        let text = self.output();
        let lines: Vec<_> = text.lines().collect();
        let shown = &lines[lines.len().saturating_sub(OUTPUT_LINES_SHOWN)..];
        shown.iter().map(|line| format!("\n    | {line}")).collect()
    }

    /// Asks the server to end and waits for it; one that does not is killed by the drop.
    fn end(&mut self) {
        let pid = Pid::from_child(&self.child);
        let _ = kill_process(pid, Signal::TERM);
        let deadline = Instant::now() + END_WITHIN;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(LOOK_EVERY);
        }
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = kill_process_group(pid, Signal::KILL);
            let _ = self.child.wait();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

/// Whether some process listens at `socket`: the kernel lists it with the flag for accepting connections.
fn is_listening(socket: &Path) -> bool {
    /// `__SO_ACCEPTCON`, linux/net.h.
    const ACCEPTS: &str = "00010000";
    let Ok(table) = std::fs::read_to_string("/proc/net/unix") else {
        return UnixStream::connect(socket).is_ok();
    };
    let path = format!(" {}", socket.display());
    table.lines().any(|line| line.ends_with(&path) && line.split_ascii_whitespace().nth(3) == Some(ACCEPTS))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(words: &[&str], dir: &Path) -> Process {
        Process::start(&words.iter().map(ToString::to_string).collect::<Vec<_>>(), dir, None).unwrap()
    }

    #[test]
    fn a_dropped_server_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let process = start(&["sleep", "1000"], dir.path());
        let proc = PathBuf::from(format!("/proc/{}", process.pid()));
        assert!(proc.exists());
        drop(process);
        assert!(!proc.exists());
    }

    #[test]
    fn a_server_that_ends_early_is_reported_with_its_output() {
        let dir = tempfile::tempdir().unwrap();
        let mut process = start(&["sh", "-c", "echo no such disk >&2; exit 3"], dir.path());
        let stop = AtomicBool::new(false);
        let error = process.wait_ready(&dir.path().join("s"), Duration::from_secs(120), &stop).unwrap_err();
        assert!(error.to_string().contains("before it listened"), "{error}");
        assert_eq!(process.last_output(), "\n    | no such disk");
    }

    #[test]
    fn a_listening_socket_is_seen_without_connecting() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        assert!(!is_listening(&path));
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(is_listening(&path));
        listener.set_nonblocking(true).unwrap();
        assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    }
}

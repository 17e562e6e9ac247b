//! A child process whose output is kept line by line, and which does not outlive its test.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::needs;

/// A running program and everything it has printed so far on stdout and stderr.
pub(crate) struct Process {
    name: String,
    child: Child,
    output: Arc<Output>,
    readers: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Output {
    lines: Mutex<Vec<String>>,
    grown: Condvar,
}

/// A command for `program` that the kernel kills when the test itself is killed, where `setpriv` can say so.
pub(crate) fn command(program: &Path) -> Command {
    const MORTAL: [&str; 2] = ["--pdeathsig", "KILL"];
    static SETPRIV: LazyLock<Option<PathBuf>> = LazyLock::new(|| {
        let works = |setpriv: &PathBuf| Command::new(setpriv).args(MORTAL).arg("true").output();
        needs::program("setpriv").filter(|setpriv| works(setpriv).is_ok_and(|done| done.status.success()))
    });
    match &*SETPRIV {
        Some(setpriv) => {
            let mut command = Command::new(setpriv);
            command.args(MORTAL).arg(program);
            command
        }
        None => Command::new(program),
    }
}

impl Process {
    /// Starts `command` in a process group of its own, so that its children die with it.
    pub(crate) fn spawn(name: &str, command: &mut Command) -> Self {
        Self::try_spawn(name, command).unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"))
    }

    pub(crate) fn try_spawn(name: &str, command: &mut Command) -> io::Result<Self> {
        let mut child = command
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let output = Arc::new(Output::default());
        let readers = vec![
            output.follow(child.stdout.take().expect("stdout is piped")),
            output.follow(child.stderr.take().expect("stderr is piped")),
        ];
        Ok(Self { name: name.to_owned(), child, output, readers })
    }

    /// The write end of the process's stdin, once.
    pub(crate) fn take_stdin(&mut self) -> ChildStdin {
        self.child.stdin.take().expect("stdin is taken once")
    }

    pub(crate) fn lines(&self) -> Vec<String> {
        self.output.lock().clone()
    }

    /// Waits until `pick` finds something in the output, or panics with the output when the process ends or `limit`
    /// passes first.
    pub(crate) fn wait_for<T>(
        &mut self,
        what: &str,
        limit: Duration,
        pick: impl Fn(&[String]) -> Option<T>,
    ) -> T {
        let deadline = Instant::now() + limit;
        loop {
            let ended = self.child.try_wait().expect("wait for a child");
            let lines = self.output.lock();
            if let Some(found) = pick(&lines) {
                return found;
            }
            drop(lines);
            assert!(ended.is_none(), "{} ended before {what}:\n{self}", self.name);
            assert!(Instant::now() < deadline, "{}: no {what} within {limit:?}:\n{self}", self.name);
            let lines = self.output.lock();
            let _ = self.output.grown.wait_timeout(lines, Duration::from_millis(50));
        }
    }

    /// Waits until the process ends by itself, or panics with its output after `limit`.
    pub(crate) fn wait(&mut self, limit: Duration) -> ExitStatus {
        let ended = self.ends_within(limit);
        ended.unwrap_or_else(|| panic!("{} still runs after {limit:?}:\n{self}", self.name))
    }

    /// Waits until the process ends by itself, for no longer than `limit`.
    pub(crate) fn ends_within(&mut self, limit: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            let ended = self.child.try_wait().expect("wait for a child");
            if ended.is_some() || Instant::now() >= deadline {
                return ended;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until the process ends, as [`Process::wait`], and returns all that it printed.
    pub(crate) fn finish(mut self, limit: Duration) -> (ExitStatus, Vec<String>) {
        let status = self.wait(limit);
        self.readers.drain(..).for_each(|reader| reader.join().expect("read what a child prints"));
        (status, self.lines())
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("wait for a child").is_none()
    }

    /// Asks the process to end.
    pub(crate) fn terminate(&self) {
        kill_process(self.pid(), Signal::TERM).expect("send SIGTERM to a child");
    }

    /// Ends the process and its children at once.
    pub(crate) fn kill(&mut self) {
        if self.is_running() {
            let _ = kill_process_group(self.pid(), Signal::KILL);
        }
        self.child.wait().expect("wait for a killed child");
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if thread::panicking() {
            eprintln!("---- output of {}\n{self}", self.name);
        }
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines = self.output.lock();
        lines.iter().try_for_each(|line| writeln!(f, "{}| {line}", self.name))
    }
}

impl Output {
    fn lock(&self) -> MutexGuard<'_, Vec<String>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn follow(self: &Arc<Self>, stream: impl Read + Send + 'static) -> JoinHandle<()> {
        let output = Arc::clone(self);
        thread::spawn(move || {
            for line in BufReader::new(stream).split(b'\n') {
                let Ok(line) = line else { break };
                output.lock().push(String::from_utf8_lossy(&line).trim_end().to_owned());
                output.grown.notify_all();
            }
        })
    }
}

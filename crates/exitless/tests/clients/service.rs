//! The vhost-user-blk service under test, as a process with a socket.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::process::Process;
use crate::{needs, process};

/// The limit for a service to get ready, or to drain and end.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);
const PROGRAM: &str = env!("CARGO_BIN_EXE_exitless");
const SERIAL: &str = "clients-0123456789ab";

/// What a service serves.
#[derive(Clone)]
pub(crate) enum Disk {
    /// A raw image.
    Raw(PathBuf),
    /// A raw image that another service uses, until the guest comes.
    LateRaw(PathBuf),
    /// A raw image that the guest must not write to.
    ReadOnly(PathBuf),
    Qcow2(PathBuf),
    /// Memory of the service, in mebibytes.
    Memory(u64),
}

/// A service that can be ended and started again on the same disk and socket.
pub(crate) struct Service {
    kind: Kind,
    name: String,
    disk: Disk,
    socket: PathBuf,
    options: Vec<String>,
    process: Process,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Exitless,
    /// qemu-storage-daemon, the peer that proves the tests themselves.
    Peer,
}

fn kind() -> Kind {
    match std::env::var("EXITLESS_TEST_SERVER").as_deref() {
        Ok("qsd") => Kind::Peer,
        Ok(other) => panic!("EXITLESS_TEST_SERVER is `{other}`; allowed is `qsd`"),
        Err(_) => Kind::Exitless,
    }
}

/// Whether services can be started here, or the reason why not.
pub(crate) fn works() -> Result<(), String> {
    if kind() == Kind::Peer { needs::works("qemu-storage-daemon") } else { Ok(()) }
}

/// Our program.
pub(crate) fn program() -> &'static Path {
    Path::new(PROGRAM)
}

/// Whether it is our program that is tested, which can do more than the peer.
pub(crate) fn is_ours() -> bool {
    kind() == Kind::Exitless
}

/// What the guest must see as the disk's serial number.
pub(crate) fn serial() -> &'static str {
    match kind() {
        Kind::Exitless => SERIAL,
        Kind::Peer => "vhost_user_blk",
    }
}

impl Service {
    /// Serves `disk` at `socket` with two queues; `options` are for our own program only.
    pub(crate) fn start(name: &str, disk: Disk, socket: &Path, options: &[&str]) -> Self {
        let options = options.iter().map(ToString::to_string).collect::<Vec<_>>();
        let mut command = command(kind(), &disk, socket, &options);
        let process = Process::spawn(name, &mut command);
        let (name, socket) = (name.to_owned(), socket.to_owned());
        let mut service = Self { kind: kind(), name, disk, socket, options, process };
        service.wait_ready();
        service
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.socket.clone()
    }

    /// Takes the service away at once, as a crash would, and brings up another one.
    pub(crate) fn kill_and_restart(&mut self) {
        self.assert_running();
        self.process.kill();
        self.restart();
    }

    /// Ends the service as an administrator would, and brings up another one.
    pub(crate) fn terminate_and_restart(&mut self) {
        self.terminate();
        self.restart();
    }

    /// Asks the service to end, which it must do cleanly.
    pub(crate) fn terminate(&mut self) {
        self.assert_running();
        self.process.terminate();
        let status = self.process.wait(LIMIT);
        assert!(status.success(), "the service ended with {status}:\n{}", self.process);
    }

    /// Panics when the service has died, or has reported a panic of one of its threads.
    pub(crate) fn assert_running(&mut self) {
        assert!(self.process.is_running(), "the service died:\n{}", self.process);
        let panicked = self.process.lines().iter().any(|line| line.contains("panicked at"));
        assert!(!panicked, "the service panicked:\n{}", self.process);
    }

    fn restart(&mut self) {
        let mut command = command(self.kind, &self.disk, &self.socket, &self.options);
        self.process = Process::spawn(&self.name, &mut command);
        self.wait_ready();
    }

    fn wait_ready(&mut self) {
        let (kind, mark) = (self.kind, ready_mark(&self.socket));
        self.process.wait_for("readiness", LIMIT, |lines| match kind {
            Kind::Exitless => lines.iter().any(|line| line.starts_with("ready: socket")).then_some(()),
            Kind::Peer => mark.exists().then_some(()),
        });
    }
}

fn command(kind: Kind, disk: &Disk, socket: &Path, options: &[String]) -> Command {
    match kind {
        Kind::Exitless => {
            let mut command = process::command(Path::new(PROGRAM));
            command.args(["blk", "--queues", "2", "--serial", SERIAL]).arg("--socket").arg(socket);
            command.arg("--backend").arg(match disk {
                Disk::Raw(image) | Disk::ReadOnly(image) => format!("file:{}", image.display()),
                Disk::LateRaw(image) => format!("file:{},lock=late", image.display()),
                Disk::Qcow2(image) => format!("qcow2:{}", image.display()),
                Disk::Memory(mib) => format!("mem:{mib}M"),
            });
            if matches!(disk, Disk::ReadOnly(_)) {
                command.arg("--read-only");
            }
            command.args(options);
            command
        }
        Kind::Peer => peer(disk, socket),
    }
}

fn peer(disk: &Disk, socket: &Path) -> Command {
    let (driver, image, writable) = match disk {
        Disk::Raw(image) | Disk::LateRaw(image) => ("raw", image, "on"),
        Disk::ReadOnly(image) => ("raw", image, "off"),
        Disk::Qcow2(image) => ("qcow2", image, "on"),
        Disk::Memory(_) => panic!("the peer has no disk in memory"),
    };
    let (image, path, mark) = (image.display(), socket.display(), ready_mark(socket));
    let _ = std::fs::remove_file(&mark);
    let program = needs::program("qemu-storage-daemon").expect("checked as a need");
    let mut command = process::command(&program);
    command
        .arg("--blockdev")
        .arg(format!("driver=file,node-name=file,filename={image},discard=unmap,locking=off"))
        .arg("--blockdev")
        .arg(format!("driver={driver},node-name=disk,file=file,discard=unmap"))
        .arg("--export")
        .arg(format!(
            "vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={path},writable={writable},num-queues=2"
        ))
        .arg("--pidfile")
        .arg(mark);
    command
}

/// A file the peer writes once it listens.
fn ready_mark(socket: &Path) -> PathBuf {
    socket.with_extension("pid")
}

//! A file system that this process serves, with one file, and that leaves some requests unanswered.
//!
//! Just enough of the protocol of `/dev/fuse` (linux/fuse.h) to open, map and watch the file.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const POLL: u32 = 40;
const BATCH_FORGET: u32 = 42;

const ROOT: u64 = 1;
const FILE: u64 = 2;
/// Of the file, in bytes.
pub(crate) const FILE_BYTES: u64 = 1 << 20;

/// Requests that were left unanswered.
#[derive(Default)]
pub(crate) struct Unanswered {
    pub(crate) reads: AtomicUsize,
    pub(crate) flushes: AtomicUsize,
    pub(crate) polls: AtomicUsize,
    /// Answered with "readable": the first, which is that of the test itself.
    answered_polls: AtomicUsize,
}

/// A mounted file system. Gone, and all who wait for it with an error, when dropped.
pub(crate) struct Fuse {
    place: PathBuf,
    pub(crate) unanswered: Arc<Unanswered>,
    server: Option<JoinHandle<()>>,
}

impl Fuse {
    /// None, and the test is recorded as skipped, where such file systems cannot be had.
    pub(crate) fn new() -> Option<Self> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let device = match rustix::fs::open("/dev/fuse", flags, Mode::empty()) {
            Ok(device) => device,
            Err(error) => return skipped("cannot open /dev/fuse", error),
        };
        let place = crate::host::new_path().with_extension("fuse");
        std::fs::create_dir(&place).unwrap();
        let user = rustix::process::getuid().as_raw();
        let options = format!("fd={},rootmode=40000,user_id={user},group_id=0\0", device.as_raw_fd());
        let options = std::ffi::CStr::from_bytes_with_nul(options.as_bytes()).unwrap();
        if let Err(error) = mount("exitless-test", &place, "fuse", MountFlags::NODEV, options) {
            std::fs::remove_dir(&place).unwrap();
            return skipped("cannot mount a FUSE file system", error);
        }
        let unanswered = Arc::new(Unanswered::default());
        let counts = unanswered.clone();
        let server = std::thread::spawn(move || serve(&device, &counts));
        Some(Self { place, unanswered, server: Some(server) })
    }

    pub(crate) fn open(&self) -> OwnedFd {
        File::options().read(true).write(true).open(self.place.join("file")).unwrap().into()
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        unmount(&self.place, UnmountFlags::FORCE | UnmountFlags::DETACH).unwrap();
        self.server.take().unwrap().join().unwrap();
        std::fs::remove_dir(&self.place).unwrap();
    }
}

fn skipped(what: &str, error: Errno) -> Option<Fuse> {
    needs::skip(format_args!("{what}: {error}"));
    None
}

/// Answers until the file system is unmounted.
fn serve(device: &OwnedFd, unanswered: &Unanswered) {
    let mut buffer = vec![0; 1 << 17];
    loop {
        let bytes = match rustix::io::read(device, &mut buffer) {
            Ok(bytes) => bytes,
            Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => continue,
            Err(_) => return,
        };
        let request = &buffer[..bytes];
        let (code, unique) = (word(request, 4), long(request, 8));
        let count = |of: &AtomicUsize| of.fetch_add(1, Ordering::SeqCst);
        let answer = match code {
            INIT => Ok(init()),
            LOOKUP => Ok([longs(&[FILE, 0, 60, 60, 0]), attributes(FILE)].concat()),
            GETATTR => Ok([longs(&[60, 0]), attributes(long(request, 16))].concat()),
            OPEN => Ok(longs(&[0, 0])),
            POLL if count(&unanswered.answered_polls) == 0 => Ok(longs(&[1])),
            POLL => {
                count(&unanswered.polls);
                continue;
            }
            READ => {
                count(&unanswered.reads);
                continue;
            }
            FLUSH => {
                count(&unanswered.flushes);
                continue;
            }
            FORGET | BATCH_FORGET => continue,
            RELEASE => Ok(Vec::new()),
            _ => Err(Errno::NOSYS),
        };
        let (error, body) = match answer {
            Ok(body) => (0, body),
            Err(errno) => (-errno.raw_os_error(), Vec::new()),
        };
        let len = 16 + body.len() as u32;
        let header = [&len.to_ne_bytes()[..], &error.to_ne_bytes(), &unique.to_ne_bytes()].concat();
        // Nobody waits for it any more, or it is there.
        let _ = rustix::io::write(device.as_fd(), &[header, body].concat());
    }
}

/// `struct fuse_init_out` of version 7.31.
fn init() -> Vec<u8> {
    let mut body = vec![0; 64];
    for (at, value) in [(0, 7u32), (4, 31), (16, 12 << 16 | 16), (20, 1 << 16), (24, 1)] {
        body[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    }
    body
}

/// `struct fuse_attr`.
fn attributes(node: u64) -> Vec<u8> {
    let (mode, bytes) = if node == ROOT { (0o040_755u32, 0) } else { (0o100_666, FILE_BYTES) };
    let mut body = longs(&[node, bytes, bytes / 512, 0, 0, 0]);
    body.extend([0, 0, 0, mode, 1, 0, 0, 0, 4096, 0].iter().flat_map(|word: &u32| word.to_ne_bytes()));
    body
}

fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_ne_bytes()).collect()
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
}

//! A file system of one file whose storage fails on demand, served over `/dev/fuse` (linux/fuse.h).
//!
//! The system keeps what is written in its page cache until it is asked to make it durable, as for a disk. The file
//! system is mounted nowhere: it is reached through a descriptor, and is gone with the process whatever becomes of it.
#![allow(clippy::unwrap_used, reason = "a test that cannot set up is over")]
#![allow(dead_code, unreachable_pub, reason = "each test uses a part of it")]
#![allow(unsafe_code, reason = "no library has these calls")]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

const ROOT: u64 = 1;
const DISK: u64 = 2;
/// The most bytes of one write.
const WRITE_BYTES_MAX: u32 = 128 << 10;
const IN_HEADER_BYTES: usize = 40;
/// How long the system may believe what it is told of files, in seconds.
const VALID_S: u64 = 1 << 20;
/// `FUSE_ASYNC_READ`, `FUSE_BIG_WRITES`, `FUSE_ASYNC_DIO`, `FUSE_WRITEBACK_CACHE`, `FUSE_MAX_PAGES`.
const INIT_FLAGS: u32 = 1 | 1 << 5 | 1 << 15 | 1 << 16 | 1 << 22;
/// `FATTR_SIZE`.
const SIZE_IS_SET: u32 = 1 << 3;

/// Requests, by their numbers.
mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const INTERRUPT: u32 = 36;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
}

/// The storage under the file, and what is wrong with it.
#[derive(Debug)]
struct Store {
    bytes: Mutex<Vec<u8>>,
    bad: Mutex<Range<u64>>,
    fsync_fails: AtomicBool,
    allocates: AtomicBool,
    fsyncs: AtomicU64,
    held: Mutex<Held>,
}

/// Requests that wait.
#[derive(Debug, Default)]
struct Held {
    /// Which are to wait, and how many more of them.
    opcode: u32,
    left: usize,
    requests: Vec<Vec<u8>>,
}

/// The file system.
#[derive(Debug)]
pub struct Failing {
    store: Arc<Store>,
    device: Arc<File>,
    mount: OwnedFd,
}

impl Failing {
    /// One whose file has `bytes` bytes of zeros. A machine without is a reason to skip the test.
    pub fn new(bytes: usize) -> Option<Self> {
        let store = Arc::new(Store {
            bytes: Mutex::new(vec![0; bytes]),
            bad: Mutex::new(0..0),
            fsync_fails: AtomicBool::new(false),
            allocates: AtomicBool::new(true),
            fsyncs: AtomicU64::new(0),
            held: Mutex::default(),
        });
        match mount(&store) {
            Ok((device, mount)) => Some(Self { store, device, mount }),
            Err(error) => {
                needs::skip(format_args!("no FUSE file system: {error}"));
                None
            }
        }
    }

    /// Where its file is, for this process.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/disk", self.mount.as_raw_fd()))
    }

    /// Where its file is, for other processes.
    pub fn path_for_others(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}/disk", std::process::id(), self.mount.as_raw_fd()))
    }

    /// Does no write until [`Failing::release`]. What reads find is what was there before.
    pub fn hold_writes(&self) {
        self.hold(opcode::WRITE, usize::MAX);
    }

    /// Lets the next process that closes the file wait until [`Failing::release`].
    pub fn hold_one_close(&self) {
        self.hold(opcode::FLUSH, 1);
    }

    fn hold(&self, opcode: u32, left: usize) {
        *self.store.held.lock().unwrap() = Held { opcode, left, requests: Vec::new() };
    }

    /// How many requests wait.
    pub fn held(&self) -> usize {
        self.store.held.lock().unwrap().requests.len()
    }

    /// Does what waited.
    pub fn release(&self) {
        let held = std::mem::take(&mut *self.store.held.lock().unwrap());
        for request in held.requests {
            // Whoever asked may have been interrupted.
            let _ = rustix::io::write(&self.device, &answer(&request, &self.store).unwrap());
        }
    }

    /// Makes all writes to a range of bytes fail.
    pub fn fail_writes(&self, bad: Range<u64>) {
        *self.store.bad.lock().unwrap() = bad;
    }

    /// Makes fsync fail, or succeed.
    pub fn fail_fsync(&self, fails: bool) {
        self.store.fsync_fails.store(fails, Ordering::SeqCst);
    }

    /// Makes `fallocate(2)` unknown from now on.
    pub fn refuse_fallocate(&self) {
        self.store.allocates.store(false, Ordering::SeqCst);
    }

    /// How often durability was asked for.
    pub fn fsyncs(&self) -> u64 {
        self.store.fsyncs.load(Ordering::SeqCst)
    }

    /// Whether the storage, which knows nothing of the page cache, has `data` at `offset`.
    pub fn has(&self, offset: usize, data: &[u8]) -> bool {
        self.store.bytes.lock().unwrap().get(offset..offset + data.len()) == Some(data)
    }
}

impl Held {
    /// Whether a request waits, which it begins to do then.
    fn takes(&mut self, request: &[u8]) -> bool {
        let waits = self.left > 0 && u32_at(request, 4) == self.opcode;
        if waits {
            self.left -= 1;
            self.requests.push(request.to_vec());
        }
        waits
    }
}

impl Drop for Failing {
    fn drop(&mut self) {
        self.release();
    }
}

/// Makes the file system and serves it on a thread, until nobody has it open any more.
fn mount(store: &Arc<Store>) -> io::Result<(Arc<File>, OwnedFd)> {
    const FSCONFIG_SET_STRING: libc::c_uint = 1;
    const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
    let device = Arc::new(File::options().read(true).write(true).open("/dev/fuse")?);
    // SAFETY: the name is a string that ends with a 0.
    let context = made(unsafe { libc::syscall(libc::SYS_fsopen, c"fuse".as_ptr(), 1) })?;
    let configure = |command: libc::c_uint, key: Option<&CStr>, value: Option<&CStr>| {
        let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
        // SAFETY: both pointers are null or of strings that end with a 0.
        let result = unsafe {
            libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, pointer(key), pointer(value), 0)
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    let fd = std::ffi::CString::new(device.as_raw_fd().to_string()).unwrap();
    for (key, value) in
        [(c"fd", fd.as_c_str()), (c"rootmode", c"40000"), (c"user_id", c"0"), (c"group_id", c"0")]
    {
        configure(FSCONFIG_SET_STRING, Some(key), Some(value))?;
    }
    configure(FSCONFIG_CMD_CREATE, None, None)?;
    // SAFETY: passes three numbers.
    let mount = made(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), 1, 0) })?;
    let (store, served) = (store.clone(), device.clone());
    std::thread::Builder::new().name("fuse".into()).spawn(move || serve(&served, &store))?;
    Ok((device, mount))
}

/// The descriptor that a system call has made.
fn made(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(result).ok().filter(|&fd| fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: it is new, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn serve(device: &File, store: &Store) {
    let mut request = vec![0; WRITE_BYTES_MAX as usize + 4096];
    loop {
        match rustix::io::read(device, &mut request) {
            Ok(len) => {
                if store.held.lock().unwrap().takes(&request[..len]) {
                    continue;
                }
                if let Some(reply) = answer(&request[..len], store) {
                    // Whoever asked may have been interrupted.
                    let _ = rustix::io::write(device, &reply);
                }
            }
            Err(rustix::io::Errno::INTR | rustix::io::Errno::NOENT | rustix::io::Errno::AGAIN) => {}
            Err(_) => return,
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// What goes back for a request, if anything does: `struct fuse_out_header` and what belongs to it.
fn answer(request: &[u8], store: &Store) -> Option<Vec<u8>> {
    let (opcode, node) = (u32_at(request, 4), u64_at(request, 16));
    if matches!(opcode, opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT) {
        return None;
    }
    let (error, body) = match perform(opcode, node, &request[IN_HEADER_BYTES..], store) {
        Ok(body) => (0, body),
        Err(errno) => (-errno, Vec::new()),
    };
    let mut reply = Vec::with_capacity(16 + body.len());
    reply.extend((16 + body.len() as u32).to_le_bytes());
    reply.extend(error.to_le_bytes());
    reply.extend(&request[8..16]);
    reply.extend(body);
    Some(reply)
}

fn perform(opcode: u32, node: u64, body: &[u8], store: &Store) -> Result<Vec<u8>, i32> {
    match opcode {
        opcode::INIT => Ok(init()),
        opcode::LOOKUP if body == b"disk\0" => {
            let mut entry: Vec<u8> =
                [DISK, 0, VALID_S, VALID_S, 0].into_iter().flat_map(u64::to_le_bytes).collect();
            entry.extend(attributes(DISK, store));
            Ok(entry)
        }
        opcode::LOOKUP => Err(libc::ENOENT),
        opcode::SETATTR if u32_at(body, 0) & SIZE_IS_SET != 0 => {
            store.bytes.lock().unwrap().resize(u64_at(body, 16) as usize, 0);
            Ok(attr_out(node, store))
        }
        opcode::GETATTR | opcode::SETATTR => Ok(attr_out(node, store)),
        // File handle and flags.
        opcode::OPEN => Ok(vec![0; 16]),
        opcode::READ => Ok(read(u64_at(body, 8), u32_at(body, 16), store)),
        opcode::WRITE => write(u64_at(body, 8), &body[40..][..u32_at(body, 16) as usize], store),
        opcode::FSYNC => {
            store.fsyncs.fetch_add(1, Ordering::SeqCst);
            if store.fsync_fails.load(Ordering::SeqCst) { Err(libc::EIO) } else { Ok(Vec::new()) }
        }
        opcode::FALLOCATE if !store.allocates.load(Ordering::SeqCst) => Err(libc::EOPNOTSUPP),
        opcode::FALLOCATE => {
            let mut bytes = store.bytes.lock().unwrap();
            let from = (u64_at(body, 8) as usize).min(bytes.len());
            let to = from.saturating_add(u64_at(body, 16) as usize).min(bytes.len());
            bytes[from..to].fill(0);
            Ok(Vec::new())
        }
        // `struct fuse_kstatfs`: blocks of 4096 bytes, names of 255.
        opcode::STATFS => {
            let mut statfs = vec![0; 80];
            statfs[40..44].copy_from_slice(&4096u32.to_le_bytes());
            statfs[44..48].copy_from_slice(&255u32.to_le_bytes());
            Ok(statfs)
        }
        opcode::FLUSH | opcode::RELEASE => Ok(Vec::new()),
        _ => Err(libc::ENOSYS),
    }
}

/// `struct fuse_init_out`.
fn init() -> Vec<u8> {
    let mut out: Vec<u8> = [7, 31, WRITE_BYTES_MAX, INIT_FLAGS, 0, WRITE_BYTES_MAX, 1]
        .into_iter()
        .flat_map(u32::to_le_bytes)
        .collect();
    out.extend((WRITE_BYTES_MAX as u16 / 4096).to_le_bytes());
    out.resize(64, 0);
    out
}

/// `struct fuse_attr_out`.
fn attr_out(node: u64, store: &Store) -> Vec<u8> {
    let mut out: Vec<u8> = [VALID_S, 0].into_iter().flat_map(u64::to_le_bytes).collect();
    out.extend(attributes(node, store));
    out
}

/// `struct fuse_attr`.
fn attributes(node: u64, store: &Store) -> Vec<u8> {
    let bytes = store.bytes.lock().unwrap().len() as u64;
    let (mode, bytes) =
        if node == ROOT { (libc::S_IFDIR | 0o700, 0) } else { (libc::S_IFREG | 0o600, bytes) };
    let mut out: Vec<u8> =
        [node, bytes, bytes / 512, 0, 0, 0].into_iter().flat_map(u64::to_le_bytes).collect();
    // Parts of seconds, mode, links, owner, group, device, block size, flags.
    out.extend([0, 0, 0, mode, 1, 0, 0, 0, 4096, 0].into_iter().flat_map(u32::to_le_bytes));
    out
}

fn read(offset: u64, len: u32, store: &Store) -> Vec<u8> {
    let bytes = store.bytes.lock().unwrap();
    let from = (offset as usize).min(bytes.len());
    bytes[from..(from + len as usize).min(bytes.len())].to_vec()
}

fn write(offset: u64, data: &[u8], store: &Store) -> Result<Vec<u8>, i32> {
    let bad = store.bad.lock().unwrap().clone();
    let end = offset + data.len() as u64;
    if offset < bad.end && bad.start < end {
        return Err(libc::EIO);
    }
    let mut bytes = store.bytes.lock().unwrap();
    if bytes.len() < end as usize {
        bytes.resize(end as usize, 0);
    }
    bytes[offset as usize..end as usize].copy_from_slice(data);
    Ok((data.len() as u64).to_le_bytes().to_vec())
}

//! A service is killed while the kernel works for it: whoever has one of its locks finds that work over.
//!
//! The test runs itself once more as the victim, which has the kernel read into guest memory and is killed before that is
//! done. The guest's memory is watched from outside: once a lock of the victim's can be had, nothing may arrive there any
//! more. (On storage that takes no time there is nothing to be seen.)
#![allow(clippy::unwrap_used, reason = "tests")]

mod fake;

use std::fs::File as StdFile;
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use blk::backends::file::{File, FileOptions, Lock};
use blk::{Backend, Blk, Options};
use fake::{IN, MEMORY_BYTES, Rig, Ring, header};
use rustix::fs::{FlockOperation, flock};
use virtio::fake::{FakeDriver, MEMORY_START};
use virtio::memory::{Area, GuestAddr, Lease, Mapping, Memory, Region};

const ROUNDS: usize = 8;
const READ_BYTES: usize = 1 << 20;
const READS: usize = 60;
/// What is in the image, and in no guest's memory before it was read.
const CONTENT: u8 = 0xA5;
/// For how long nothing may arrive.
const WATCH: Duration = Duration::from_millis(200);
/// Tell the victim where its image and its memory are, and whether it may write.
const IMAGE: &str = "EXITLESS_VICTIM_IMAGE";
const MEMORY: &str = "EXITLESS_VICTIM_MEMORY";
const READ_ONLY: &str = "EXITLESS_VICTIM_READ_ONLY";

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let name = format!("exitless-blk-{}-{name}", std::process::id());
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::write(&path, vec![CONTENT; READS * READ_BYTES]).unwrap();
        StdFile::open(&path).unwrap().sync_all().unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn memory(file: &StdFile) -> Memory {
    let mapping = Mapping::new(file, 0, MEMORY_BYTES).unwrap();
    Memory::new(vec![Region::new(GuestAddr(MEMORY_START), Arc::new(mapping)).unwrap()]).unwrap()
}

/// If this process is the victim: has the kernel read until it is killed.
fn be_the_victim_if_asked() {
    let (Some(image), Some(at)) = (std::env::var_os(IMAGE), std::env::var_os(MEMORY)) else { return };
    let shared = StdFile::options().read(true).write(true).open(&at).unwrap();
    // An open file of its own. The memory itself stands for the record of requests in flight.
    let lease = StdFile::open(&at).unwrap();
    flock(&lease, FlockOperation::LockExclusive).unwrap();
    let memory = memory(&shared).leased(Lease::new(lease));
    let read_only = std::env::var_os(READ_ONLY).is_some();
    let disk = File::open(Path::new(&image), FileOptions { read_only, ..FileOptions::default() }).unwrap();
    let disk = Arc::new(Blk::new(Arc::new(disk), Options::default()).unwrap());
    let mut rig =
        Rig::in_guest(disk, Ring::SPLIT, u64::MAX, 0, |options| FakeDriver::in_memory(options, memory));
    for i in 0..READS {
        rig.send(&[&header(IN, (i * READ_BYTES / 512) as u64)], &[READ_BYTES, 1]);
    }
    // Enough turns to take all of them.
    for _ in 0..READS {
        rig.turn();
    }
    println!("under way");
    loop {
        std::thread::park();
    }
}

/// A victim's memory after it was killed in the middle of its reads.
struct Remains {
    victim: Child,
    file: StdFile,
    area: Area,
}

impl Remains {
    fn of(test: &str, image: &Path, read_only: bool) -> Self {
        let (_, file) = Mapping::anonymous("victim", MEMORY_BYTES).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", test, "--nocapture"]).env(IMAGE, image).stdout(Stdio::piped());
        command.env(MEMORY, format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()));
        if read_only {
            command.env(READ_ONLY, "1");
        }
        let mut victim = command.spawn().unwrap();
        let mut lines = BufReader::new(victim.stdout.take().unwrap()).lines();
        let begun = lines.any(|line| line.unwrap().contains("under way"));
        // Not waited for: the lock may be had as soon as its files are closed.
        victim.kill().unwrap();
        assert!(begun, "the victim failed");
        let area = memory(&file).area(GuestAddr(MEMORY_START), MEMORY_BYTES as usize, 8).unwrap();
        Self { victim, file, area }
    }

    /// Pages that have arrived.
    fn pages(&self) -> usize {
        let bytes = (0..MEMORY_BYTES as usize).step_by(4096);
        bytes.filter(|&at| self.area.u8(at).load(Ordering::Relaxed) == CONTENT).count()
    }

    /// Takes a lock, and watches that nothing arrives afterwards.
    fn watch<T>(&self, take: impl FnOnce() -> T) {
        let (begin, before) = (Instant::now(), self.pages());
        let _taken = take();
        let (waited, pages) = (begin.elapsed(), self.pages());
        println!("waited for {waited:?}, in which {} pages arrived", pages - before);
        let end = Instant::now() + WATCH;
        while Instant::now() < end {
            assert_eq!(self.pages(), pages, "the kernel works on memory that the victim's successor has");
        }
    }
}

impl Drop for Remains {
    fn drop(&mut self) {
        let _ = self.victim.wait();
    }
}

#[test]
fn an_image_is_locked_until_the_kernel_is_done_with_it() {
    be_the_victim_if_asked();
    let image = Scratch::new("image");
    let start = |disk: &File| disk.channel(&Arc::new(Memory::default()), 8).unwrap();
    for _ in 0..ROUNDS {
        // Opened before, so that only the lock is waited for.
        let options = FileOptions { lock: Lock::Late, ..FileOptions::default() };
        let disk = File::open(&image.0, options).unwrap();
        let remains = Remains::of("an_image_is_locked_until_the_kernel_is_done_with_it", &image.0, false);
        remains.watch(|| start(&disk));
    }
    // And as a service is started again: it is not refused.
    let remains = Remains::of("an_image_is_locked_until_the_kernel_is_done_with_it", &image.0, false);
    remains.watch(|| start(&File::open(&image.0, FileOptions::default()).unwrap()));
}

/// QEMU looks at bytes of its own.
#[test]
fn qemu_is_kept_out_until_the_kernel_is_done_with_an_image() {
    be_the_victim_if_asked();
    let qemu_io =
        |image: &Path| Command::new("qemu-io").args(["-f", "raw", "-c", "write 512 512"]).arg(image).output();
    if qemu_io(Path::new("/dev/null")).is_err() {
        return needs::skip("no qemu-io");
    }
    let image = Scratch::new("qemu");
    let test = "qemu_is_kept_out_until_the_kernel_is_done_with_an_image";
    for _ in 0..ROUNDS {
        let remains = Remains::of(test, &image.0, false);
        let deadline = Instant::now() + Duration::from_secs(180);
        remains.watch(|| {
            while !qemu_io(&image.0).unwrap().status.success() {
                assert!(Instant::now() < deadline, "nobody uses it any more");
            }
        });
    }
}

/// Of an image that nobody writes, the lock keeps nobody away.
#[test]
fn guest_memory_is_leased_until_the_kernel_is_done_with_it() {
    be_the_victim_if_asked();
    let image = Scratch::new("memory");
    for _ in 0..ROUNDS {
        let remains = Remains::of("guest_memory_is_leased_until_the_kernel_is_done_with_it", &image.0, true);
        remains.watch(|| {
            let own = StdFile::open(format!("/proc/self/fd/{}", remains.file.as_raw_fd())).unwrap();
            flock(&own, FlockOperation::LockExclusive).unwrap();
            own
        });
    }
}

//! Who may use an image, and when.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blk::backends::file::{Engine, File, FileOptions, Lock};
use blk::{Backend, BackendError, Channel};
use virtio::Memory;

const BYTES: u64 = 1 << 20;

struct Image(PathBuf);

impl Image {
    fn new(name: &str) -> Self {
        let name = format!("exitless-blk-{}-{name}", std::process::id());
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::File::create(&path).unwrap().set_len(BYTES).unwrap();
        Self(path)
    }

    fn open(&self, options: FileOptions) -> Result<File, BackendError> {
        File::open(&self.0, options)
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn locked(lock: Lock) -> FileOptions {
    FileOptions { lock, ..FileOptions::default() }
}

fn read_only() -> FileOptions {
    FileOptions { read_only: true, ..FileOptions::default() }
}

/// A queue of the disk.
fn start(disk: &File) -> Result<Box<dyn Channel>, BackendError> {
    disk.channel(&Arc::new(Memory::default()), 8)?()
}

/// Whether a queue of the disk could start now: resizing needs the same lock, and does not wait for it.
fn is_free_for(disk: &File) -> bool {
    disk.resize(Some(BYTES)).is_ok()
}

#[test]
fn an_image_belongs_to_one_writer_or_many_readers() {
    let image = Image::new("owner");
    let writer = image.open(locked(Lock::On)).unwrap();
    let error = image.open(locked(Lock::On)).unwrap_err().to_string();
    assert!(error.contains("another process uses it"), "{error}");
    image.open(read_only()).unwrap_err();
    image.open(locked(Lock::Off)).unwrap();
    drop(writer);
    let _one = image.open(read_only()).unwrap();
    let _two = image.open(read_only()).unwrap();
    image.open(locked(Lock::On)).unwrap_err();
}

#[test]
fn the_lock_is_free_as_soon_as_the_last_queue_has_stopped() {
    let image = Image::new("last-queue");
    for engine in [Engine::Uring, Engine::Inline].into_iter().cycle().take(40) {
        let disk = image.open(FileOptions { engine, ..FileOptions::default() }).unwrap();
        let other = image.open(locked(Lock::Late)).unwrap();
        assert!(is_free_for(&other), "no queue runs yet");
        let (one, two) = (start(&disk).unwrap(), start(&disk).unwrap());
        assert!(is_free_for(&disk) && !is_free_for(&other));
        drop(one);
        assert!(!is_free_for(&other), "one still runs");
        drop(two);
        assert!(is_free_for(&other));
        drop(start(&disk).unwrap());
        drop((disk, other));
        // Nothing is left of it that the next one would wait for.
        assert!(is_free_for(&image.open(locked(Lock::On)).unwrap()));
    }
}

#[test]
fn a_disk_is_handed_over_between_two_services() {
    let image = Image::new("handed-over");
    let source = image.open(locked(Lock::On)).unwrap();
    let running = start(&source).unwrap();
    let target = image.open(locked(Lock::Late)).unwrap();
    let stopped = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let target = scope.spawn(|| {
            let channel = target.channel(&Arc::new(Memory::default()), 8).unwrap();
            assert!(stopped.load(Ordering::SeqCst), "both have it");
            assert!(!is_free_for(&source));
            drop(channel);
        });
        // Long enough that a queue which does not wait is seen.
        std::thread::sleep(Duration::from_millis(300));
        stopped.store(true, Ordering::SeqCst);
        drop(running);
        target.join().unwrap();
    });
    start(&source).expect("and back");
}

#[test]
fn who_waits_in_vain_is_told_why() {
    let image = Image::new("in-vain");
    let user = image.open(locked(Lock::Late)).unwrap();
    let _running = start(&user).unwrap();
    let waiting = image.open(locked(Lock::Late)).unwrap();
    // Both waits take the same ten seconds.
    std::thread::scope(|scope| {
        let queue = scope.spawn(|| start(&waiting).err().unwrap().to_string());
        let opening = scope.spawn(|| image.open(locked(Lock::On)).unwrap_err().to_string());
        for error in [queue.join().unwrap(), opening.join().unwrap()] {
            assert!(error.contains("another process uses it"), "{error}");
        }
    });
}

#[test]
fn without_locks_nobody_is_kept_out() {
    let image = Image::new("off");
    let disks = [Lock::On, Lock::Off, Lock::Off].map(|lock| image.open(locked(lock)).unwrap());
    let _running = disks.each_ref().map(|disk| start(disk).unwrap());
}

#[test]
fn readers_run_together() {
    let image = Image::new("readers");
    let disks = [Lock::On, Lock::Late].map(|lock| image.open(FileOptions { lock, ..read_only() }).unwrap());
    let _running = disks.each_ref().map(|disk| start(disk).unwrap());
    assert!(!is_free_for(&image.open(locked(Lock::Late)).unwrap()), "but not with a writer");
}

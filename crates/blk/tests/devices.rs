//! Block devices: sectors of 4 KiB, those that take no writes, those without a medium.
#![allow(clippy::unwrap_used, reason = "tests")]

mod fake;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use blk::Backend;
use blk::backends::file::{Direct, Engine, File, FileOptions, Lock};
use fake::{DISCARD, OK, Rig, Ring, WRITE_ZEROES, forbid_io_uring, pattern, range};

const BYTES: u64 = 1 << 20;

/// A loop device over a file.
struct Loop {
    device: PathBuf,
    file: PathBuf,
}

impl Loop {
    /// None if this process may not make one here.
    fn new(name: &str, options: &[&str]) -> Option<Self> {
        let name = format!("exitless-blk-{}-{name}", std::process::id());
        let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::File::create(&file).unwrap().set_len(BYTES).unwrap();
        let output = Command::new("losetup").args(["--find", "--show"]).args(options).arg(&file).output();
        let said = match &output {
            Ok(output) => {
                String::from_utf8_lossy(if output.status.success() { &output.stdout } else { &output.stderr })
            }
            Err(error) => error.to_string().into(),
        };
        if output.as_ref().is_ok_and(|output| output.status.success()) {
            return Some(Self { device: PathBuf::from(said.trim()), file });
        }
        std::fs::remove_file(&file).unwrap();
        needs::skip(format_args!("no loop device: {}", said.trim()));
        None
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.device).status();
        let _ = std::fs::remove_file(&self.file);
    }
}

fn open(path: &Path, options: FileOptions) -> Result<File, String> {
    File::open(path, options).map_err(|error| error.to_string())
}

#[test]
fn ranges_of_less_than_a_sector_are_zeroed() {
    let Some(device) = Loop::new("4k", &["--sector-size", "4096"]) else { return };
    for (engine, direct) in
        [(Engine::Uring, Direct::Auto), (Engine::Uring, Direct::Off), (Engine::Inline, Direct::Off)]
    {
        let disk = open(&device.device, FileOptions { engine, direct, ..FileOptions::default() }).unwrap();
        let mut rig = Rig::new(Arc::new(disk), Ring::SPLIT);
        let mut model = pattern(64 << 10, 7);
        rig.write(0, &model);
        // Within a sector, over its end, from the middle of one to the middle of another, and whole ones.
        for (start, sectors) in [(1, 2), (15, 2), (21, 30), (64, 16), (95, 9)] {
            for (kind, flags) in [(WRITE_ZEROES, 0), (WRITE_ZEROES, 1), (DISCARD, 0)] {
                let (from, to) = (start as usize * 512, (start + sectors) as usize * 512);
                let context = format!("{engine:?} {direct:?}: {kind} of {sectors} at {start}");
                assert_eq!(rig.status(kind, 0, &range(start, sectors as u32, flags), 0), OK, "{context}");
                let found = rig.read(0, model.len());
                assert!(found[..from] == model[..from] && found[to..] == model[to..], "{context}: too much");
                if kind == WRITE_ZEROES {
                    model[from..to].fill(0);
                    assert!(found == model, "{context}: too little");
                }
                // Something to lose, the next time.
                model[from..to].copy_from_slice(&pattern(to - from, start + u64::from(flags)));
                rig.write(start, &model[from..to]);
            }
        }
        assert_eq!(rig.disk.counters().errors, 0);
    }
}

#[test]
fn a_device_that_takes_no_writes_is_refused_or_read_only() {
    let Some(device) = Loop::new("read-only", &["--read-only"]) else { return };
    let error = open(&device.device, FileOptions::default()).unwrap_err();
    assert!(error.contains("read-only"), "{error}");
    let disk = open(&device.device, FileOptions { read_only: true, ..FileOptions::default() }).unwrap();
    assert_eq!((disk.geometry().bytes, disk.geometry().read_only), (BYTES, true));
}

#[test]
fn what_has_no_size_is_refused() {
    let Some(device) = Loop::new("detached", &[]) else { return };
    std::fs::File::options().write(true).open(&device.file).unwrap().set_len(0).unwrap();
    assert!(Command::new("losetup").arg("--set-capacity").arg(&device.device).status().unwrap().success());
    for path in [&device.device, &device.file] {
        for lock in [Lock::On, Lock::Late, Lock::Off] {
            let error = open(path, FileOptions { lock, ..FileOptions::default() }).unwrap_err();
            assert!(error.contains("0 bytes"), "{error}");
        }
    }
}

/// Containers and administrators forbid io_uring.
#[test]
fn an_io_uring_that_is_refused_shows_at_opening() {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
        .join(format!("exitless-blk-{}-no-uring", std::process::id()));
    std::fs::File::create(&path).unwrap().set_len(BYTES).unwrap();
    let with = |engine| open(&path, FileOptions { engine, ..FileOptions::default() });
    with(Engine::Uring).unwrap();
    std::thread::scope(|scope| {
        // The filter is for this thread alone.
        scope.spawn(|| {
            forbid_io_uring();
            let error = with(Engine::Uring).unwrap_err();
            assert!(error.contains("engine=uring: "), "{error}");
            with(Engine::Auto).unwrap();
            with(Engine::Inline).unwrap();
        });
    });
    std::fs::remove_file(&path).unwrap();
}

/// Whoever grows an image that is not locked must find all that is written.
#[test]
fn opening_leaves_alone_what_lies_behind_the_end() {
    let path =
        PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("exitless-blk-{}-grown", std::process::id()));
    let file =
        std::fs::File::options().create(true).truncate(true).read(true).write(true).open(&path).unwrap();
    let data = pattern(4096, 3);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let opener = scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let _ = open(&path, FileOptions { lock: Lock::Off, ..FileOptions::default() });
            }
        });
        for at in (0..16 << 20).step_by(data.len()) {
            file.write_all_at(&data, at).unwrap();
        }
        let mut found = vec![0; 16 << 20];
        file.read_exact_at(&mut found, 0).unwrap();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        opener.join().unwrap();
        let lost = found.chunks(data.len()).filter(|chunk| *chunk != data).count();
        assert_eq!(lost, 0, "of {} blocks", found.len() / data.len());
    });
    std::fs::remove_file(&path).unwrap();
}

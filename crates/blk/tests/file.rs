//! Particulars of files: sizes, and changes that others make.
#![allow(clippy::unwrap_used, reason = "tests")]

mod fake;
mod lines;

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use blk::backends::file::{Direct, Engine, File, FileOptions};
use blk::{Backend, Blk, Options, ResizeError};
use fake::{FLUSH, IN, IO_ERROR, OK, OUT, Rig, Ring, WRITE_ZEROES, header, pattern, range};
use lines::Lines;
use virtio::Device;

struct Scratch(PathBuf);

impl Scratch {
    fn new(folder: &str, name: &str, bytes: u64) -> Self {
        let path = PathBuf::from(folder).join(format!("exitless-blk-{}-{name}", std::process::id()));
        std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
        Self(path)
    }

    fn on_disk(name: &str, bytes: u64) -> Self {
        Self::new(env!("CARGO_TARGET_TMPDIR"), name, bytes)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn read_only() -> FileOptions {
    FileOptions { read_only: true, ..FileOptions::default() }
}

#[test]
fn the_lock_is_gone_with_the_disk() {
    let file = Scratch::on_disk("relock", 1 << 20);
    for engine in [Engine::Uring, Engine::Inline].into_iter().cycle().take(40) {
        let options = FileOptions { engine, ..FileOptions::default() };
        let mut rig = Rig::new(Arc::new(File::open(&file.0, options).unwrap()), Ring::SPLIT);
        rig.write(0, &[1; 4096]);
    }
}

#[test]
fn a_file_opened_for_reading_makes_a_read_only_disk() {
    let file = Scratch::on_disk("read-only", 1 << 20);
    let disk = File::open(&file.0, read_only()).unwrap();
    assert!(disk.geometry().read_only && !disk.geometry().discard);
    let mut rig = Rig::new(Arc::new(disk), Ring::SPLIT);
    assert_eq!(rig.status(OUT, 0, &[1; 512], 0), IO_ERROR);
    assert_eq!(rig.status(IN, 0, &[], 512), OK);
    assert_eq!(rig.status(FLUSH, 0, &[], 0), OK);
}

#[test]
fn what_is_written_is_in_the_file() {
    let file = Scratch::on_disk("content", 1 << 20);
    let data = pattern(8192, 5);
    {
        let mut rig = Rig::new(Arc::new(File::open(&file.0, FileOptions::default()).unwrap()), Ring::SPLIT);
        rig.write(3, &data);
        assert_eq!(rig.status(FLUSH, 0, &[], 0), OK);
        assert_eq!(rig.status(WRITE_ZEROES, 0, &range(3, 1, 1), 0), OK);
    }
    let mut found = vec![0; 8192];
    std::fs::File::open(&file.0).unwrap().read_exact_at(&mut found, 3 * 512).unwrap();
    assert_eq!((&found[..512], &found[512..]), (&[0; 512][..], &data[512..]));
}

#[test]
fn the_size_is_that_of_whole_sectors_and_can_be_taken_over() {
    for engine in [Engine::Uring, Engine::Inline] {
        let file = Scratch::on_disk(&format!("size-{engine:?}"), (1 << 20) + 700);
        let options = FileOptions { engine, ..FileOptions::default() };
        let disk =
            Arc::new(Blk::new(Arc::new(File::open(&file.0, options).unwrap()), Options::default()).unwrap());
        let sectors = (1u64 << 20) / 512 + 1;
        assert_eq!(disk.config()[..8], sectors.to_le_bytes());
        let mut rig = Rig::with(disk.clone(), Ring::SPLIT, u64::MAX, 0);
        // The last sector ends in the middle of what a file system calls a block.
        rig.write(sectors - 1, &[6; 512]);
        assert_eq!(rig.read(sectors - 2, 1024)[512..], [6; 512]);
        std::fs::OpenOptions::new().write(true).open(&file.0).unwrap().set_len(2 << 20).unwrap();
        assert_eq!(rig.status(IN, sectors, &[], 512), IO_ERROR, "not before it is taken over");
        assert_eq!(disk.resize(None).unwrap(), 2 << 20);
        assert_eq!(rig.read(sectors, 512), [0; 512]);
    }
}

#[test]
fn reading_what_was_cut_off_fails() {
    for (folder, engine) in [
        (env!("CARGO_TARGET_TMPDIR"), Engine::Uring),
        (env!("CARGO_TARGET_TMPDIR"), Engine::Inline),
        ("/dev/shm", Engine::Auto),
    ] {
        let file = Scratch::new(folder, &format!("cut-{engine:?}"), 1 << 20);
        let options = FileOptions { engine, ..FileOptions::default() };
        let mut rig = Rig::new(Arc::new(File::open(&file.0, options).unwrap()), Ring::SPLIT);
        std::fs::OpenOptions::new().write(true).open(&file.0).unwrap().set_len(4096).unwrap();
        assert_eq!(rig.status(IN, 8, &[], 4096), IO_ERROR);
        assert_eq!(rig.status(IN, 0, &[], 8192), IO_ERROR, "partly there is not there");
        assert_eq!(rig.status(IN, 0, &[], 4096), OK);
    }
}

#[test]
fn what_is_no_disk_is_refused() {
    for path in ["/dev/null", "/", "/proc/self", "/no/such/file"] {
        let error = File::open(path.as_ref(), FileOptions::default()).unwrap_err().to_string();
        assert!(error.contains(path), "{error}");
    }
    let fifo = Scratch::on_disk("fifo", 0);
    std::fs::remove_file(&fifo.0).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &fifo.0, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    assert!(File::open(&fifo.0, FileOptions::default()).is_err(), "and without waiting for its other end");
}

#[test]
fn the_page_cache_can_be_kept() {
    let file = Scratch::on_disk("direct", 1 << 20);
    let auto = File::open(&file.0, FileOptions::default()).unwrap();
    println!("page cache bypassed on {}: {}", env!("CARGO_TARGET_TMPDIR"), auto.is_direct());
    drop(auto);
    let off = File::open(&file.0, FileOptions { direct: Direct::Off, ..FileOptions::default() }).unwrap();
    assert!(!off.is_direct());
}

#[test]
fn growing_cuts_nothing_off_a_file_that_was_grown_by_another() {
    let file = Scratch::on_disk("grown", 1 << 20);
    let disk = Blk::new(Arc::new(File::open(&file.0, FileOptions::default()).unwrap()), Options::default());
    let disk = disk.unwrap();
    std::fs::File::options().write(true).open(&file.0).unwrap().set_len(3 << 20).unwrap();
    assert!(matches!(disk.grow(2 << 20), Err(ResizeError::Loses { from, .. }) if from == 3 << 20));
    assert_eq!(std::fs::metadata(&file.0).unwrap().len(), 3 << 20);
    assert_eq!(disk.grow(4 << 20).unwrap(), 4 << 20);
    assert_eq!(std::fs::metadata(&file.0).unwrap().len(), 4 << 20);
}

/// Both engines, past the page cache where that can be had and through it.
fn each_way(check: impl Fn(FileOptions, &str)) {
    for engine in [Engine::Uring, Engine::Inline] {
        for direct in [Direct::Auto, Direct::Off] {
            let options = FileOptions { engine, direct, ..FileOptions::default() };
            check(options, &format!("{engine:?}, direct {direct:?}"));
        }
    }
}

#[test]
fn the_rest_of_a_long_request_does_not_undo_a_shrink() {
    for kind in [OUT, WRITE_ZEROES] {
        each_way(|options, context| {
            const LONG: usize = 16 << 20;
            let file = Scratch::on_disk(&format!("shrunk-{context}"), 2 * LONG as u64);
            let disk = File::open(&file.0, options).unwrap();
            let disk = Arc::new(Blk::new(Arc::new(disk), Options::default()).unwrap());
            let mut rig = Rig::with(disk.clone(), Ring::SPLIT, u64::MAX, 0);
            let whole = range(0, 2 * LONG as u32 / 512, 0);
            let data = pattern(LONG, 3);
            let sent = match kind {
                OUT => rig.send(&[&header(OUT, LONG as u64 / 512), &data], &[1]),
                _ => rig.send(&[&header(WRITE_ZEROES, 0), &whole], &[1]),
            };
            rig.turn();
            // Zeros are left to the file system, which may take them all at once.
            assert!(kind == WRITE_ZEROES || !rig.is_back(&sent), "{context}: what the test is about");
            disk.resize(Some(1 << 20)).unwrap();
            rig.wait(sent);
            assert_eq!(std::fs::metadata(&file.0).unwrap().len(), 1 << 20, "{context}");
            assert_eq!(rig.status(FLUSH, 0, &[], 0), OK, "{context}");
        });
    }
}

#[test]
fn zeroing_beyond_the_end_of_a_file_that_was_cut_off_fails() {
    each_way(|options, context| {
        let file = Scratch::on_disk(&format!("zeroed-{context}"), 1 << 20);
        let mut rig = Rig::new(Arc::new(File::open(&file.0, options).unwrap()), Ring::SPLIT);
        std::fs::File::options().write(true).open(&file.0).unwrap().set_len(64 << 10).unwrap();
        let lines = Lines::that_start_with("the file was cut off");
        tracing::subscriber::with_default(lines.clone(), || {
            for (sector, sectors, expected) in [(0, 128, OK), (256, 8, IO_ERROR), (120, 16, IO_ERROR)] {
                for unmap in [0, 1] {
                    let zeroed = range(sector, sectors, unmap);
                    assert_eq!(rig.status(WRITE_ZEROES, 0, &zeroed, 0), expected, "{context}, {sector}");
                }
            }
        });
        assert_eq!(lines.count(), 1, "{context}: lines in the log");
        assert_eq!(std::fs::metadata(&file.0).unwrap().len(), 64 << 10, "{context}");
    });
}

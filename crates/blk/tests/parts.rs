//! Storage that takes only blocks of 4 KiB past the page cache, and guests that read and write parts of them.
#![allow(clippy::unwrap_used, reason = "tests")]

mod fake;
mod fuse;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blk::backends::file::{Direct, Engine, File, FileOptions, Lock};
use blk::{Backend, Blk, Options};
use fake::{FLUSH, IN, OK, OUT, Random, Rig, Ring, Sent, WRITE_ZEROES, header, pattern, range};
use fuse::Failing;
use virtio::Device;

const BYTES: u64 = 1 << 20;
const SECTORS: u64 = BYTES / 512;

/// A file, and a loop device with sectors of 4 KiB over it where that is to be had.
struct Storage {
    device: Option<PathBuf>,
    file: PathBuf,
}

impl Storage {
    fn file(name: &str) -> Self {
        let name = format!("exitless-blk-{}-{name}", std::process::id());
        let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::write(&file, pattern(BYTES as usize, 1)).unwrap();
        Self { device: None, file }
    }

    fn device(name: &str) -> Option<Self> {
        Self::file(name).attached()
    }

    /// The same with the device.
    fn attached(mut self) -> Option<Self> {
        let output = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", "4096", "--direct-io=on"])
            .arg(&self.file)
            .output();
        match output {
            Ok(output) if output.status.success() => {
                self.device = Some(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
                Some(self)
            }
            failed => {
                needs::skip(format_args!("no loop device: {failed:?}"));
                None
            }
        }
    }

    fn path(&self) -> &Path {
        self.device.as_ref().unwrap_or(&self.file)
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        if let Some(device) = &self.device {
            let _ = Command::new("losetup").arg("--detach").arg(device).status();
        }
        let _ = std::fs::remove_file(&self.file);
    }
}

/// Both engines on both kinds of storage; a file stands for one on such a device.
fn each_storage(name: &str, check: impl Fn(File, &str)) {
    for engine in [Engine::Uring, Engine::Inline] {
        let file = Storage::file(&format!("{name}-{engine:?}"));
        for storage in [Some(file), Storage::device(&format!("{name}-dev-{engine:?}"))].into_iter().flatten()
        {
            let options = FileOptions { engine, unit_bytes_min: 4096, ..FileOptions::default() };
            let disk = File::open(storage.path(), options).unwrap();
            if !disk.is_direct() {
                needs::skip(format_args!("{} cannot bypass the page cache", storage.path().display()));
                continue;
            }
            check(disk, &format!("{engine:?} on {}", storage.path().display()));
        }
    }
}

/// A read of one block while another is written leaves the other's old bytes nowhere.
#[test]
fn a_part_of_a_block_is_read_as_it_was_written() {
    each_storage("stale", |disk, context| {
        let mut rig = Rig::new(Arc::new(disk), Ring::SPLIT);
        for round in 0..50u64 {
            let data = pattern(4096, 100 + round);
            let write = rig.send(&[&header(OUT, 16), &data], &[1]);
            let read = rig.send(&[&header(IN, 0)], &[512, 1]);
            assert_eq!((rig.wait(write).status(), rig.wait(read).status()), (OK, OK), "{context}");
            assert!(rig.read(16, 512) == data[..512], "{context}, round {round}: old data");
            let part = pattern(512, 900 + round);
            rig.write(16, &part);
            assert_eq!(rig.status(FLUSH, 0, &[], 0), OK);
            let found = rig.read(16, 4096);
            assert!(found[..512] == part && found[512..] == data[512..], "{context}, round {round}");
        }
    });
}

/// The same where the write takes until the read is over: what the system reads ahead is old.
#[test]
fn what_is_read_beside_a_write_under_way_does_not_last() {
    let Some(slow) = Failing::new(BYTES as usize) else { return };
    let Some(storage) = (Storage { device: None, file: slow.path_for_others() }).attached() else { return };
    let disk = File::open(storage.path(), FileOptions { engine: Engine::Uring, ..FileOptions::default() });
    let mut rig = Rig::new(Arc::new(disk.unwrap()), Ring::SPLIT);
    let (data, part) = (pattern(4096, 9), pattern(512, 10));
    slow.hold_writes();
    let write = rig.send(&[&header(OUT, 16), &data], &[1]);
    let deadline = Instant::now() + Duration::from_secs(120);
    while slow.held() == 0 {
        assert!(Instant::now() < deadline, "the write comes neither there nor back");
        rig.turn();
        if rig.is_back(&write) {
            slow.release();
            return needs::skip("a loop device that has a cache of its own");
        }
    }
    assert_eq!(rig.read(0, 512), [0; 512]);
    slow.release();
    assert_eq!(rig.wait(write).status(), OK);
    assert!(rig.read(16, 512) == data[..512], "old data are read");
    rig.write(16, &part);
    assert_eq!(rig.status(FLUSH, 0, &[], 0), OK);
    let found = rig.read(16, 4096);
    let old = (1..8).filter(|i| found[i * 512..][..512] != data[i * 512..][..512]).count();
    assert!(old == 0 && found[..512] == part, "{old} of the other 7 sectors are old again");
}

/// A request under way, and what it reads, if it does.
struct Flight {
    sent: Sent,
    sectors: std::ops::Range<u64>,
    expected: Option<Vec<u8>>,
}

/// No two requests under way overlap, so that each has one right answer; they share blocks all the time.
#[test]
fn parts_written_by_several_queues_at_once_all_last() {
    each_storage("random", |disk, context| {
        let options = Options { queues: 3, ..Options::default() };
        let disk = Arc::new(Blk::new(Arc::new(disk), options).unwrap());
        let mut rigs: Vec<_> =
            (0..3).map(|index| Rig::with(disk.clone(), Ring::SPLIT, u64::MAX, index)).collect();
        let mut model = pattern(BYTES as usize, 1);
        let mut random = Random(0x5EED);
        let mut flights: Vec<Vec<Flight>> = (0..3).map(|_| Vec::new()).collect();
        for step in 0..6000u64 {
            let queue = random.below(3) as usize;
            // A few blocks only, for company.
            let (start, count) = match random.below(4) {
                0 => (random.below(8) * 8, 8 * (1 + random.below(3))),
                _ => (random.below(90), 1 + random.below(12)),
            };
            let sectors = start..start + count;
            let free = !flights
                .iter()
                .flatten()
                .any(|flight| flight.sectors.start < sectors.end && sectors.start < flight.sectors.end);
            if free && flights[queue].len() < 16 {
                let bytes = start as usize * 512..(start + count) as usize * 512;
                let misaligned = if random.below(3) == 0 { 4 * random.below(8) } else { 0 };
                let (kind, head) = (random.below(10), |kind| header(kind, start));
                let (sent, expected) = match kind {
                    0..5 => {
                        let data = pattern(bytes.len(), step);
                        model[bytes.clone()].copy_from_slice(&data);
                        (rigs[queue].try_send(&[&head(OUT), &data], &[1], misaligned), None)
                    }
                    5 => {
                        model[bytes.clone()].fill(0);
                        let zeroed = range(start, count as u32, random.below(2) as u32);
                        (rigs[queue].try_send(&[&header(WRITE_ZEROES, 0), &zeroed], &[1], 0), None)
                    }
                    _ => (
                        rigs[queue].try_send(&[&head(IN)], &[bytes.len(), 1], misaligned),
                        Some(model[bytes.clone()].to_vec()),
                    ),
                };
                flights[queue].push(Flight { sent: sent.unwrap(), sectors, expected });
            }
            rigs[queue].turn();
            let rig = &mut rigs[queue];
            let (back, left): (Vec<_>, Vec<_>) =
                flights[queue].drain(..).partition(|flight| rig.is_back(&flight.sent));
            flights[queue] = left;
            for Flight { sent, sectors, expected } in back {
                let answer = rig.wait(sent);
                assert_eq!(answer.status(), OK, "{context}, step {step}: {sectors:?}");
                if let Some(expected) = expected {
                    assert!(answer.data() == expected, "{context}, step {step}: read of {sectors:?}");
                }
            }
        }
        // A queue may wait for blocks of another's request: all of them turn.
        let deadline = Instant::now() + Duration::from_secs(120);
        while rigs.iter().zip(&flights).any(|(rig, flights)| flights.iter().any(|f| !rig.is_back(&f.sent))) {
            assert!(Instant::now() < deadline, "{context}: requests do not come back");
            for rig in &mut rigs {
                rig.turn();
            }
        }
        for (rig, flights) in rigs.iter_mut().zip(flights) {
            for flight in flights {
                assert_eq!(rig.wait(flight.sent).status(), OK, "{context}");
            }
        }
        assert_eq!(rigs[0].status(FLUSH, 0, &[], 0), OK);
        let found: Vec<u8> = (0..SECTORS).step_by(64).flat_map(|at| rigs[0].read(at, 64 * 512)).collect();
        let wrong: Vec<_> =
            (0..SECTORS as usize).filter(|s| found[s * 512..][..512] != model[s * 512..][..512]).collect();
        assert!(wrong.is_empty(), "{context}: sectors {wrong:?}");
    });
}

/// The last block is there in part only: past the page cache it could not be written without making the file longer.
#[test]
fn a_file_without_whole_blocks_goes_through_the_page_cache_as_a_whole() {
    let storage = Storage::file("tail");
    std::fs::File::options().write(true).open(&storage.file).unwrap().set_len(BYTES + 512).unwrap();
    let with = |direct| {
        let options = FileOptions { unit_bytes_min: 4096, direct, ..FileOptions::default() };
        File::open(&storage.file, options)
    };
    let disk = with(Direct::Auto).unwrap();
    assert!(!disk.is_direct());
    assert_eq!(disk.geometry().bytes, BYTES + 512);
    drop(disk);
    let error = with(Direct::On).unwrap_err().to_string();
    assert!(error.contains("no multiple"), "{error}");
}

/// What the driver of a disk of `file` is told of its blocks, in bytes.
fn blk_size(file: File, logical_block_bytes: Option<u32>) -> u32 {
    let disk = Blk::new(Arc::new(file), Options { logical_block_bytes, ..Options::default() }).unwrap();
    u32::from_le_bytes(disk.config()[20..24].try_into().unwrap())
}

#[test]
fn the_guest_is_shown_the_blocks_that_the_storage_takes() {
    each_storage("shown", |disk, context| assert_eq!(blk_size(disk, None), 4096, "{context}"));
    each_storage("told", |disk, context| assert_eq!(blk_size(disk, Some(512)), 512, "{context}"));
    let through_cache = FileOptions { direct: Direct::Off, ..FileOptions::default() };
    if let Some(device) = Storage::device("shown-cached") {
        assert_eq!(blk_size(File::open(device.path(), through_cache).unwrap(), None), 4096, "BLKSSZGET");
    }
    let file = Storage::file("shown-cached-file");
    assert_eq!(blk_size(File::open(file.path(), through_cache).unwrap(), None), 512);
}

/// One that finds other blocks at the destination would take its file system for destroyed.
#[test]
fn a_guest_does_not_move_to_a_disk_of_other_blocks() {
    let file = Storage::file("moved");
    let disk = |unit_bytes_min, logical_block_bytes| {
        let options = FileOptions { unit_bytes_min, lock: Lock::Off, ..FileOptions::default() };
        let file = File::open(file.path(), options).unwrap();
        let direct = file.is_direct();
        let options = Options { logical_block_bytes, ..Options::default() };
        (Blk::new(Arc::new(file), options).unwrap(), direct)
    };
    let ((small, _), (large, true)) = (disk(512, Some(512)), disk(4096, None)) else {
        return needs::skip(format_args!("{} cannot bypass the page cache", file.path().display()));
    };
    let error = small.restore(&large.save()).unwrap_err().to_string();
    assert!(error.contains("had 2048 sectors and blocks of 4096 bytes, and has 2048 and 512"), "{error}");
    disk(512, Some(4096)).0.restore(&large.save()).unwrap();
}

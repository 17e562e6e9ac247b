//! Several queues on several threads change one image: neighbours in a cluster, the same sectors, whole clusters.
//!
//! Afterwards what each thread wrote is there, QEMU finds the image sound, and reads from it what we read.
#![allow(clippy::unwrap_used, reason = "tests")]

mod fake;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use blk::backends::file::Engine;
use blk::backends::qcow2::{Qcow2, Qcow2Options};
use blk::{Backend, Blk, Options};
use fake::{DISCARD, FLUSH, IN, OK, OUT, Random, Rig, Ring, Sent, WRITE_ZEROES, format_as, header, range};
use qcow2::layout::Layout;

const THREADS: u64 = 3;
/// Unit of ownership in the first part of the disk, in sectors: less than a cluster, so that threads are neighbours.
const BLOCK: u64 = 8;
/// Sectors of each part.
const PART: u64 = 2048;
/// Requests of each thread, and how many it has under way at most.
const REQUESTS: u64 = 600;
const DEPTH: usize = 12;

struct Scratch(PathBuf);

impl Scratch {
    fn new(folder: &str, name: &str) -> Self {
        Self(Path::new(folder).join(format!("exitless-queues-{}-{name}", std::process::id())))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn sectors_of(tag: u64, sectors: u64) -> Vec<u8> {
    tag.to_le_bytes().repeat(sectors as usize * 64)
}

fn tag_of(sector: &[u8]) -> u64 {
    let tag = u64::from_le_bytes(sector[..8].try_into().unwrap());
    assert!(sector.chunks(8).all(|word| word == &sector[..8]), "a sector of two writes: {sector:x?}");
    tag
}

/// What a thread did: for each sector, what is there if only it wrote there, `None` if that may be anything.
type Model = Vec<Option<u64>>;
/// It did nothing there.
const UNTOUCHED: Option<u64> = Some(u64::MAX);

/// One thread's requests. Its own sectors are: in the first part every third block, in the third one every third of
/// `unit` sectors. The second part is everybody's.
fn work(disk: &Arc<Blk>, thread: u64, unit: u64, seed: u64) -> Model {
    let mut rig = Rig::with(disk.clone(), Ring::SPLIT, u64::MAX, thread as u16);
    let (mut random, mut model) = (Random(seed ^ (thread + 1) << 32), vec![UNTOUCHED; 3 * PART as usize]);
    let mut under_way: Vec<(Sent, std::ops::Range<u64>)> = Vec::new();
    for request in 1..=REQUESTS {
        let tag = thread << 32 | request;
        let own = |part: u64, unit: u64, random: &mut Random| {
            let nth = random.below(PART / unit / THREADS);
            part * PART + (nth * THREADS + thread) * unit
        };
        let (kind, at, sectors) = match random.below(8) {
            0..3 => {
                let first = random.below(BLOCK);
                let sectors = 1 + random.below(BLOCK - first);
                (OUT, own(0, BLOCK, &mut random) + first, sectors)
            }
            3 => (OUT, PART + random.below(PART - 64), 1 + random.below(64)),
            4 => (FLUSH, 0, 0),
            5 => (OUT, own(2, unit, &mut random), unit),
            6 => (WRITE_ZEROES, own(2, unit, &mut random), unit),
            _ => (DISCARD, own(2, unit, &mut random), unit),
        };
        let busy = |(_, other): &(Sent, std::ops::Range<u64>)| other.start < at + sectors && at < other.end;
        while under_way.len() >= DEPTH || (sectors > 0 && under_way.iter().any(busy)) {
            let (sent, _) = under_way.remove(0);
            assert_eq!(rig.wait(sent).status(), OK, "thread {thread}, before request {request}");
        }
        let sent = match kind {
            OUT => rig.send(&[&header(OUT, at), &sectors_of(tag, sectors)], &[1]),
            FLUSH => rig.send(&[&header(FLUSH, 0)], &[1]),
            kind => {
                let unmap = if kind == WRITE_ZEROES { request as u32 & 1 } else { 0 };
                rig.send(&[&header(kind, 0), &range(at, sectors as u32, unmap)], &[1])
            }
        };
        for sector in &mut model[at as usize..(at + sectors) as usize] {
            *sector = match kind {
                OUT => Some(tag),
                WRITE_ZEROES => Some(0),
                _ => None,
            };
        }
        under_way.push((sent, at..at + sectors));
        rig.turn();
    }
    for (sent, _) in under_way {
        assert_eq!(rig.wait(sent).status(), OK, "thread {thread}");
    }
    rig.drain();
    model
}

/// Reads the disk through a queue of its own.
fn read_all(disk: &Arc<Blk>) -> Vec<u8> {
    let mut rig = Rig::with(disk.clone(), Ring::PACKED, u64::MAX, THREADS as u16);
    let parts = (0..3 * PART).step_by(512).map(|at| {
        let sent = rig.send(&[&header(IN, at)], &[512 * 512, 1]);
        rig.wait(sent).data().to_vec()
    });
    parts.collect::<Vec<_>>().concat()
}

fn qemu_img(args: &[&str]) -> Option<bool> {
    let output = Command::new("qemu-img").args(args).output().ok()?;
    if !output.status.success() {
        println!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    }
    Some(output.status.success())
}

fn race(folder: &str, name: &str, layout: Layout, version: u32, options: Qcow2Options) {
    let (image, raw) = (Scratch::new(folder, name), Scratch::new(folder, &format!("{name}-raw")));
    format_as(&image.0, layout, version, 3 * PART * 512);
    let unit = (layout.cluster_bytes() / 512).max(8);
    for round in 0..3 {
        let backend: Arc<dyn Backend> = Arc::new(Qcow2::open(&image.0, options).unwrap());
        let queues = THREADS as u16 + 1;
        let disk = Arc::new(Blk::new(backend.clone(), Options { queues, ..Options::default() }).unwrap());
        let before = read_all(&disk);
        let models: Vec<_> = std::thread::scope(|scope| {
            let disk = &disk;
            let threads: Vec<_> = (0..THREADS)
                .map(|thread| scope.spawn(move || work(disk, thread, unit, 77 + round)))
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let after = read_all(&disk);
        for sector in 0..3 * PART {
            let bytes = |all: &[u8]| tag_of(&all[sector as usize * 512..][..512]);
            let (tag, old) = (bytes(&after), bytes(&before));
            let owner = match sector / PART {
                0 => Some(sector / BLOCK % THREADS),
                2 => Some((sector - 2 * PART) / unit % THREADS),
                _ => None,
            };
            let touched = |thread: u64| models[thread as usize][sector as usize];
            match owner {
                Some(owner) => match touched(owner) {
                    UNTOUCHED => assert_eq!(tag, old, "{name}: sector {sector}"),
                    Some(wanted) => assert_eq!(tag, wanted, "{name}: sector {sector}, was {old:x}"),
                    None => {}
                },
                None => {
                    let written = (0..THREADS).any(|thread| touched(thread) == Some(tag));
                    assert!(
                        written || tag == old,
                        "{name}: sector {sector} is {tag:x}, which nobody wrote last"
                    );
                }
            }
        }
        File::create(&raw.0).unwrap().write_all_at(&after, 0).unwrap();
        drop((disk, backend));
        let (image, raw) = (image.0.to_str().unwrap(), raw.0.to_str().unwrap());
        let Some(sound) = qemu_img(&["check", "-q", image]) else { return needs::skip("no qemu-img") };
        assert!(sound, "{name}: QEMU finds the image unsound, or clusters leaked");
        assert_eq!(
            qemu_img(&["compare", "-q", "-f", "raw", "-F", "qcow2", raw, image]),
            Some(true),
            "{name}: QEMU reads something else"
        );
    }
}

const DISK: &str = env!("CARGO_TARGET_TMPDIR");
const TMPFS: &str = "/dev/shm";
const DEFAULT: Layout = Layout { cluster_bits: 16, refcount_order: 4, extended: false, external_data: false };

fn engine(engine: Engine) -> Qcow2Options {
    Qcow2Options { engine, ..Qcow2Options::default() }
}

#[test]
fn default_image_by_io_uring_on_disk() {
    race(DISK, "uring", DEFAULT, 3, engine(Engine::Uring));
}

#[test]
fn default_image_past_the_page_cache() {
    race(DISK, "direct", DEFAULT, 3, Qcow2Options { direct: true, ..Qcow2Options::default() });
}

#[test]
fn default_image_in_place_on_disk() {
    race(DISK, "inline", DEFAULT, 3, engine(Engine::Inline));
}

#[test]
fn default_image_on_tmpfs() {
    race(TMPFS, "tmpfs", DEFAULT, 3, engine(Engine::Auto));
    race(TMPFS, "tmpfs-uring", DEFAULT, 3, engine(Engine::Uring));
}

#[test]
fn small_clusters() {
    let layout = Layout { cluster_bits: 9, ..DEFAULT };
    race(TMPFS, "small", layout, 3, engine(Engine::Auto));
    race(
        DISK,
        "small-uring",
        Layout { cluster_bits: 12, refcount_order: 6, ..DEFAULT },
        3,
        engine(Engine::Uring),
    );
}

#[test]
fn subclusters() {
    race(TMPFS, "extended", Layout { extended: true, ..DEFAULT }, 3, engine(Engine::Auto));
    race(DISK, "extended-uring", Layout { extended: true, ..DEFAULT }, 3, engine(Engine::Uring));
}

#[test]
fn version_2() {
    race(TMPFS, "v2", DEFAULT, 2, engine(Engine::Auto));
}

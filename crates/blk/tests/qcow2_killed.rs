//! A service is killed, again and again, while it changes an image: what was answered is there, and QEMU finds nothing
//! wrong but leaked clusters.
//!
//! The test runs itself once more as the victim, which says what it begins and what was answered. With `EXITLESS_FULL` there
//! are many more rounds.
#![allow(clippy::unwrap_used, reason = "tests")]

mod fake;

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use blk::backends::file::Engine;
use blk::backends::qcow2::{Qcow2, Qcow2Options};
use fake::{DISCARD, FLUSH, OK, OUT, Random, Rig, Ring, Sent, WRITE_ZEROES, format_as, header, range};
use qcow2::layout::Layout;

/// Sectors of the disk.
const SECTORS: u64 = 16384;
/// What is written at once, in sectors.
const UNIT: u64 = 8;
const UNITS: usize = (SECTORS / UNIT) as usize;
const DEPTH: usize = 16;
/// Answers after which a victim is killed, at least and at most.
const ANSWERS: (u64, u64) = (20, 600);
const IMAGE: &str = "EXITLESS_VICTIM_IMAGE";
const ENGINE: &str = "EXITLESS_VICTIM_ENGINE";
const SEED: &str = "EXITLESS_VICTIM_SEED";

struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn options(engine: &str) -> Qcow2Options {
    let engine = if engine == "uring" { Engine::Uring } else { Engine::Inline };
    Qcow2Options { engine, ..Qcow2Options::default() }
}

/// A request: what it does, the first unit, how many.
type Change = (char, u64, u64);

fn any_change(random: &mut Random) -> Change {
    let cluster = 128 / UNIT;
    match random.below(8) {
        0 => ('z', random.below(SECTORS / 128) * cluster, cluster),
        1 => ('d', random.below(SECTORS / 128) * cluster, cluster),
        2 => {
            let first = random.below(UNITS as u64 - 40);
            ('w', first, 1 + random.below(40))
        }
        3 => ('f', 0, 0),
        _ => ('w', random.below(UNITS as u64), 1),
    }
}

/// If this process is the victim: changes the image until it is killed.
fn be_the_victim_if_asked() {
    let Some(image) = std::env::var_os(IMAGE) else { return };
    let text = |name| std::env::var(name).unwrap();
    let backend = Qcow2::open(Path::new(&image), options(&text(ENGINE))).unwrap();
    let mut rig = Rig::new(Arc::new(backend), Ring::SPLIT);
    let mut random = Random(text(SEED).parse().unwrap());
    let mut under_way: Vec<(Sent, u64, Change)> = Vec::new();
    let mut out = std::io::stdout().lock();
    for tag in 1_u64.. {
        let (kind, first, count) = any_change(&mut random);
        let overlaps = |other: &Change| other.1 < first + count && first < other.1 + other.2;
        while under_way.len() >= DEPTH || under_way.iter().any(|(.., other)| overlaps(other)) {
            let (sent, tag, _) = under_way.remove(0);
            assert_eq!(rig.wait(sent).status(), OK);
            writeln!(out, "answered {tag}").unwrap();
            out.flush().unwrap();
        }
        let tag = random.below(1 << 30) << 32 | tag;
        writeln!(out, "begun {tag} {kind} {first} {count}").unwrap();
        out.flush().unwrap();
        let (at, sectors) = (first * UNIT, count * UNIT);
        let sent = match kind {
            'w' => rig.send(&[&header(OUT, at), &tag.to_le_bytes().repeat(sectors as usize * 64)], &[1]),
            'f' => rig.send(&[&header(FLUSH, 0)], &[1]),
            kind => {
                let kind = if kind == 'z' { WRITE_ZEROES } else { DISCARD };
                rig.send(&[&header(kind, 0), &range(at, sectors as u32, 0)], &[1])
            }
        };
        under_way.push((sent, tag, (kind, first, count)));
        rig.turn();
    }
}

/// What a unit may hold: one of these.
type Model = Vec<Vec<u64>>;

/// Lets a victim work, kills it, and takes note of what it said.
fn kill_one(test: &str, image: &Path, engine: &str, seed: u64, model: &mut Model) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).stdout(Stdio::piped());
    command.env(IMAGE, image).env(ENGINE, engine).env(SEED, seed.to_string());
    let mut victim = command.spawn().unwrap();
    let deadly = ANSWERS.0 + Random(seed).below(ANSWERS.1);
    let (mut answers, mut begun) = (0, Vec::<(u64, Change)>::new());
    for line in BufReader::new(victim.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        let words: Vec<_> = line.split(' ').collect();
        let number = |at: usize| words[at].parse::<u64>().unwrap();
        match words[0] {
            "begun" if words.len() == 5 => {
                let (kind, first, count) = (words[2].chars().next().unwrap(), number(3), number(4));
                begun.push((number(1), (kind, first, count)));
                for unit in &mut model[first as usize..(first + count) as usize] {
                    match kind {
                        'w' => unit.push(number(1)),
                        'z' => unit.push(0),
                        // Anything may be read: zeros, or what was there.
                        _ => unit.push(0),
                    }
                }
            }
            "answered" if words.len() == 2 => {
                let at = begun.iter().position(|(tag, _)| *tag == number(1)).unwrap();
                let (tag, (kind, first, count)) = begun.remove(at);
                for unit in &mut model[first as usize..(first + count) as usize] {
                    match kind {
                        'w' => *unit = vec![tag],
                        'z' => *unit = vec![0],
                        _ => {}
                    }
                }
                answers += 1;
                if answers == deadly {
                    victim.kill().unwrap();
                }
            }
            _ => {}
        }
    }
    assert!(answers >= deadly, "the victim ended by itself");
    victim.wait().unwrap();
}

/// Reads all of the disk, and compares it with what may be there. That is known then.
fn look(image: &Path, engine: &str, model: &mut Model, context: &str) {
    let read_only = Qcow2Options { read_only: true, ..options(engine) };
    let mut rig = Rig::new(Arc::new(Qcow2::open(image, read_only).unwrap()), Ring::SPLIT);
    for first in (0..SECTORS).step_by(512) {
        let data = rig.read(first, 512 * 512);
        for (n, bytes) in data.chunks(UNIT as usize * 512).enumerate() {
            let unit = (first / UNIT) as usize + n;
            let tag = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            // A write that was not answered may be there in part, sector by sector.
            for sector in bytes.chunks(512) {
                let tag = u64::from_le_bytes(sector[..8].try_into().unwrap());
                assert!(sector.chunks(8).all(|word| word == &sector[..8]), "{context}: half a sector");
                assert!(
                    model[unit].contains(&tag),
                    "{context}: unit {unit} is {tag:x}, not of {:x?}",
                    model[unit]
                );
            }
            let whole = bytes.chunks(8).all(|word| word == &bytes[..8]);
            if whole {
                model[unit] = vec![tag];
            }
        }
    }
}

fn rounds() -> u64 {
    if std::env::var_os("EXITLESS_FULL").is_some() { 300 } else { 12 }
}

fn kill_again_and_again(test: &str, folder: &str, engine: &str, layout: Layout) {
    be_the_victim_if_asked();
    let image = Scratch(Path::new(folder).join(format!("exitless-{test}-{}", std::process::id())));
    format_as(&image.0, layout, 3, SECTORS * 512);
    let mut model: Model = vec![vec![0]; UNITS];
    for round in 0..rounds() {
        kill_one(test, &image.0, engine, 0x5eed + round * 7919, &mut model);
        look(&image.0, engine, &mut model, &format!("{test}, round {round}"));
        let check = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(&image.0).output();
        let Ok(check) = check else { return needs::skip("no qemu-img") };
        // 3: clusters are leaked, and nothing else is wrong.
        let text = String::from_utf8_lossy(&check.stdout);
        assert!(matches!(check.status.code(), Some(0 | 3)), "round {round}: {text}");
    }
}

const DEFAULT: Layout = Layout { cluster_bits: 16, refcount_order: 4, extended: false, external_data: false };

#[test]
fn killed_with_io_uring_on_disk() {
    kill_again_and_again("killed_with_io_uring_on_disk", env!("CARGO_TARGET_TMPDIR"), "uring", DEFAULT);
}

#[test]
fn killed_on_tmpfs() {
    kill_again_and_again("killed_on_tmpfs", "/dev/shm", "inline", DEFAULT);
}

#[test]
fn killed_with_small_clusters() {
    let layout = Layout { cluster_bits: 12, ..DEFAULT };
    kill_again_and_again("killed_with_small_clusters", env!("CARGO_TARGET_TMPDIR"), "uring", layout);
}

//! Runs inside a guest: keeps I/O going on a disk and knows at all times what every block must hold.
//!
//! `ledger DISK MIB [writers=N] [mirrors=N]` uses the first MIB mebibytes. The first half belongs to the writers, each
//! with an area of its own: a block carries its number and a generation that grows with every write, and the writer
//! remembers the latest one. A lost write shows as an older generation than remembered, and so does a request that was
//! carried out twice, the second time after a newer one.
//! The second half never changes. Mirrors read it straight into slots of memory that no CPU writes to, so that a slot
//! with the wrong contents is one whose write by the device got lost: a missing bit in a migration's dirty log.
//! One line `BEAT` per second shows progress. A line "stop" on stdin ends the run with a check of everything. A request
//! that takes longer than any outage the host plays ends it too, and powers the guest off: nothing else ends such a wait.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{LazyLock, Mutex};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

const BLOCK: usize = 4096;
/// A request covers up to this many blocks.
const RUN: u64 = 16;
/// `O_DIRECT` on x86: no cache between the program and the disk.
const DIRECT: i32 = 0o40_000;
/// Slots of one mirror.
const SLOTS: u64 = 2048;

/// The limit for a request, whatever else the machine does.
const LONGEST: Duration = Duration::from_secs(240);

/// When the request that a thread waits for began.
static PENDING: LazyLock<Mutex<HashMap<ThreadId, Instant>>> = LazyLock::new(Mutex::default);
static STOP: AtomicBool = AtomicBool::new(false);
static WRITES: AtomicU64 = AtomicU64::new(0);
static READS: AtomicU64 = AtomicU64::new(0);
static LONGEST_MS: AtomicU64 = AtomicU64::new(0);

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let disk =
        OpenOptions::new().read(true).write(true).custom_flags(DIRECT).open(&args[1]).expect("open the disk");
    let half = args[2].parse::<u64>().expect("a number of mebibytes") * 256 / 2;
    let option = |name: &str| {
        let value = args.iter().find_map(|arg| arg.strip_prefix(name)?.strip_prefix('='));
        value.map_or(0, |value| value.parse::<u64>().expect("a number of threads"))
    };
    let (writers, mirrors) = (option("writers"), option("mirrors"));
    let verdict = (|| {
        if mirrors > 0 {
            write_run(&disk, half, &vec![0; half as usize])?;
        }
        thread::scope(|scope| {
            let area = half / writers.max(1);
            let (disk, mut workers) = (&disk, Vec::new());
            workers.extend(
                (0..writers).map(|n| scope.spawn(move || until_failure(|| writer(disk, n * area, area)))),
            );
            workers.extend(
                (0..mirrors).map(|n| scope.spawn(move || until_failure(|| mirror(disk, n, half, half)))),
            );
            thread::spawn(listen);
            thread::spawn(watch);
            beat();
            workers.into_iter().try_for_each(|worker| worker.join().expect("a worker ends with a verdict"))
        })
    })();
    let counts = format!(
        "writes={} reads={} longest_ms={}",
        WRITES.load(Relaxed),
        READS.load(Relaxed),
        LONGEST_MS.load(Relaxed)
    );
    match verdict {
        Ok(()) => println!("RESULT ledger ok {counts}"),
        Err(reason) => println!("RESULT ledger fail {reason} ({counts})"),
    }
}

type Verdict = Result<(), String>;

fn until_failure(work: impl FnOnce() -> Verdict) -> Verdict {
    work().inspect_err(|_| STOP.store(true, Relaxed))
}

/// Waits for the host to type "stop".
fn listen() {
    for line in io::stdin().lines() {
        if line.is_ok_and(|line| line.trim() == "stop") {
            STOP.store(true, Relaxed);
            return;
        }
    }
}

/// Looks for requests that never complete.
fn watch() {
    loop {
        thread::sleep(Duration::from_secs(1));
        let pending = PENDING.lock().expect("no thread panics");
        let lost = pending.values().filter(|start| start.elapsed() > LONGEST).count();
        if lost > 0 {
            println!("RESULT ledger fail {lost} requests did not complete within {LONGEST:?}");
            std::fs::write("/proc/sysrq-trigger", "o").expect("power off");
        }
    }
}

fn beat() {
    let mut last = u64::MAX;
    while !STOP.load(Relaxed) {
        let (writes, reads) = (WRITES.load(Relaxed), READS.load(Relaxed));
        if last != writes + reads {
            println!("BEAT writes={writes} reads={reads} longest_ms={}", LONGEST_MS.load(Relaxed));
        }
        last = writes + reads;
        thread::sleep(Duration::from_secs(1));
    }
}

fn writer(disk: &File, first: u64, blocks: u64) -> Verdict {
    let mut random = Random(first + 1);
    let mut generations = vec![1; blocks as usize];
    write_run(disk, first, &generations)?;
    let mut buffer = Buffer::new(RUN);
    while !STOP.load(Relaxed) {
        let start = random.below(blocks);
        let run = (1 + random.below(RUN)).min(blocks - start);
        let held = &mut generations[start as usize..(start + run) as usize];
        match random.below(64) {
            0 => timed(|| disk.sync_data()).map_err(|error| format!("flush: {error}"))?,
            1..32 => {
                held.iter_mut().for_each(|generation| *generation += 1);
                write_run(disk, first + start, held)?;
            }
            _ => check_run(disk, &mut buffer, first + start, held)?,
        }
    }
    (0..blocks).step_by(RUN as usize).try_for_each(|start| {
        let end = (start + RUN).min(blocks);
        check_run(disk, &mut buffer, first + start, &generations[start as usize..end as usize])
    })
}

fn mirror(disk: &File, seed: u64, first: u64, blocks: u64) -> Verdict {
    let mut random = Random(seed + 1_000);
    let mut memory = Buffer::new(SLOTS);
    let mut held = vec![None; SLOTS as usize];
    while !STOP.load(Relaxed) {
        let run = 1 + random.below(RUN);
        let slot = random.below(SLOTS - run);
        let block = first + random.below(blocks - run);
        read_run(disk, memory.blocks_mut(slot, run), block)?;
        (0..run).for_each(|n| held[(slot + n) as usize] = Some(block + n));
        check_slot(&memory, random.below(SLOTS), &held)?;
    }
    (0..SLOTS).try_for_each(|slot| check_slot(&memory, slot, &held))
}

fn check_slot(memory: &Buffer, slot: u64, held: &[Option<u64>]) -> Verdict {
    match held[slot as usize] {
        Some(block) => compare(memory.block(slot), block, 0)
            .map_err(|reason| format!("in memory, slot {slot}: {reason}")),
        None => Ok(()),
    }
}

fn write_run(disk: &File, first: u64, generations: &[u64]) -> Verdict {
    for (chunk, generations) in generations.chunks(RUN as usize).enumerate() {
        let first = first + chunk as u64 * RUN;
        let run = generations.len() as u64;
        let mut buffer = Buffer::new(run);
        for (n, &generation) in (0..).zip(generations) {
            fill(buffer.blocks_mut(n, 1), first + n, generation);
        }
        let bytes = buffer.blocks_mut(0, run);
        timed(|| disk.write_all_at(bytes, first * BLOCK as u64))
            .map_err(|error| format!("write at block {first}: {error}"))?;
        WRITES.fetch_add(1, Relaxed);
    }
    Ok(())
}

fn read_run(disk: &File, bytes: &mut [u8], first: u64) -> Verdict {
    timed(|| disk.read_exact_at(bytes, first * BLOCK as u64))
        .map_err(|error| format!("read at block {first}: {error}"))?;
    READS.fetch_add(1, Relaxed);
    Ok(())
}

fn check_run(disk: &File, buffer: &mut Buffer, first: u64, generations: &[u64]) -> Verdict {
    read_run(disk, buffer.blocks_mut(0, generations.len() as u64), first)?;
    (0..).zip(generations).try_for_each(|(n, &generation)| compare(buffer.block(n), first + n, generation))
}

fn timed<T>(request: impl FnOnce() -> T) -> T {
    let (thread, start) = (thread::current().id(), Instant::now());
    PENDING.lock().expect("no thread panics").insert(thread, start);
    let outcome = request();
    PENDING.lock().expect("no thread panics").remove(&thread);
    LONGEST_MS.fetch_max(start.elapsed().as_millis() as u64, Relaxed);
    outcome
}

/// A block's contents: its number, its generation, and bytes that follow from both.
fn fill(bytes: &mut [u8], block: u64, generation: u64) {
    let mut random = Random(block << 32 ^ generation);
    for (n, word) in bytes.chunks_exact_mut(8).enumerate() {
        let value = match n {
            0 => block,
            1 => generation,
            _ => random.next(),
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
}

fn compare(bytes: &[u8], block: u64, generation: u64) -> Verdict {
    let mut wanted = [0; BLOCK];
    fill(&mut wanted, block, generation);
    let Some(byte) = (0..BLOCK).find(|&n| bytes[n] != wanted[n]) else { return Ok(()) };
    let word = |n: usize| u64::from_le_bytes(bytes[n..n + 8].try_into().expect("eight bytes"));
    Err(format!(
        "block {block} generation {generation} is wrong from byte {byte} on; it holds block {} generation {}",
        word(0),
        word(8)
    ))
}

/// Memory aligned for direct I/O, and so that a block is a page.
struct Buffer {
    bytes: Vec<u8>,
    start: usize,
}

impl Buffer {
    fn new(blocks: u64) -> Self {
        let bytes = vec![0; (blocks as usize + 1) * BLOCK];
        let start = bytes.as_ptr().align_offset(BLOCK);
        Self { bytes, start }
    }

    fn block(&self, block: u64) -> &[u8] {
        &self.bytes[self.start + block as usize * BLOCK..][..BLOCK]
    }

    fn blocks_mut(&mut self, first: u64, count: u64) -> &mut [u8] {
        &mut self.bytes[self.start + first as usize * BLOCK..][..count as usize * BLOCK]
    }
}

/// splitmix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

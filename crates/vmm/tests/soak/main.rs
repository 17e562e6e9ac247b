//! A hostile guest under the real KVM: two processors write garbage to two devices at once, while a third device of the
//! same machine and one of another machine are asked questions whose answers must be right. Afterwards the victims must
//! work as if nothing had been, and with the machine all its threads, descriptors and mappings must be gone.
//!
//! `EXITLESS_FULL=1` makes it minutes; `EXITLESS_SEED` runs one seed again.

#![allow(clippy::unwrap_used)]

mod device;
#[allow(dead_code)]
#[path = "../pci/echo.rs"]
mod echo;
mod garbage;
#[path = "../tiny/mod.rs"]
mod tiny;

use std::collections::BTreeMap;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use device::Ring;
use echo::Echo;
use garbage::{NEIGHBOUR, Random, VICTIMS};
use reactor::{Mode, Options, Pool};
use tiny::{Program, SCRATCH};
use vmm::{Config, DoorbellMode, Kernel, Machine, Outcome, PciDevice};

/// What the program says by its status: the answer of a neighbour, of a victim that was brought up again, is wrong.
const NEIGHBOUR_WRONG: u8 = 1;
const VICTIM_WRONG: u8 = 2;
/// How long one machine may take: many times what it takes on a busy host.
const PATIENCE: Duration = Duration::from_secs(300);

const NEIGHBOURS_RING: Ring = Ring(SCRATCH + 0x1_0000);
const ROUNDS: u32 = SCRATCH;
const SECOND_ROUNDS: u32 = SCRATCH + 4;
const SECOND_DONE: u32 = SCRATCH + 8;

/// A guest in whose garbage the seed is all that differs.
fn hostile(seed: u64) -> Program {
    const TRAMPOLINE: u32 = 0x8000;
    const CHUNKS: usize = 96;
    const CHUNK: usize = 10;
    const REPEAT: u32 = 2;
    let (mut first, mut second) = (Random(seed), Random(!seed));
    let all = [VICTIMS[0], VICTIMS[1], NEIGHBOUR];
    let mut program = garbage::prepare(Program::new()).fill(SCRATCH, 16, 0);
    program = device::prepare(device::place(program, &all), NEIGHBOURS_RING);
    program = device::bring_up(program, NEIGHBOUR, 0, NEIGHBOURS_RING, 1);

    // What the second processor does lies behind what the first one jumps over.
    let (skip, entry) = program.skip();
    program = skip;
    let start = program.here();
    program = garbage::append(program, &mut second, CHUNKS * CHUNK);
    program = program.increment(SECOND_ROUNDS).repeat_until(start, SECOND_ROUNDS, REPEAT);
    program = program.write32(SECOND_DONE, 1).halt().land(entry);

    program = program.copy(&tiny::to_protected_mode(TRAMPOLINE as u16, start), TRAMPOLINE);
    program = program.start_second(TRAMPOLINE);
    let again = program.here();
    for _ in 0..CHUNKS {
        program = garbage::append(program, &mut first, CHUNK);
        program = device::ask(program, NEIGHBOUR, NEIGHBOURS_RING, NEIGHBOUR_WRONG);
    }
    program = program.increment(ROUNDS).repeat_until(again, ROUNDS, REPEAT).wait_for(SECOND_DONE, 1);

    program = device::place(program, &VICTIMS);
    for slot in VICTIMS {
        let ring = garbage::ring(slot, 0);
        program = program.write8(device::registers(slot) + 0x14, 0);
        program = device::bring_up(device::prepare(program, ring), slot, 0, ring, 1);
        for _ in 0..8 {
            program = device::ask(program, slot, ring, VICTIM_WRONG);
        }
    }
    device::ask(program, NEIGHBOUR, NEIGHBOURS_RING, NEIGHBOUR_WRONG).exit(0)
}

/// A guest that asks until it is stopped.
fn quiet() -> Program {
    let program = device::prepare(device::place(Program::new(), &[1]), NEIGHBOURS_RING);
    let program = device::bring_up(program, 1, 0, NEIGHBOURS_RING, 1);
    let start = program.here();
    device::ask(program, 1, NEIGHBOURS_RING, NEIGHBOUR_WRONG).jump(start)
}

fn machine(
    program: Program,
    cpus: usize,
    doorbells: DoorbellMode,
    devices: &[Arc<Echo>],
    pool: &Arc<Pool>,
) -> Arc<Machine> {
    let mut config = Config::new(Kernel::Embedded(program.elf()), Box::new(std::io::sink()));
    (config.cpus, config.doorbells) = (cpus, doorbells);
    let attach = |(slot, device): (usize, &Arc<Echo>)| {
        PciDevice::new(device.clone(), format!("echo{cpus}{slot}"), Mode::Hybrid)
    };
    let devices = devices.iter().enumerate().map(attach).collect();
    Arc::new(Machine::new(config, devices, pool.clone()).unwrap())
}

/// Runs a machine to its end, or ends it when that takes too long.
fn run(machine: &Arc<Machine>, seed: u64) -> Outcome {
    let (done, ended) = mpsc::channel();
    let runner = thread::spawn({
        let machine = machine.clone();
        move || {
            let outcome = machine.run();
            let _ = done.send(());
            outcome
        }
    });
    let late = ended.recv_timeout(PATIENCE).is_err();
    machine.stop();
    let outcome = runner.join().unwrap().unwrap();
    assert!(!late, "seed {seed:#x}: the guest did not get to its end: {:?}", machine.snapshot());
    outcome
}

/// One hostile machine beside a quiet one, on the same I/O thread.
fn round(seed: u64) {
    let modes = [DoorbellMode::Map, DoorbellMode::Adaptive, DoorbellMode::Trap];
    let mode = modes[(seed % 3) as usize];
    let pool = Arc::new(Pool::start(Options::default()).unwrap());
    let victims = [Echo::with_shared_memory(3, &[0x2000]), Echo::new(2), Echo::new(1)];
    let hostile = machine(hostile(seed), 2, mode, &victims, &pool);
    let quiet = machine(quiet(), 1, DoorbellMode::Adaptive, &[Echo::new(1)], &pool);
    let beside = thread::spawn({
        let quiet = quiet.clone();
        move || quiet.run().unwrap()
    });
    let outcome = run(&hostile, seed);
    assert_eq!(
        outcome,
        Outcome::Exit(0),
        "seed {seed:#x}: {NEIGHBOUR_WRONG} is a neighbour, {VICTIM_WRONG} a victim"
    );
    // It still asks.
    let (answers, deadline) = (quiet.snapshot().requests(), Instant::now() + PATIENCE);
    while quiet.snapshot().requests() < answers + 10 {
        assert!(Instant::now() < deadline, "seed {seed:#x}: the other machine stands still");
        thread::sleep(Duration::from_millis(1));
    }
    quiet.stop();
    assert_eq!(beside.join().unwrap(), Outcome::Stopped, "seed {seed:#x}: the other machine");
    let snapshot = hostile.snapshot();
    let devices: BTreeMap<_, _> =
        snapshot.queues.iter().map(|queue| ((&queue.device, queue.queue), queue.counters.requests)).collect();
    eprintln!(
        "seed {seed:#x}, {mode}: {} exits to user space, {} kicks, requests {devices:?}, {answers} of the other machine",
        snapshot.user_exits(),
        snapshot.kicks(),
    );
    drop((hostile, quiet));
    pool.stop().unwrap();
}

/// What this process has of the system: threads, descriptors by what they are, mappings of memory that machines share.
fn holdings() -> BTreeMap<String, usize> {
    let mut found = BTreeMap::new();
    let mut count = |what: String| *found.entry(what).or_default() += 1;
    for entry in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
        if let Ok(target) = std::fs::read_link(entry.path()) {
            // A pipe or a socket has a number that differs.
            count(target.to_string_lossy().split(':').take(2).collect::<Vec<_>>().join(":"));
        }
    }
    for entry in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
        let name = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        count(format!("thread {}", name.trim()));
    }
    for line in std::fs::read_to_string("/proc/self/maps").unwrap().lines() {
        if line.contains("memfd:") || line.contains("anon_inode:") {
            count(format!("mapping {}", line.split_ascii_whitespace().nth(5).unwrap_or_default()));
        }
    }
    found
}

/// Threads end a moment after they were waited for.
fn settle(before: &BTreeMap<String, usize>) {
    let deadline = Instant::now() + PATIENCE;
    while holdings() != *before && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(holdings(), *before);
}

#[test]
fn garbage_of_two_processors_hurts_nobody_and_leaves_nothing() {
    if !needs::kvm() {
        return;
    }
    let asked = std::env::var("EXITLESS_SEED").ok();
    let asked = asked.map(|seed| u64::from_str_radix(seed.trim_start_matches("0x"), 16).unwrap());
    let soak = std::env::var_os("EXITLESS_FULL").map(|_| Duration::from_secs(300));
    let began = Instant::now();
    // Some things are made once in a process.
    round(asked.unwrap_or(0x5EED));
    let before = holdings();
    let mut seed = asked.unwrap_or(0x5EEE);
    for rounds in 1.. {
        round(seed);
        settle(&before);
        if soak.map_or(rounds == 2, |soak| began.elapsed() >= soak) {
            break;
        }
        seed += u64::from(asked.is_none());
    }
}

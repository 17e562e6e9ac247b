//! Short runs by the thousand against kicks and calls that get lost and threads that starve: every run must end.
//!
//! A wake-up is lost in the few instructions between a last look at the ring and the sleep, and only if the other side
//! is there at the same time. So runs differ in everything that moves the two against each other: ring format, requests
//! in flight, polling mode, pauses, kicks in band or not, a neighbour, threads that hog the CPUs.
//!
//! A few hundred runs by default, ten thousand with `EXITLESS_FULL=1`; `EXITLESS_SEED` begins elsewhere.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod client;
mod hogs;
#[path = "../process/mod.rs"]
mod process;
mod program;
mod run;
mod state;
mod watchdog;

use std::time::Instant;

use reactor::{Machine, Mode};
use virtio::RingFormat;

use client::{Random, Shape};
use hogs::{Hogs, Noise};
use run::{Case, run};

pub(crate) const MODES: [Mode; 3] = [Mode::Notify, Mode::Hybrid, Mode::Poll];
pub(crate) const FORMATS: [RingFormat; 2] = [RingFormat::Split, RingFormat::Packed];
pub(crate) const DEPTHS: [u16; 2] = [1, 32];
/// Rounds of all combinations of the above with a client that polls and one that sleeps.
const ROUNDS: u64 = 12;
const ROUNDS_FULL: u64 = 417;
/// The noise of one round after the other. Steady noise is rare: each wait for the CPU takes a turn of its scheduler.
const NOISE: [Noise; 6] =
    [Noise::None, Noise::Bursts, Noise::Steady, Noise::None, Noise::Bursts, Noise::Bursts];

pub(crate) fn is_full() -> bool {
    std::env::var_os("EXITLESS_FULL").is_some()
}

/// The CPU of the I/O thread and another one, where there is one.
pub(crate) fn cpus(machine: &Machine) -> [u32; 2] {
    let usable: Vec<_> = machine.allowed.iter().map(|cpu| cpu.id).collect();
    [usable[0], *usable.get(1).unwrap_or(&usable[0])]
}

/// All combinations, with the rest left to chance.
fn round(seed: u64, [io_cpu, other]: [u32; 2]) -> Vec<Case> {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut cases = Vec::new();
    for mode in MODES {
        for format in FORMATS {
            for depth in DEPTHS {
                for sleeps in [false, true] {
                    let shape = Shape {
                        format,
                        depth,
                        event_idx: random.chance(),
                        sleeps,
                        pauses: random.chance(),
                        in_band: random.chance(),
                    };
                    let mut shapes = vec![shape];
                    if random.chance() {
                        shapes.push(Shape { depth: 33 - depth, pauses: random.chance(), ..shape });
                    }
                    let client_cpu = if random.chance() { io_cpu } else { other };
                    cases.push(Case { seed: random.next(), mode, shapes, io_cpu, client_cpu });
                }
            }
        }
    }
    cases
}

#[test]
fn every_short_run_ends() {
    let machine = Machine::read();
    let cpus = cpus(&machine);
    let first = std::env::var("EXITLESS_SEED").map_or(1, |seed| seed.parse().unwrap());
    let rounds = if is_full() { ROUNDS_FULL } else { ROUNDS };
    let mut runs = 0;
    for seed in first..first + rounds {
        let began = Instant::now();
        let noise = NOISE[seed as usize % NOISE.len()];
        let hogs = Hogs::start(noise, &cpus);
        let cases = round(seed, cpus);
        cases.iter().for_each(|case| run(case, &machine));
        drop(hogs);
        runs += cases.len();
        println!("seed {seed}, noise {noise:?}: {runs} runs have ended, {} ms", began.elapsed().as_millis());
    }
}

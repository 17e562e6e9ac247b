//! Every end of a service of a qcow2 image leaves all in it that was answered, and nothing wrong but leaked clusters.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod guest;
mod process;

use std::process::Command;

use guest::{BLOCK, Guest, IN, OUT};
use process::{Scratch, Service, output};
use rustix::process::Signal;

const BLOCKS: u64 = 1024;

/// A generator of places; the sequence is the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// `qemu-img` with these arguments: its exit code, and what it says. `None` if this host has none.
fn qemu_img(arguments: &[&str]) -> Option<(Option<i32>, String)> {
    let output = Command::new("qemu-img").args(arguments).output().ok()?;
    let text = [output.stdout, output.stderr].concat();
    Some((output.status.code(), String::from_utf8_lossy(&text).into_owned()))
}

struct Disk {
    scratch: Scratch,
    /// What each block holds.
    blocks: Vec<u8>,
    random: Random,
}

impl Disk {
    fn new() -> Option<Self> {
        let disk = Self { scratch: Scratch::new(), blocks: vec![0; BLOCKS as usize], random: Random(0x5eed) };
        let Some((code, _)) = qemu_img(&["create", "-q", "-f", "qcow2", &disk.image(), "16M"]) else {
            needs::skip("no qemu-img");
            return None;
        };
        assert_eq!(code, Some(0));
        Some(disk)
    }

    fn image(&self) -> String {
        self.scratch.path("a.qcow2")
    }

    fn start(&self, engine: &str) -> (Service, Guest) {
        let (socket, control) = (self.scratch.path("a.sock"), self.scratch.path("a.ctl"));
        let backend = format!("qcow2:{},engine={engine}", self.image());
        let arguments =
            ["blk", "--socket", &socket, "--backend", &backend, "--control", &control, "--name", "vm1"];
        let service = Service::start(&arguments);
        service.line("ready: ");
        let guest = Guest::new(&socket);
        (service, guest)
    }

    /// Writes some blocks anywhere; all are answered.
    fn write(&mut self, guest: &mut Guest, count: u64) {
        for _ in 0..count {
            let (block, byte) = (self.random.below(BLOCKS), 1 + self.random.below(255) as u8);
            assert_eq!(guest.request(OUT, block, &[byte; BLOCK]), 0);
            self.blocks[block as usize] = byte;
        }
    }

    fn check(&self, leaks: bool, context: &str) {
        // Its locks may be held for a moment, by a ring that is no more.
        let Some((code, text)) = qemu_img(&["check", "-U", "-f", "qcow2", &self.image()]) else { return };
        assert!(code == Some(0) || (leaks && code == Some(3)), "{context}: {text}");
    }

    fn compare(&self, guest: &mut Guest, context: &str) {
        for (block, &byte) in self.blocks.iter().enumerate() {
            assert!(guest.block(block as u64) == [byte; BLOCK], "{context}: block {block}");
        }
    }
}

#[test]
fn every_answered_write_is_there_after_a_kill() {
    let rounds = if std::env::var_os("EXITLESS_FULL").is_some() { 100 } else { 4 };
    for engine in ["uring", "inline"] {
        let Some(mut disk) = Disk::new() else { return };
        for round in 0..rounds {
            let context = format!("{engine}, round {round}");
            let (mut service, mut guest) = disk.start(engine);
            disk.compare(&mut guest, &context);
            let count = 1 + disk.random.below(60);
            disk.write(&mut guest, count);
            service.end(Signal::KILL);
            disk.check(true, &context);
        }
    }
}

#[test]
fn an_end_by_a_signal_or_the_front_end_leaks_nothing() {
    for engine in ["uring", "inline"] {
        for signal in [Signal::TERM, Signal::INT] {
            for guest_first in [false, true] {
                let Some(mut disk) = Disk::new() else { return };
                let context = format!("{engine}, {signal:?}, the guest goes first: {guest_first}");
                let (mut service, mut guest) = disk.start(engine);
                disk.write(&mut guest, 100);
                if guest_first {
                    drop(guest);
                    service.end(signal);
                } else {
                    service.end(signal);
                }
                disk.check(false, &context);
                let (_service, mut guest) = disk.start(engine);
                disk.compare(&mut guest, &context);
            }
        }
    }
}

#[test]
fn a_resize_is_durable_when_it_is_answered() {
    for engine in ["uring", "inline"] {
        let Some(mut disk) = Disk::new() else { return };
        let (mut service, mut guest) = disk.start(engine);
        disk.write(&mut guest, 50);
        let control = disk.scratch.path("a.ctl");
        let resized = output(&["ctl", "--control", &control, "resize", "--device", "vm1", "40G"]);
        assert!(resized.status.success(), "{}", String::from_utf8_lossy(&resized.stderr));
        // Behind what the first L1 table has room for.
        let last = (40 << 30) / BLOCK as u64 - 1;
        assert_eq!(guest.request(OUT, last, &[9; BLOCK]), 0, "{engine}");
        service.end(Signal::KILL);
        disk.check(true, engine);
        let (_service, mut guest) = disk.start(engine);
        assert_eq!(guest.block(last), [9; BLOCK], "{engine}");
        assert_eq!(guest.request(IN, last + 1, &[]), 1, "{engine}: the disk ends there");
        disk.compare(&mut guest, engine);
    }
}

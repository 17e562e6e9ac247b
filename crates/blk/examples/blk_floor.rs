//! The cost of a request: a driver on one CPU, a disk's queue on another, 4 KiB random reads.
//!
//! `cargo run --release -p exitless-blk --example blk_floor -- [seconds] [split|packed|both] [QD,QD,…] [in-order] [disk]`
//! where `disk` is a line such as `null:1G` (the default) or `mem:64M`.
//!
//! Both ends are threads of this process, pinned to the first two CPUs, polling, without kicks or calls. For each
//! case three figures: the median latency, taken per request from publishing it to seeing it used; the 90th
//! percentile over 1-ms windows of the completion rate, which on a shared machine is steadier than a mean; and what a
//! turn of the queue costs per request with both ends on one CPU, so without the cache lines' way between two, and how much of that is the ring's.
#![allow(unsafe_code)] // the time-stamp counter

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use blk::{Blk, Options, Spec};
use reactor::{Budget, Poller, Ticks, Work};
use virtio::fake::{FakeDriver, FakeOptions};
use virtio::memory::{Area, GuestAddr};
use virtio::ring::{Buffer, DriverRing, Token, Used};
use virtio::{Device, PollerBuilder, Queue, RingFormat};

const RING_SIZE: u16 = 256;
const BLOCK_BYTES: u64 = 4096;
const REQUESTS_AT: u64 = 0x10_0000;
const DATA_AT: u64 = 0x20_0000;
const MEMORY_BYTES: u64 = 0x40_0000;
const BUDGET: Budget = Budget { requests: 256, bytes: 1 << 20 };

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let seconds = args.first().and_then(|s| s.parse().ok()).unwrap_or(1.0);
    let formats = match args.get(1).map(String::as_str) {
        Some("split") => vec![RingFormat::Split],
        Some("packed") => vec![RingFormat::Packed],
        _ => vec![RingFormat::Split, RingFormat::Packed],
    };
    let depths: Vec<usize> =
        args.get(2).map_or(vec![1, 32, 128], |list| list.split(',').filter_map(|s| s.parse().ok()).collect());
    let in_order = args.iter().any(|arg| arg == "in-order");
    let disk = args.iter().find(|arg| arg.contains(':')).map_or("null:1G", String::as_str);
    let ticks_per_ns = calibrate();
    println!(
        "{:8} {:>4} {:>10} {:>10} {:>10} {:>10}",
        "ring", "QD", "p50 µs", "kIOPS p90", "ns/req", "ring alone"
    );
    for format in formats {
        for &depth in &depths {
            let case = Case { format, depth, in_order, disk: disk.parse().expect("a disk"), ticks_per_ns };
            let (p50, rate) = case.run(Duration::from_secs_f64(seconds));
            let (cost, ring) = (case.cost(false), case.cost(true));
            println!(
                "{:8} {depth:>4} {p50:>10.3} {rate:>10.0} {cost:>10.1} {ring:>10.1}",
                format!("{format:?}")
            );
        }
    }
}

fn now() -> u64 {
    // SAFETY: reads a counter.
    unsafe { core::arch::x86_64::_rdtsc() }
}

fn calibrate() -> f64 {
    let (start, ticks) = (Instant::now(), now());
    std::thread::sleep(Duration::from_millis(50));
    (now() - ticks) as f64 / start.elapsed().as_nanos() as f64
}

fn pin(cpu: usize) {
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    rustix::thread::sched_setaffinity(None, &set).expect("the first two CPUs are there");
}

struct Case {
    format: RingFormat,
    depth: usize,
    in_order: bool,
    disk: Spec,
    ticks_per_ns: f64,
}

impl Case {
    fn ends(&self, ring_only: bool) -> (PollerBuilder, Driver) {
        let disk = Blk::new(self.disk.open(false).expect("disk"), Options::default()).expect("options");
        let guest = FakeDriver::new(FakeOptions {
            format: self.format,
            size: RING_SIZE,
            in_order: self.in_order,
            memory_bytes: MEMORY_BYTES,
            device_features: disk.features(),
            ..FakeOptions::default()
        });
        let (queue, _handle) = guest.queue();
        // Header and status share a cache line, as in Linux's `struct virtblk_req`.
        let requests = guest.area(GuestAddr(REQUESTS_AT), 64 * usize::from(RING_SIZE));
        let blocks = disk.bytes() / BLOCK_BYTES;
        let driver = Driver { ring: guest.ring, requests, blocks, random: 0x9E37_79B9_7F4A_7C15 };
        let ring_alone =
            |queue| -> PollerBuilder { Box::new(|| Box::new(RingOnly(queue, Vec::with_capacity(64)))) };
        (if ring_only { ring_alone(queue) } else { disk.start_queue(queue).expect("storage") }, driver)
    }

    fn run(&self, duration: Duration) -> (f64, f64) {
        let (builder, mut driver) = self.ends(false);
        let stop = Arc::new(AtomicBool::new(false));
        let server = std::thread::spawn({
            let stop = stop.clone();
            move || {
                pin(0);
                let mut poller = builder();
                poller.disarm();
                while !stop.load(Ordering::Relaxed) {
                    poller.poll(Ticks(now()), BUDGET);
                }
                while !poller.drain(Ticks(now())) {}
            }
        });
        pin(1);
        if !matches!(self.disk, Spec::Null { .. }) {
            driver.fill();
        }
        let result = drive(driver, self.depth, duration, self.ticks_per_ns);
        stop.store(true, Ordering::Relaxed);
        server.join().expect("the server does not panic");
        result
    }

    /// The tenth percentile over many turns, for the disk or the ring alone.
    fn cost(&self, ring_only: bool) -> f64 {
        let (builder, mut driver) = self.ends(ring_only);
        let mut poller = builder();
        poller.disarm();
        let depth = self.depth.min(32);
        let mut costs: Vec<u64> = (0..20_000)
            .map(|_| {
                for slot in 0..depth {
                    driver.add(slot);
                }
                driver.ring.publish();
                let start = now();
                let mut halves = 2 * depth;
                while halves > 0 {
                    halves -= poller.poll(Ticks(start), BUDGET).done as usize;
                }
                let cost = now() - start;
                while driver.ring.reap().expect("the device is sound").is_some() {}
                cost
            })
            .collect();
        costs.sort_unstable();
        costs[costs.len() / 10] as f64 / self.ticks_per_ns / depth as f64
    }
}

/// A queue that answers everything and looks at nothing: what the ring costs by itself.
struct RingOnly(Queue, Vec<Token>);

impl Poller for RingOnly {
    fn poll(&mut self, _now: Ticks, _budget: Budget) -> Work {
        self.0.pop(32, &mut self.1);
        let done = 2 * self.1.len() as u32;
        if done > 0 {
            self.0.complete(self.1.drain(..).map(|token| Used { token, written: 4097 }));
            self.0.publish();
        }
        Work { done, ..Work::NONE }
    }

    fn arm(&mut self) -> bool {
        false
    }

    fn disarm(&mut self) {
        self.0.disarm();
    }

    fn wake_fds(&self) -> Vec<RawFd> {
        Vec::new()
    }

    fn awaits_completion(&self) -> bool {
        false
    }

    fn drain(&mut self, _now: Ticks) -> bool {
        true
    }

    fn abandon(&mut self) -> bool {
        true
    }
}

struct Driver {
    ring: DriverRing,
    requests: Area,
    blocks: u64,
    random: u64,
}

impl Driver {
    #[inline(always)]
    fn add(&mut self, slot: usize) -> u16 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let at = 64 * slot;
        self.requests.u64(at).store(0, Ordering::Relaxed);
        self.requests.u64(at + 8).store(self.random % self.blocks * 8, Ordering::Relaxed);
        self.requests.u8(at + 16).store(0xff, Ordering::Relaxed);
        let request = REQUESTS_AT + at as u64;
        let buffers = [
            Buffer { addr: GuestAddr(request), len: 16, writable: false },
            Buffer {
                addr: GuestAddr(DATA_AT + slot as u64 * BLOCK_BYTES),
                len: BLOCK_BYTES as u32,
                writable: true,
            },
            Buffer { addr: GuestAddr(request + 16), len: 1, writable: true },
        ];
        self.ring.add(&buffers).expect("the ring has room for three descriptors per request")
    }

    /// Writes the whole disk, so that reads find something.
    fn fill(&mut self) {
        for block in 0..self.blocks {
            self.requests.u64(0).store(1, Ordering::Relaxed);
            self.requests.u64(8).store(block * 8, Ordering::Relaxed);
            let data = GuestAddr(DATA_AT + block % u64::from(RING_SIZE) * BLOCK_BYTES);
            let buffers = [
                Buffer { addr: GuestAddr(REQUESTS_AT), len: 16, writable: false },
                Buffer { addr: data, len: BLOCK_BYTES as u32, writable: false },
                Buffer { addr: GuestAddr(REQUESTS_AT + 16), len: 1, writable: true },
            ];
            self.ring.add(&buffers).expect("the ring has room for three descriptors");
            self.ring.publish();
            while self.ring.reap().expect("the device is sound").is_none() {
                std::hint::spin_loop();
            }
        }
    }

    #[inline(always)]
    fn is_ok(&self, slot: usize) -> bool {
        self.requests.u8(64 * slot + 16).load(Ordering::Relaxed) == 0
    }
}

fn drive(mut driver: Driver, depth: usize, duration: Duration, ticks_per_ns: f64) -> (f64, f64) {
    let depth = depth.min(usize::from(RING_SIZE) / 3);
    let mut slot_of = [0usize; RING_SIZE as usize];
    let mut sent_at = [0u64; RING_SIZE as usize];
    let start = now();
    for slot in 0..depth {
        let id = driver.add(slot);
        (slot_of[usize::from(id)], sent_at[usize::from(id)]) = (slot, start);
    }
    driver.ring.publish();

    let window = (1e6 * ticks_per_ns) as u64;
    let end = start + (duration.as_nanos() as f64 * ticks_per_ns) as u64;
    let (mut window_end, mut in_window, mut windows) = (start + window, 0u64, Vec::new());
    let mut latencies = vec![0u64; 1 << 16];
    let mut back: Vec<(usize, u64)> = Vec::with_capacity(RING_SIZE.into());
    loop {
        while let Some(completion) = driver.ring.reap().expect("the device is sound") {
            // The id may be used again while the rest of the burst is looked at.
            let id = usize::from(completion.id);
            back.push((slot_of[id], sent_at[id]));
        }
        if back.is_empty() {
            std::hint::spin_loop();
            continue;
        }
        let time = now();
        in_window += back.len() as u64;
        for (slot, sent) in back.drain(..) {
            assert!(driver.is_ok(slot), "status");
            let latency = (time - sent) as usize >> 3;
            let last = latencies.len() - 1;
            latencies[latency.min(last)] += 1;
            let id = driver.add(slot);
            (slot_of[usize::from(id)], sent_at[usize::from(id)]) = (slot, time);
        }
        driver.ring.publish();
        if time >= window_end {
            windows.push(in_window as f64 / ((time - window_end + window) as f64 / ticks_per_ns / 1e6));
            (window_end, in_window) = (time + window, 0);
            if time >= end {
                break;
            }
        }
    }
    windows.sort_unstable_by(f64::total_cmp);
    let total: u64 = latencies.iter().sum();
    let mut seen = 0;
    let median = latencies.iter().position(|&n| {
        seen += n;
        seen * 2 >= total
    });
    (median.unwrap_or(0) as f64 * 8.0 / ticks_per_ns / 1e3, windows[windows.len() * 9 / 10])
}

//! What a request costs: a driver on one CPU, a disk's queue on another, 4 KiB random reads.
//!
//! `cargo run --release -p exitless-blk --example blk_floor -- [seconds] [split|packed|both] [QD,QD,…] [in-order]`
//!
//! Both ends are threads of this process, pinned to the first two CPUs, polling, without kicks or calls. For each
//! case two figures: the median latency, taken per request from publishing it to seeing it used, and the 90th
//! percentile over 1-ms windows of the completion rate, which on a shared machine is steadier than a mean.
#![allow(unsafe_code)] // the time-stamp counter

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use blk::{Blk, Options, backends::null::Null};
use reactor::{Budget, Ticks};
use virtio::memory::{GuestAddr, Mapping, Memory, Region};
use virtio::ring::{Buffer, DriverRing};
use virtio::{Device, Queue, QueueConfig, RingConfig, RingFormat};

const RING_SIZE: u16 = 256;
const BLOCK_BYTES: u64 = 4096;
const DISK_BYTES: u64 = 1 << 30;
const REQUESTS_AT: u64 = 0x10_0000;
const DATA_AT: u64 = 0x20_0000;
const MEMORY_BYTES: u64 = 0x40_0000;

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
    let ticks_per_ns = calibrate();
    println!("{:8} {:>4} {:>10} {:>9}", "ring", "QD", "p50 µs", "kIOPS p90");
    for format in formats {
        for &depth in &depths {
            let (p50, rate) = run(format, depth, in_order, Duration::from_secs_f64(seconds), ticks_per_ns);
            println!("{:8} {depth:>4} {p50:>10.3} {rate:>9.0}", format!("{format:?}"));
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

fn run(
    format: RingFormat,
    depth: usize,
    in_order: bool,
    duration: Duration,
    ticks_per_ns: f64,
) -> (f64, f64) {
    let (mapping, _) = Mapping::anonymous("blk_floor", MEMORY_BYTES).expect("memory");
    let region = Region::new(GuestAddr(0), Arc::new(mapping)).expect("region");
    let memory = Arc::new(Memory::new(vec![region]).expect("map"));
    let [desc, driver, _] = DriverRing::layout(format, RING_SIZE);
    let ring = RingConfig {
        format,
        size: RING_SIZE,
        desc: GuestAddr(0),
        driver: GuestAddr(desc as u64),
        device: GuestAddr((desc + driver) as u64),
        event_idx: false,
        indirect: false,
        in_order,
    };
    let disk = Blk::new(Arc::new(Null::new(DISK_BYTES)), Options::default()).expect("options");
    let (queue, _handle) = Queue::new(QueueConfig {
        index: 0,
        features: u64::MAX,
        ring,
        state: None,
        memory: memory.clone(),
        kick: None,
        call: None,
        log: None,
        inflight: None,
        on_error: None,
    })
    .expect("queue");
    let builder = disk.start_queue(queue);
    let stop = Arc::new(AtomicBool::new(false));
    let server = std::thread::spawn({
        let stop = stop.clone();
        move || {
            pin(0);
            let mut poller = builder();
            poller.disarm();
            while !stop.load(Ordering::Relaxed) {
                poller.poll(Ticks(now()), Budget { requests: 256, bytes: 1 << 20 });
            }
            while !poller.drain(Ticks(now())) {}
        }
    });
    pin(1);
    let result =
        drive(DriverRing::new(&ring, &memory).expect("ring"), &memory, depth, duration, ticks_per_ns);
    stop.store(true, Ordering::Relaxed);
    server.join().expect("the server does not panic");
    result
}

fn drive(
    mut ring: DriverRing,
    memory: &Memory,
    depth: usize,
    duration: Duration,
    ticks_per_ns: f64,
) -> (f64, f64) {
    // Header and status share a cache line, as in Linux's `struct virtblk_req`.
    let requests = memory.area(GuestAddr(REQUESTS_AT), 64 * usize::from(RING_SIZE), 64).expect("in memory");
    let mut random = 0x9E37_79B9_7F4A_7C15u64;
    let mut add = |ring: &mut DriverRing, slot: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let at = 64 * slot;
        requests.u64(at).store(0, Ordering::Relaxed);
        requests.u64(at + 8).store(random % (DISK_BYTES / BLOCK_BYTES) * 8, Ordering::Relaxed);
        requests.u8(at + 16).store(0xff, Ordering::Relaxed);
        let request = REQUESTS_AT + at as u64;
        let buffers = [
            Buffer { addr: GuestAddr(request), len: 16, writable: false },
            Buffer { addr: GuestAddr(DATA_AT + slot as u64 * BLOCK_BYTES), len: 4096, writable: true },
            Buffer { addr: GuestAddr(request + 16), len: 1, writable: true },
        ];
        ring.add(&buffers).expect("the ring has room for three descriptors per request")
    };
    let depth = depth.min(usize::from(RING_SIZE) / 3);
    let mut slot_of = [0usize; RING_SIZE as usize];
    let mut sent_at = [0u64; RING_SIZE as usize];
    let start = now();
    for slot in 0..depth {
        let id = add(&mut ring, slot);
        (slot_of[usize::from(id)], sent_at[usize::from(id)]) = (slot, start);
    }
    ring.publish();

    let window = (1e6 * ticks_per_ns) as u64;
    let end = start + (duration.as_nanos() as f64 * ticks_per_ns) as u64;
    let (mut window_end, mut in_window, mut windows) = (start + window, 0u64, Vec::new());
    let mut latencies = vec![0u64; 1 << 16];
    let mut back: Vec<(usize, u64)> = Vec::with_capacity(RING_SIZE.into());
    loop {
        while let Some(completion) = ring.reap().expect("the device is sound") {
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
            assert_eq!(requests.u8(64 * slot + 16).load(Ordering::Relaxed), 0, "status");
            let latency = (time - sent) as usize >> 3;
            let last = latencies.len() - 1;
            latencies[latency.min(last)] += 1;
            let id = add(&mut ring, slot);
            (slot_of[usize::from(id)], sent_at[usize::from(id)]) = (slot, time);
        }
        ring.publish();
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

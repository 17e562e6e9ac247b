//! A driver whose requests take several operations each, to a disk in storage that is slow, takes little at once and
//! fails now and then. It checks what an answer says against what is in storage, then and later.

use std::sync::Arc;

use blk::backends::slow::{Fate, Slow};
use blk::config::WRITEBACK_OFFSET;
use blk::{Blk, Options};
use reactor::{Budget, Poller, Ticks};
use virtio::Device;
use virtio::fake::{FakeDriver, FakeOptions};
use virtio::memory::GuestAddr;
use virtio::ring::RingFormat;

use crate::input::Input;

const SECTOR_BYTES: usize = 512;
const SECTORS: usize = 128;
/// What the disk is full of at first.
const FILL: u8 = 0xff;
/// Descriptors of the ring. All chains are indirect, so it is requests in flight, too.
const RING_SIZE: u16 = 16;
const STEPS_MAX: usize = 64;
/// Turns in which everything has come back: each range of each request by itself, in the slowest way.
const TURNS_MAX: usize = 100_000;

const IN: u32 = 0;
const OUT: u32 = 1;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// A request in flight.
struct Pending {
    id: u16,
    status: GuestAddr,
    sectors: Vec<usize>,
    /// What fills them when it is done.
    fill: u8,
    /// It is durable when it is answered.
    durable: bool,
}

struct Checker {
    fake: FakeDriver,
    poller: Box<dyn Poller>,
    storage: Arc<Slow>,
    write_through: bool,
    now: Ticks,
    /// What fills each sector.
    model: [u8; SECTORS],
    /// What a request in flight is about, no other touches.
    busy: [bool; SECTORS],
    pending: Vec<Pending>,
    fill: u8,
}

/// Runs what is left of an input: how storage behaves, then requests and turns of the queue.
///
/// # Panics
/// An answer was wrong, early or did not come, or something was done after it: a bug.
pub(crate) fn run(input: &mut Input<'_>) {
    let choice = input.u8();
    let in_flight_max = 1 + usize::from(input.u8() % 32);
    let mut fates = input.bytes(16).to_vec();
    fates.push(choice);
    let mut count = 0;
    let fate = move |_, _, _| {
        count += 1;
        let byte = fates[count % fates.len()];
        Fate { looks: (byte & 7).into(), fails: byte >= 0xf0 }
    };
    let storage = Arc::new(Slow::new(vec![FILL; SECTORS * SECTOR_BYTES], in_flight_max, Box::new(fate)));
    let disk = Blk::new(storage.clone(), Options::default()).expect("the options are allowed");
    let write_through = choice & 1 != 0;
    disk.write_config(WRITEBACK_OFFSET, &[u8::from(!write_through)]).expect("the field can be written");
    let fake = FakeDriver::new(FakeOptions {
        format: if choice & 2 != 0 { RingFormat::Packed } else { RingFormat::Split },
        size: RING_SIZE,
        in_order: choice & 4 != 0,
        memory_bytes: 1 << 20,
        device_features: disk.features(),
        ..FakeOptions::default()
    });
    let (queue, handle) = fake.queue();
    let poller = (disk.start_queue(queue).expect("it needs nothing"))();
    let mut checker = Checker {
        fake,
        poller,
        storage,
        write_through,
        now: Ticks(1),
        model: [FILL; SECTORS],
        busy: [false; SECTORS],
        pending: Vec::new(),
        fill: 0,
    };
    let mut steps = 0;
    while !input.is_empty() && steps < STEPS_MAX {
        checker.step(input);
        steps += 1;
    }
    checker.finish();
    assert_eq!(handle.error(), None, "the ring was sound");
}

impl Checker {
    fn step(&mut self, input: &mut Input<'_>) {
        let choice = input.u8();
        let mut ranges = |count: u8| -> Vec<(usize, usize)> {
            let place = |input: &mut Input<'_>| (usize::from(input.u8() % 120), usize::from(input.u8() % 8));
            (0..count).map(|_| place(input)).collect()
        };
        match choice & 3 {
            0 => (0..=choice >> 2).for_each(|_| self.turn()),
            1 => self.send(OUT, &ranges(1)),
            2 => self.send(WRITE_ZEROES, &ranges(1 + (choice >> 3))),
            _ => self.send(DISCARD, &ranges(1 + (choice >> 3))),
        }
    }

    fn send(&mut self, kind: u32, ranges: &[(usize, usize)]) {
        let sectors: Vec<_> = ranges.iter().flat_map(|&(at, len)| at..at + len).collect();
        if self.pending.len() == usize::from(RING_SIZE) || sectors.iter().any(|&sector| self.busy[sector]) {
            return;
        }
        self.fill = self.fill % 250 + 1;
        let mut request = kind.to_le_bytes().to_vec();
        request.extend([0; 4]);
        if kind == OUT {
            request.extend((ranges[0].0 as u64).to_le_bytes());
            request.extend(vec![self.fill; sectors.len() * SECTOR_BYTES]);
        } else {
            request.extend([0; 8]);
            for &(at, len) in ranges {
                request.extend((at as u64).to_le_bytes());
                request.extend((len as u64).to_le_bytes());
            }
        }
        sectors.iter().for_each(|&sector| self.busy[sector] = true);
        let buffers = [self.fake.readable(&request), self.fake.writable(1)];
        self.pending.push(Pending {
            id: self.fake.offer(&buffers, true),
            status: buffers[1].addr,
            sectors,
            fill: if kind == OUT { self.fill } else { 0 },
            durable: self.write_through && kind != DISCARD,
        });
    }

    fn turn(&mut self) {
        self.now = self.now.plus_ns(1000);
        self.poller.poll(self.now, Budget { requests: 8, bytes: 4096 });
        while let Some(completion) = self.fake.ring.reap().expect("a used entry for a chain in flight") {
            let at = self.pending.iter().position(|pending| pending.id == completion.id);
            let Pending { status, sectors, fill, durable, .. } =
                self.pending.swap_remove(at.expect("it is in flight"));
            let done = self.fake.read(status, 1) == [0];
            for sector in sectors {
                let at = sector * SECTOR_BYTES;
                self.busy[sector] = false;
                // One that failed did some of it or none.
                self.model[sector] = if done { fill } else { self.storage.written(at, 1)[0] };
                let expected = [self.model[sector]; SECTOR_BYTES];
                assert_eq!(self.storage.written(at, SECTOR_BYTES), expected, "answered before it was done");
                if done && durable {
                    assert_eq!(self.storage.durable(at, SECTOR_BYTES), expected, "answered before its flush");
                }
            }
        }
    }

    /// Everything comes back, and then nothing is left of it.
    fn finish(mut self) {
        for _ in 0..TURNS_MAX {
            if self.pending.is_empty() {
                break;
            }
            self.turn();
        }
        assert!(self.pending.is_empty(), "{} requests did not come back", self.pending.len());
        let operations = self.storage.operations();
        let reads = 2 * usize::from(RING_SIZE);
        for _ in 0..reads {
            let mut header = [0; 16];
            header[..4].copy_from_slice(&IN.to_le_bytes());
            let buffers = [self.fake.readable(&header), self.fake.writable(SECTOR_BYTES + 1)];
            self.fake.offer(&buffers, true);
            self.fake.run(&mut *self.poller, 1);
        }
        assert_eq!(self.storage.operations(), operations + reads as u64, "something was done later");
        for (sector, &fill) in self.model.iter().enumerate() {
            let found = self.storage.written(sector * SECTOR_BYTES, SECTOR_BYTES);
            assert_eq!(found, [fill; SECTOR_BYTES], "sector {sector} was changed later");
        }
        assert!(self.poller.drain(self.now), "nothing is in flight");
    }
}

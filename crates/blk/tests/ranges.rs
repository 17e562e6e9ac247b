//! Requests that take several operations: all of them are done when the request is answered, and none is done later.
#![allow(clippy::unwrap_used, reason = "tests")]

mod fake;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use blk::backends::file::{Engine, File, FileOptions};
use blk::backends::memory::Memory;
use blk::backends::slow::{Fate, Slow};
use blk::config::WRITEBACK_OFFSET;
use blk::{Backend, Blk, OpKind, Options};
use fake::{
    Answer, DISCARD, FLUSH, IN, IO_ERROR, OK, OUT, Rig, Ring, Sent, WRITE_ZEROES, header, pattern, range,
};
use proptest::collection::vec;
use proptest::prelude::*;
use reactor::Budget;
use virtio::Device;

const SECTOR: usize = 512;
const MIB: u64 = 1 << 20;
/// The most ranges in one request.
const RANGES: usize = 32;

/// A ring that has room for 250 requests of three descriptors.
const LARGE: Ring = Ring { size: 1024, ..Ring::SPLIT };

fn slow(bytes: usize, in_flight_max: usize, looks: impl Fn(u64) -> u32 + Send + 'static) -> Arc<Slow> {
    let mut count = 0;
    let fates = move |_, _, _| {
        count += 1;
        Fate { looks: looks(count), fails: false }
    };
    Arc::new(Slow::new(vec![0; bytes], in_flight_max, Box::new(fates)))
}

/// A disk whose driver has switched the cache to write-through.
fn write_through(backend: Arc<dyn Backend>) -> Arc<Blk> {
    let disk = Arc::new(Blk::new(backend, Options::default()).unwrap());
    disk.write_config(WRITEBACK_OFFSET, &[0]).unwrap();
    disk
}

/// Sends `kind` on 32 blocks of 4 KiB, from block `first` on, each a range of its own.
fn send_blocks(rig: &mut Rig, kind: u32, first: usize) -> Sent {
    let ranges: Vec<u8> = (first..first + RANGES).flat_map(|block| range(block as u64 * 8, 8, 0)).collect();
    rig.send(&[&header(kind, 0), &ranges], &[1])
}

/// Two queues of a disk. What the second one does is no turn of the first.
fn two_queues(backend: Arc<dyn Backend>, ring: Ring) -> (Rig, Rig) {
    let disk = Arc::new(Blk::new(backend, Options { queues: 2, ..Options::default() }).unwrap());
    (Rig::with(disk.clone(), ring, u64::MAX, 0), Rig::with(disk, Ring::SPLIT, u64::MAX, 1))
}

/// Zeroes 8,000 blocks by 250 requests in flight together, writes them anew, and reads one by 250 more requests.
fn zeroes_write_and_read(backend: Arc<dyn Backend>, in_order: bool, name: &str) {
    const REQUESTS: usize = 250;
    const BYTES: usize = RANGES * 4096;
    let (mut rig, mut observer) = two_queues(backend, Ring { in_order, ..LARGE });
    let data = |request: usize| pattern(BYTES, request as u64);
    let sector = |request: usize| (request * BYTES / SECTOR) as u64;
    for request in 0..REQUESTS {
        observer.write(sector(request), &data(request));
    }
    let sent: Vec<_> =
        (0..REQUESTS).map(|request| send_blocks(&mut rig, WRITE_ZEROES, request * RANGES)).collect();
    for (request, sent) in sent.into_iter().enumerate() {
        assert_eq!(rig.wait(sent).status(), OK);
        let found = observer.read(sector(request), BYTES);
        assert!(found.iter().all(|&byte| byte == 0), "{name}: {request} is not done");
    }
    for request in 0..REQUESTS {
        observer.write(sector(request), &data(request));
    }
    let sent: Vec<_> = (0..REQUESTS).map(|_| rig.send(&[&header(IN, 0)], &[512, 1])).collect();
    for sent in sent {
        assert_eq!(rig.wait(sent).status(), OK);
    }
    for request in 0..REQUESTS {
        let found = observer.read(sector(request), BYTES);
        assert!(found == data(request), "{name}: {request} was changed later");
    }
}

#[test]
fn requests_of_many_ranges_are_done_when_they_are_answered() {
    let bytes = 250 * RANGES * 4096;
    zeroes_write_and_read(slow(bytes, 1, |_| 0), false, "one at a time");
    zeroes_write_and_read(slow(bytes, 1000, |_| 0), true, "at once");
    zeroes_write_and_read(slow(bytes, 7, |n| (n % 4) as u32), false, "some at once, some later");
    zeroes_write_and_read(slow(bytes, 1000, |n| (n % 9) as u32 + 1), true, "all later");
    zeroes_write_and_read(Arc::new(Memory::new(bytes as u64, false).unwrap()), false, "memory");
}

#[test]
fn requests_of_many_ranges_are_done_in_a_file_when_they_are_answered() {
    let path = format!("/dev/shm/exitless-blk-{}-ranges", std::process::id());
    std::fs::File::create(&path).unwrap().set_len(250 * (RANGES as u64) * 4096).unwrap();
    for engine in [Engine::Uring, Engine::Inline] {
        let file = File::open(Path::new(&path), FileOptions { engine, ..FileOptions::default() });
        zeroes_write_and_read(Arc::new(file.unwrap()), engine == Engine::Uring, &format!("{engine:?}"));
    }
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn a_range_that_fails_ends_its_request_and_nothing_follows() {
    for failing in [0, 2, 31] {
        let fates = move |kind, offset, _| Fate {
            looks: 1,
            fails: kind == OpKind::Discard && offset == failing * 4096,
        };
        let storage = Arc::new(Slow::new(vec![0; 1 << 20], 4, Box::new(fates)));
        let mut rig = Rig::with(write_through(storage.clone()), Ring::SPLIT, u64::MAX, 0);
        let sent = send_blocks(&mut rig, DISCARD, 0);
        assert_eq!(rig.wait(sent).status(), IO_ERROR);
        assert_eq!(storage.operations(), failing + 1);
        for _ in 0..300 {
            rig.read(0, 512);
        }
        assert_eq!(storage.operations(), failing + 1 + 300, "in its slot, nothing was left of it");
    }
}

#[test]
fn a_queue_is_drained_of_all_that_follows() {
    for looks in [0, 3] {
        let storage = slow(1 << 20, 2, move |_| looks);
        let mut rig = Rig::with(write_through(storage.clone()), Ring::SPLIT, u64::MAX, 0);
        let sent: Vec<_> = (0..8).map(|i| send_blocks(&mut rig, WRITE_ZEROES, i * RANGES)).collect();
        rig.turn();
        rig.drain();
        assert_eq!(storage.operations(), 8 * (RANGES as u64 + 1), "the ranges and a flush of each");
        for sent in sent {
            assert_eq!(rig.wait(sent).status(), OK);
        }
        assert_eq!(storage.operations(), 8 * (RANGES as u64 + 1));
    }
}

#[test]
fn a_write_is_durable_when_it_is_answered_if_write_back_is_off() {
    // Writes of a block, and among them requests that zero 32 of them, in other places.
    const WRITES: usize = 60;
    let (written, zeroed) = (|i: usize| i * RANGES * 4096, |i: usize| (WRITES + i) * RANGES);
    for (in_flight_max, least, spread) in [(1, 0, 1), (1, 2, 1), (1000, 3, 40), (1000, 0, 3)] {
        let looks = move |n| least + (n % spread) as u32;
        let storage = slow(2 * WRITES * RANGES * 4096, in_flight_max, looks);
        let mut rig = Rig::with(write_through(storage.clone()), LARGE, u64::MAX, 0);
        for round in 0..5 {
            let data = |i: usize| pattern(4096, (i + 100 * round) as u64);
            let mut sent = Vec::new();
            for i in 0..WRITES {
                let sector = (written(i) / SECTOR) as u64;
                sent.push(rig.send(&[&header(OUT, sector), &data(i)], &[1]));
                if i % (round + 2) == 0 {
                    send_blocks(&mut rig, WRITE_ZEROES, zeroed(i));
                }
            }
            for (i, sent) in sent.into_iter().enumerate() {
                assert_eq!(rig.wait(sent).status(), OK);
                assert!(storage.durable(written(i), 4096) == data(i), "{i} with {in_flight_max} at once");
            }
            rig.drain();
            rig.turn();
            rig.forget();
        }
    }
}

#[test]
fn a_turn_zeroes_no_more_than_a_turn_may_move() {
    /// What one step may do beyond the budget, and how much of that a turn may be late to notice.
    const MIB_PER_TURN_MAX: usize = 8;
    let budget = Budget { requests: 256, bytes: 512 << 10 };
    // Many ranges in few requests, in many, and few that are long.
    for (requests, ranges, mib_each) in [(4, 32, 16), (128, 1, 16), (1, 2, 1024)] {
        let mib = requests * ranges * mib_each;
        let (mut rig, mut observer) =
            two_queues(Arc::new(Memory::new(mib as u64 * MIB, false).unwrap()), LARGE);
        for i in 0..mib {
            observer.write(i as u64 * MIB / 512, &[1; 512]);
        }
        let sectors = (mib_each as u64 * MIB / 512) as u32;
        let sent: Vec<_> = (0..requests)
            .map(|request| {
                let ranges: Vec<u8> = (request * ranges..(request + 1) * ranges)
                    .flat_map(|i| range(i as u64 * u64::from(sectors), sectors, 1))
                    .collect();
                rig.send(&[&header(WRITE_ZEROES, 0), &ranges], &[1])
            })
            .collect();
        let mut zeroed = || (0..mib).filter(|&i| observer.read(i as u64 * MIB / 512, 512)[0] == 0).count();
        for turn in 1..=4 {
            rig.now = rig.now.plus_ns(1000);
            let work = rig.poller.poll(rig.now, budget);
            let zeroed = zeroed();
            assert!(
                zeroed > 0 && zeroed <= turn * MIB_PER_TURN_MAX,
                "{zeroed} MiB of {mib} in {turn} turns, {requests} requests"
            );
            assert!(work.more || rig.poller.arm(), "the thread does not go to sleep over it");
            rig.poller.disarm();
        }
        for sent in sent {
            assert_eq!(rig.wait(sent).status(), OK);
        }
        assert_eq!(zeroed(), mib);
    }
}

/// A request of the property test.
#[derive(Clone, Debug)]
enum Ask {
    Write {
        sector: u64,
        sectors: u64,
    },
    Read {
        sector: u64,
        sectors: u64,
    },
    Zero {
        kind: u32,
        flags: u32,
        ranges: Vec<(u64, u32)>,
    },
    Flush,
    /// Write-back or not.
    Mode(bool),
    /// So many turns of the queue.
    Turns(usize),
}

const DISK_SECTORS: u64 = 4096;

fn any_ask() -> impl Strategy<Value = Ask> {
    let place = || (0..DISK_SECTORS - 16, 1..16u64);
    let ranges = || vec((0..DISK_SECTORS - 9, 0..3u32), 1..=RANGES);
    prop_oneof![
        3 => place().prop_map(|(sector, sectors)| Ask::Write { sector, sectors }),
        2 => place().prop_map(|(sector, sectors)| Ask::Read { sector, sectors }),
        4 => (any::<bool>(), ranges()).prop_map(|(unmap, ranges)| {
            Ask::Zero { kind: WRITE_ZEROES, flags: unmap.into(), ranges }
        }),
        2 => ranges().prop_map(|ranges| Ask::Zero { kind: DISCARD, flags: 0, ranges }),
        1 => Just(Ask::Flush),
        1 => any::<bool>().prop_map(Ask::Mode),
        2 => (1..20usize).prop_map(Ask::Turns),
    ]
}

/// A driver with a model of the disk. Sectors that a request in flight is about are touched by no other.
struct Checker {
    rig: Rig,
    storage: Arc<Slow>,
    write_through: bool,
    /// What fills each sector.
    model: Vec<u8>,
    /// By sector, as `model`: what was acknowledged as durable, or covered by a flush that was.
    durable: Vec<Option<u8>>,
    busy: Vec<bool>,
    pending: HashMap<u16, (Sent, Ask, u8)>,
    fill: u8,
}

impl Checker {
    fn sectors(ask: &Ask) -> Vec<usize> {
        let span = |sector: u64, sectors: u64| (sector as usize)..((sector + sectors) as usize);
        match ask {
            Ask::Write { sector, sectors } | Ask::Read { sector, sectors } => {
                span(*sector, *sectors).collect()
            }
            Ask::Zero { ranges, .. } => ranges.iter().flat_map(|&(at, n)| span(at, n.into())).collect(),
            Ask::Flush | Ask::Mode(_) | Ask::Turns(_) => Vec::new(),
        }
    }

    fn send(&mut self, ask: Ask) {
        let sectors = Self::sectors(&ask);
        if sectors.iter().any(|&sector| self.busy[sector]) {
            return;
        }
        self.fill = self.fill % 250 + 1;
        let fill = self.fill;
        let sent = match &ask {
            Ask::Turns(turns) => return (0..*turns).for_each(|_| self.turn()),
            Ask::Write { sector, sectors } => {
                let data = vec![fill; *sectors as usize * SECTOR];
                self.rig.try_send(&[&header(OUT, *sector), &data], &[1], 0)
            }
            Ask::Read { sector, sectors } => {
                self.rig.try_send(&[&header(IN, *sector)], &[*sectors as usize * SECTOR, 1], 0)
            }
            Ask::Zero { kind, flags, ranges } => {
                let ranges: Vec<u8> = ranges.iter().flat_map(|&(at, n)| range(at, n, *flags)).collect();
                self.rig.try_send(&[&header(*kind, 0), &ranges], &[1], 0)
            }
            Ask::Flush => return self.flush(),
            Ask::Mode(writeback) => return self.set_mode(*writeback),
        };
        let Some(sent) = sent else { return };
        for sector in sectors {
            self.busy[sector] = true;
        }
        self.pending.insert(sent.id, (sent, ask, fill));
    }

    fn flush(&mut self) {
        // Room in the ring.
        while self.pending.len() > 60 {
            self.turn();
        }
        if self.rig.status(FLUSH, 0, &[], 0) == OK {
            self.all_durable();
        }
        self.collect();
    }

    fn set_mode(&mut self, writeback: bool) {
        self.rig.disk.write_config(WRITEBACK_OFFSET, &[writeback.into()]).unwrap();
        if !self.write_through && !writeback {
            self.all_durable();
        }
        self.write_through = !writeback;
    }

    /// What was acknowledged so far has become durable.
    fn all_durable(&mut self) {
        for sector in 0..self.model.len() {
            if !self.busy[sector] {
                self.durable[sector] = Some(self.model[sector]);
                self.check_durable(sector);
            }
        }
    }

    fn turn(&mut self) {
        self.rig.turn();
        self.collect();
    }

    fn collect(&mut self) {
        let back: Vec<u16> =
            self.pending.iter().filter(|(_, (sent, ..))| self.rig.is_back(sent)).map(|(&id, _)| id).collect();
        for id in back {
            let (sent, ask, fill) = self.pending.remove(&id).unwrap();
            let answer = self.rig.wait(sent);
            self.answered(&ask, fill, &answer);
        }
    }

    fn answered(&mut self, ask: &Ask, fill: u8, answer: &Answer) {
        let (ok, sectors) = (answer.status() == OK, Self::sectors(ask));
        for &sector in &sectors {
            self.busy[sector] = false;
        }
        let after = match ask {
            Ask::Read { .. } => {
                for (i, &sector) in sectors.iter().enumerate() {
                    let found = &answer.data()[i * SECTOR..(i + 1) * SECTOR];
                    assert!(!ok || found.iter().all(|&byte| byte == self.model[sector]), "sector {sector}");
                }
                return;
            }
            Ask::Write { .. } => fill,
            _ => 0,
        };
        let durable = self.write_through && !matches!(ask, Ask::Zero { kind: DISCARD, .. });
        for sector in sectors {
            // Of one that failed, what was found is what stays.
            let now = if ok { after } else { self.storage.written(sector * SECTOR, SECTOR)[0] };
            assert!(
                self.storage.written(sector * SECTOR, SECTOR).iter().all(|&byte| byte == now),
                "sector {sector} is not done when {ask:?} is answered"
            );
            self.model[sector] = now;
            self.durable[sector] = (ok && durable).then_some(now);
            self.check_durable(sector);
        }
    }

    fn check_durable(&self, sector: usize) {
        if let (Some(byte), false) = (self.durable[sector], self.busy[sector]) {
            assert_eq!(
                self.storage.durable(sector * SECTOR, 1)[0],
                byte,
                "sector {sector} after a power cut"
            );
        }
    }

    /// Ends what is under way, and looks at everything.
    fn finish(mut self) {
        let mut turns = 0;
        while !self.pending.is_empty() {
            self.turn();
            turns += 1;
            assert!(turns < 1_000_000, "{} requests do not come back", self.pending.len());
        }
        // With a write-through cache, slots that had writes before the switch are flushed once more.
        self.set_mode(true);
        let operations = self.storage.operations();
        for _ in 0..300 {
            self.rig.status(IN, 0, &[], SECTOR);
        }
        assert_eq!(self.storage.operations(), operations + 300, "nothing is done later");
        for (sector, model) in self.model.iter().enumerate() {
            let found = self.storage.written(sector * SECTOR, SECTOR);
            assert!(found.iter().all(|byte| byte == model), "sector {sector}");
            self.check_durable(sector);
        }
        self.rig.drain();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn requests_of_any_kind_do_all_that_they_say_and_nothing_later(
        asks in vec(any_ask(), 1..120),
        looks in prop_oneof![Just(vec![0]), vec(0..5u32, 1..20), vec(0..50u32, 1..60)],
        fails in vec(prop::bool::weighted(0.02), 1..300),
        in_flight_max in prop_oneof![Just(1), 1..20usize, Just(1000)],
        write_through in any::<bool>(),
        packed in any::<bool>(),
        in_order in any::<bool>(),
    ) {
        let mut count = 0;
        let fates = move |_, _, _| {
            count += 1;
            Fate { looks: looks[count % looks.len()], fails: fails[count % fails.len()] }
        };
        let sectors = DISK_SECTORS as usize;
        let storage = Arc::new(Slow::new(vec![0xFF; sectors * SECTOR], in_flight_max, Box::new(fates)));
        let disk = Arc::new(Blk::new(storage.clone(), Options::default()).unwrap());
        disk.write_config(WRITEBACK_OFFSET, &[u8::from(!write_through)]).unwrap();
        let ring = if packed { Ring::PACKED } else { Ring::SPLIT };
        let mut checker = Checker {
            rig: Rig::with(disk, Ring { in_order, ..ring }, u64::MAX, 0),
            storage,
            write_through,
            model: vec![0xFF; sectors],
            durable: vec![Some(0xFF); sectors],
            busy: vec![false; sectors],
            pending: HashMap::new(),
            fill: 0,
        };
        asks.into_iter().for_each(|ask| checker.send(ask));
        checker.finish();
    }
}

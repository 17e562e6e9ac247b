//! The whole device through real rings: every request type, every refusal, what the configuration space says.
#![allow(clippy::unwrap_used, reason = "tests")]

mod fake;

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use blk::backends::{memory, null::Null};
use blk::config::features;
use blk::{
    Backend, BackendError, Blk, Channel, ChannelBuilder, Done, Geometry, Op, OpKind, Options, RateLimit,
    ResizeError, Status,
};
use fake::{
    BUDGET, DISCARD, FLUSH, GET_ID, IN, IO_ERROR, OK, OUT, Rig, Ring, SECURE_ERASE, UNSUPPORTED,
    WRITE_ZEROES, header, pattern, range,
};
use reactor::Ticks;
use virtio::Device;
use virtio::ring::Chains;

const MIB: u64 = 1 << 20;
const SECTORS: u64 = 16 * MIB / 512;

fn memory_disk() -> Arc<memory::Memory> {
    Arc::new(memory::Memory::new(16 * MIB, false).unwrap())
}

#[test]
fn data_come_back_through_every_kind_of_ring() {
    for ring in Ring::all() {
        let mut rig = Rig::new(memory_disk(), ring);
        for round in 0..200u64 {
            let data = pattern(512 * (1 + round as usize % 9), round);
            let sector = (round * 37) % (SECTORS - 16);
            rig.write(sector, &data);
            assert_eq!(rig.read(sector, data.len()), data, "{ring:?} round {round}");
        }
    }
}

#[test]
fn a_full_ring_of_requests_is_answered_in_bursts() {
    for ring in Ring::all() {
        let mut rig = Rig::new(memory_disk(), ring);
        let mut sent = Vec::new();
        while let Some(request) = rig.try_send(&[&header(OUT, sent.len() as u64), &pattern(512, 7)], &[1], 0)
        {
            sent.push(request);
        }
        assert!(sent.len() >= usize::from(ring.size) / 3);
        for request in sent {
            assert_eq!(rig.wait(request).status(), OK);
        }
        assert_eq!(rig.guest.ring.free(), usize::from(ring.size));
    }
}

#[test]
fn layout_of_buffers_does_not_matter() {
    let mut rig = Rig::new(memory_disk(), Ring::SPLIT);
    let data = pattern(1024, 3);
    let mut whole = header(OUT, 8).to_vec();
    whole.extend(&data);
    // Header and data in one buffer, in bytes, cut within the header, cut within a sector.
    assert_eq!(rig.ask(&[&whole], &[1]).status(), OK);
    assert_eq!(rig.read(8, 1024), data);
    for cuts in [&[1, 2, 3][..], &[15, 17], &[8, 16, 100, 700], &[16, 528]] {
        let data = pattern(1024, cuts[0] as u64 + 10);
        let mut whole = header(OUT, 24).to_vec();
        whole.extend(&data);
        let mut parts = Vec::new();
        let mut from = 0;
        for &cut in cuts {
            parts.push(&whole[from..cut]);
            from = cut;
        }
        parts.push(&whole[from..]);
        assert_eq!(rig.ask(&parts, &[1]).status(), OK, "{cuts:?}");
        let mut head = header(IN, 24).to_vec();
        let tail = head.split_off(5);
        // Data and status in one buffer; status at the end of a buffer of data.
        assert_eq!(rig.ask(&[&head, &tail], &[1025]).data(), data, "{cuts:?}");
        assert_eq!(rig.ask(&[&header(IN, 24)], &[3, 509, 513]).data(), data, "{cuts:?}");
    }
}

#[test]
fn requests_out_of_bounds_fail_alone() {
    let mut rig = Rig::new(memory_disk(), Ring::PACKED);
    let sector = [7; 512];
    assert_eq!(rig.status(OUT, SECTORS - 1, &sector, 0), OK, "the last sector");
    assert_eq!(rig.status(IN, SECTORS - 1, &[], 512), OK);
    for at in [SECTORS, SECTORS + 1, u64::MAX / 512, u64::MAX / 512 + 1, u64::MAX] {
        assert_eq!(rig.status(OUT, at, &sector, 0), IO_ERROR, "{at}");
        assert_eq!(rig.status(IN, at, &[], 512), IO_ERROR, "{at}");
    }
    assert_eq!(rig.status(IN, SECTORS - 1, &[], 1024), IO_ERROR, "one sector too long");
    for len in [1, 511, 513, 1000] {
        assert_eq!(rig.status(OUT, 0, &sector.repeat(2)[..len], 0), IO_ERROR, "{len} bytes");
        assert_eq!(rig.status(IN, 0, &[], len), IO_ERROR, "{len} bytes");
    }
    assert_eq!(rig.status(IN, 0, &[], 0), OK, "nothing is read without fault");
    assert_eq!(rig.status(OUT, SECTORS, &[], 0), OK);
    assert_eq!(rig.read(0, 512), [0; 512], "nothing of what was refused was written");
}

#[test]
fn malformed_chains_come_back_and_the_queue_goes_on() {
    for ring in [Ring::SPLIT, Ring::PACKED, Ring { indirect: true, ..Ring::SPLIT }] {
        let mut rig = Rig::new(memory_disk(), ring);
        assert_eq!(rig.ask(&[&header(IN, 0)], &[]).written, 0, "no room for a status");
        assert_eq!(rig.ask(&[&header(OUT, 0), &[1; 512]], &[]).written, 0);
        assert_eq!(rig.ask(&[&header(FLUSH, 0)], &[]).written, 0);
        assert_eq!(rig.ask(&[&[0; 15]], &[1]).status(), IO_ERROR, "no room for a header");
        assert_eq!(rig.ask(&[], &[513]).status(), IO_ERROR, "no header at all");
        assert_eq!(rig.read(0, 512), [0; 512]);
        assert_eq!(rig.disk.counters().errors, 5);
        assert!(rig.handle.error().is_none());
    }
}

#[test]
fn unknown_requests_are_unsupported() {
    let mut rig = Rig::new(memory_disk(), Ring::SPLIT);
    for kind in [2, 3, 5, 7, 9, 10, 12, 15, 24, 0x8000_0000, u32::MAX] {
        assert_eq!(rig.status(kind, 0, &[], 0), UNSUPPORTED, "{kind}");
    }
    assert_eq!(rig.status(SECURE_ERASE, 0, &range(0, 8, 0), 0), UNSUPPORTED);
    assert_eq!(rig.status(FLUSH, 0, &[], 0), UNSUPPORTED, "memory has no cache");
}

#[test]
fn the_serial_fills_what_room_there_is() {
    let options = Options { serial: "exitless-0".into(), ..Options::default() };
    let disk = Arc::new(Blk::new(memory_disk(), options).unwrap());
    let mut rig = Rig::with(disk, Ring::SPLIT, u64::MAX, 0);
    assert_eq!(rig.request(GET_ID, 0, &[], 20).data(), b"exitless-0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(rig.request(GET_ID, 0, &[], 4).data(), b"exit");
    let long = rig.request(GET_ID, 0, &[], 30);
    assert_eq!((&long.data()[..10], long.status()), (&b"exitless-0"[..], OK));
    assert_eq!(rig.status(GET_ID, 0, &[], 0), OK);
}

#[test]
fn ranges_are_zeroed_and_discarded() {
    let mut rig = Rig::new(memory_disk(), Ring::SPLIT);
    let data = pattern(64 << 10, 9);
    for (kind, flags) in [(DISCARD, 0), (WRITE_ZEROES, 0), (WRITE_ZEROES, 1)] {
        rig.write(0, &data);
        let ranges =
            [range(1, 3, flags), range(16, 0, flags), range(20, 40, flags), range(127, 1, flags)].concat();
        assert_eq!(rig.status(kind, 0, &ranges, 0), OK);
        let mut expected = data.clone();
        for (sector, sectors) in [(1, 3), (20, 40), (127, 1)] {
            expected[sector * 512..(sector + sectors) * 512].fill(0);
        }
        assert_eq!(rig.read(0, data.len()), expected, "request type {kind}");
    }
}

#[test]
fn ranges_are_checked_before_any_is_touched() {
    let mut rig = Rig::new(memory_disk(), Ring::SPLIT);
    rig.write(0, &[5; 512]);
    let good = range(0, 1, 0);
    let with = |bad: [u8; 16]| [good, bad].concat();
    for (bad, status) in [
        (range(SECTORS, 1, 0), IO_ERROR),
        (range(u64::MAX, 1, 0), IO_ERROR),
        (range(SECTORS - 1, 2, 0), IO_ERROR),
        (range(0, u32::MAX, 0), IO_ERROR),
        (range(0, 1, 2), UNSUPPORTED),
        (range(0, 1, 0x8000_0000), UNSUPPORTED),
    ] {
        assert_eq!(rig.status(DISCARD, 0, &with(bad), 0), status);
        assert_eq!(rig.status(WRITE_ZEROES, 0, &with(bad), 0), status);
    }
    assert_eq!(
        rig.status(DISCARD, 0, &with(range(0, 1, 1)), 0),
        UNSUPPORTED,
        "unmap means nothing to a discard"
    );
    assert_eq!(rig.status(DISCARD, 0, &good.repeat(33), 0), IO_ERROR, "too many");
    assert_eq!(rig.status(DISCARD, 0, &good[..15], 0), IO_ERROR);
    assert_eq!(rig.status(DISCARD, 0, &[], 0), IO_ERROR, "none");
    assert_eq!(rig.read(0, 512), [5; 512]);
    assert_eq!(rig.status(DISCARD, 0, &good.repeat(32), 0), OK);
    assert_eq!(rig.read(0, 512), [0; 512]);
}

#[test]
fn a_read_only_disk_is_not_written() {
    let options = Options { read_only: true, ..Options::default() };
    let disk = Arc::new(Blk::new(memory_disk(), options).unwrap());
    assert_ne!(disk.features() & features::RO, 0);
    let mut rig = Rig::with(disk, Ring::SPLIT, u64::MAX, 0);
    assert_eq!(rig.status(OUT, 0, &[1; 512], 0), IO_ERROR);
    assert_eq!(rig.status(DISCARD, 0, &range(0, 1, 0), 0), IO_ERROR);
    assert_eq!(rig.status(WRITE_ZEROES, 0, &range(0, 1, 0), 0), IO_ERROR);
    assert_eq!(rig.read(0, 512), [0; 512]);
}

#[test]
fn a_long_request_is_spread_over_turns() {
    let mut rig = Rig::new(memory_disk(), Ring::SPLIT);
    let data = pattern(3 << 20, 1);
    let sent = rig.send(&[&header(OUT, 0), &data], &[1]);
    rig.turn();
    assert!(!rig.is_back(&sent), "3 MiB are not copied in one go");
    assert!(rig.poller.arm(), "and the thread does not go to sleep over it");
    assert_eq!(rig.wait(sent).status(), OK);
    assert_eq!(rig.read(0, data.len()), data);
}

#[test]
fn a_drained_queue_leaves_what_it_did_not_take() {
    let mut rig = Rig::new(memory_disk(), Ring::SPLIT);
    let long = rig.send(&[&header(OUT, 0), &pattern(1 << 20, 1)], &[1]);
    rig.turn();
    let later = rig.send(&[&header(IN, 0)], &[512, 1]);
    rig.drain();
    assert_eq!(rig.handle.counters().requests, 1, "drained: what was taken is done, nothing new is taken");
    assert_eq!(rig.wait(long).status(), OK);
    assert_eq!(rig.wait(later).status(), OK, "whoever serves the ring next finds it");
}

#[test]
fn resizing_shows_on_all_queues_and_tells_the_driver() {
    let disk = Arc::new(Blk::new(memory_disk(), Options { queues: 2, ..Options::default() }).unwrap());
    let told = Arc::new(AtomicU32::new(0));
    let listener = told.clone();
    disk.set_config_listener(Some(Arc::new(move || {
        listener.fetch_add(1, Ordering::Relaxed);
    })));
    let mut first = Rig::with(disk.clone(), Ring::SPLIT, u64::MAX, 0);
    let mut second = Rig::with(disk.clone(), Ring::PACKED, u64::MAX, 1);
    assert_eq!(first.status(IN, SECTORS, &[], 512), IO_ERROR);
    assert_eq!(disk.resize(Some(32 * MIB)).unwrap(), 32 * MIB);
    assert_eq!(disk.config()[..8], (2 * SECTORS).to_le_bytes());
    first.write(SECTORS, &[9; 512]);
    assert_eq!(second.read(SECTORS, 512), [9; 512]);
    disk.resize(Some(16 * MIB)).unwrap();
    assert_eq!(second.status(IN, SECTORS, &[], 512), IO_ERROR);
    disk.resize(Some(32 * MIB)).unwrap();
    assert_eq!(first.read(SECTORS, 512), [0; 512], "what was cut off does not come back");
    assert_eq!(told.load(Ordering::Relaxed), 3);
    disk.resize(None).unwrap();
    assert_eq!(told.load(Ordering::Relaxed), 3, "nothing changed, nobody is told");
    assert!(disk.resize(Some(1 << 60)).is_err());
}

#[test]
fn growing_loses_nothing_and_no_size_is_less_than_a_block() {
    let options = Options { logical_block_bytes: Some(4096), ..Options::default() };
    let disk = Blk::new(memory_disk(), options).unwrap();
    let refused = disk.grow(16 * MIB - 1).unwrap_err();
    assert!(matches!(refused, ResizeError::Loses { from, to } if (from, to) == (16 * MIB, 16 * MIB - 512)));
    assert_eq!(
        disk.grow(8 * MIB).unwrap_err().to_string(),
        "going from 16777216 to 8388608 bytes would destroy the last 8388608 bytes and what is in them"
    );
    for bytes in [0, 64, 4095] {
        let less = format!("a size of {} bytes is less than one block, which has 4096", bytes / 512 * 512);
        assert_eq!(disk.grow(bytes).unwrap_err().to_string(), less);
        assert_eq!(disk.resize(Some(bytes)).unwrap_err().to_string(), less);
    }
    assert_eq!(disk.bytes(), 16 * MIB, "nothing was changed");
    assert_eq!(disk.grow(16 * MIB).unwrap(), 16 * MIB);
    assert_eq!(disk.grow(17 * MIB).unwrap(), 17 * MIB);
    assert_eq!(disk.resize(Some(MIB)).unwrap(), MIB);
}

#[test]
fn limits_hold_back_requests_and_say_until_when() {
    let rate = RateLimit { iops: NonZeroU64::new(1000), bytes_per_s: None, burst_ms: 0 };
    let disk = Arc::new(Blk::new(Arc::new(Null::new(MIB)), Options { rate, ..Options::default() }).unwrap());
    let mut rig = Rig::with(disk.clone(), Ring::SPLIT, u64::MAX, 0);
    // One request is the burst of a millisecond, one overdraws it, the third waits until that is worked off.
    let sent: Vec<_> = (0..3).map(|_| rig.send(&[&header(IN, 0)], &[512, 1])).collect();
    let start = rig.now.plus_ns(1000);
    rig.turn();
    assert_eq!(rig.turn().wake_at, None);
    assert_eq!(sent.iter().map(|sent| rig.is_back(sent)).collect::<Vec<_>>(), [true, true, false]);
    let work = rig.turn();
    assert_eq!((work.done, work.wake_at), (0, Some(start.plus_ns(1_000_000))));
    assert!(!rig.poller.arm(), "the thread may sleep although a request waits");
    rig.poller.disarm();
    let work = rig.poller.poll(start.plus_ns(1_000_000), BUDGET);
    assert_eq!(work.done, 2, "taken and answered");
    disk.set_rate_limit(RateLimit::NONE);
    assert_eq!(rig.poller.poll(Ticks(u64::MAX), BUDGET).wake_at, None);
    assert!(disk.counters().throttled > 0);
}

/// Keeps a record of what reaches storage.
struct Recorder(Arc<std::sync::Mutex<Vec<OpKind>>>);

impl Backend for Recorder {
    fn geometry(&self) -> Geometry {
        Geometry { flush: true, write_zeroes: true, ..Geometry::new(MIB) }
    }

    fn channel(&self, _: &Arc<virtio::Memory>, _: u16) -> Result<ChannelBuilder, BackendError> {
        let record = self.0.clone();
        Ok(Box::new(|| Ok(Box::new(Self(record)))))
    }

    fn resize(&self, _: Option<u64>) -> Result<Geometry, BackendError> {
        Ok(self.geometry())
    }

    fn flush(&self) -> Result<(), BackendError> {
        Ok(())
    }
}

impl Channel for Recorder {
    // Takes one operation at a time, and fails writes of the last sector.
    fn submit(&mut self, ops: &mut Vec<Op>, _: &Chains, done: &mut Vec<Done>) {
        let op = ops.remove(0);
        self.0.lock().unwrap().push(op.kind);
        let bad = op.kind == OpKind::Write && op.offset == MIB - 512;
        done.push(Done { token: op.token, status: if bad { Status::IoError } else { Status::Ok } });
    }

    fn reap(&mut self, _: &Chains, _: &mut Vec<Done>) {}

    fn in_flight(&self) -> usize {
        0
    }
}

#[test]
fn a_write_is_flushed_where_the_driver_counts_on_it() {
    let (with_flush, with_wce) = (features::FLUSH, features::FLUSH | features::CONFIG_WCE);
    // Features, what the driver writes to the cache mode, whether writes are flushed.
    for (features, mode, flushed) in [
        (with_flush, None, false),
        (with_wce, None, false),
        (with_wce, Some(1), false),
        (with_wce, Some(0), true),
        (0, None, true),
        (features::CONFIG_WCE, None, true),
    ] {
        let record = Arc::default();
        let disk = Arc::new(Blk::new(Arc::new(Recorder(Arc::clone(&record))), Options::default()).unwrap());
        if let Some(mode) = mode {
            disk.write_config(32, &[mode]).unwrap();
        }
        let mut rig = Rig::with(disk, Ring::SPLIT, features, 0);
        rig.write(0, &[1; 512]);
        assert_eq!(rig.status(WRITE_ZEROES, 0, &[range(0, 1, 0), range(4, 1, 0)].concat(), 0), OK);
        assert_eq!(rig.status(OUT, MIB / 512 - 1, &[1; 512], 0), IO_ERROR);
        rig.read(0, 512);
        let zeroes = OpKind::WriteZeroes { unmap: false };
        let expected = if flushed {
            vec![OpKind::Write, OpKind::Flush, zeroes, zeroes, OpKind::Flush, OpKind::Write, OpKind::Read]
        } else {
            vec![OpKind::Write, zeroes, zeroes, OpKind::Write, OpKind::Read]
        };
        assert_eq!(*record.lock().unwrap(), expected, "{features:#x}, {mode:?}");
    }
}

#[test]
fn a_channel_that_takes_little_is_offered_the_rest_again() {
    let record = Arc::default();
    let disk = Arc::new(Blk::new(Arc::new(Recorder(Arc::clone(&record))), Options::default()).unwrap());
    let mut rig = Rig::with(disk, Ring::SPLIT, u64::MAX, 0);
    let sent: Vec<_> = (0..20).map(|i| rig.send(&[&header(IN, i)], &[512, 1])).collect();
    rig.turn();
    assert!(rig.poller.arm(), "nothing in flight would wake the thread for the rest");
    rig.poller.disarm();
    for request in sent {
        assert_eq!(rig.wait(request).status(), OK);
    }
    let ranges: Vec<u8> = (0..32).flat_map(|i| range(i, 1, 0)).collect();
    assert_eq!(rig.status(WRITE_ZEROES, 0, &ranges, 0), OK);
    assert_eq!(record.lock().unwrap().len(), 52);
    let left = rig.send(&[&header(IN, 0)], &[512, 1]);
    let behind = rig.send(&[&header(IN, 0)], &[512, 1]);
    rig.turn();
    rig.drain();
    assert!(rig.wait(left).status() == OK && rig.wait(behind).status() == OK, "drained to the last");
}

/// Storage that is not there when it is needed.
struct Broken;

impl Backend for Broken {
    fn geometry(&self) -> Geometry {
        Geometry { flush: true, ..Geometry::new(MIB) }
    }

    fn channel(&self, _: &Arc<virtio::Memory>, _: u16) -> Result<ChannelBuilder, BackendError> {
        Ok(Box::new(|| Err(BackendError("opening a channel: broken on purpose".into()))))
    }

    fn resize(&self, _: Option<u64>) -> Result<Geometry, BackendError> {
        Err(BackendError("resizing: broken on purpose".into()))
    }
}

#[test]
fn without_storage_every_request_fails() {
    let mut rig = Rig::new(Arc::new(Broken), Ring::PACKED);
    assert_eq!(rig.status(IN, 0, &[], 512), IO_ERROR);
    assert_eq!(rig.status(OUT, 0, &[1; 512], 0), IO_ERROR);
    assert_eq!(rig.status(FLUSH, 0, &[], 0), IO_ERROR);
    assert_eq!(rig.status(GET_ID, 0, &[], 20), OK);
    assert!(rig.disk.resize(None).is_err());
}

#[test]
fn state_goes_to_another_instance_of_the_same_disk() {
    let disk = Blk::new(Arc::new(Null::new(MIB)), Options::default()).unwrap();
    disk.write_config(32, &[0]).unwrap();
    let twin = Blk::new(Arc::new(Null::new(MIB)), Options::default()).unwrap();
    assert_eq!(twin.config()[32], 1);
    twin.restore(&disk.save()).unwrap();
    assert_eq!(twin.config()[32], 0);
    twin.reset();
    assert_eq!(twin.config()[32], 1, "a reset driver finds the default");
    let other = Blk::new(Arc::new(Null::new(2 * MIB)), Options::default()).unwrap();
    assert!(other.restore(&disk.save()).is_err());
    assert!(other.restore(&[1, 2, 3]).is_err());
}

#[test]
fn only_the_cache_mode_can_be_written() {
    let disk = Blk::new(Arc::new(Null::new(MIB)), Options::default()).unwrap();
    for (offset, len) in [(0, 8), (31, 1), (32, 2), (33, 1), (32, 0), (u32::MAX, 1)] {
        assert!(disk.write_config(offset, &vec![0; len]).is_err(), "{len} bytes at {offset}");
    }
    disk.write_config(32, &[0]).unwrap();
}

#[test]
fn a_disk_has_whole_blocks() {
    let options = || Options { logical_block_bytes: Some(4096), ..Options::default() };
    let capacity = |disk: &Blk| u64::from_le_bytes(disk.config()[..8].try_into().unwrap());
    let disk = Blk::new(Arc::new(Null::new(MIB + 3584)), options()).unwrap();
    assert_eq!(capacity(&disk), MIB / 512);
    assert_eq!(disk.resize(Some(MIB + 4608)).unwrap(), MIB + 4096);
    assert_eq!(capacity(&disk), MIB / 512 + 8);
    assert!(Blk::new(Arc::new(Null::new(3584)), options()).is_err(), "not one block");
}

#[test]
fn impossible_options_are_refused() {
    for options in [
        Options { queues: 0, ..Options::default() },
        Options { queues: 257, ..Options::default() },
        Options { queue_size_max: 100, ..Options::default() },
        Options { serial: "x".repeat(21), ..Options::default() },
        Options { serial: "ä".into(), ..Options::default() },
        Options { logical_block_bytes: Some(8192), ..Options::default() },
    ] {
        assert!(Blk::new(Arc::new(Null::new(MIB)), options).is_err());
    }
}

/// Storage whose code has a bug.
struct Buggy;

impl Backend for Buggy {
    fn geometry(&self) -> Geometry {
        memory_disk().geometry()
    }

    fn channel(&self, _: &Arc<virtio::Memory>, _: u16) -> Result<ChannelBuilder, BackendError> {
        Ok(Box::new(|| Ok(Box::new(Self))))
    }

    fn resize(&self, _: Option<u64>) -> Result<Geometry, BackendError> {
        Ok(self.geometry())
    }
}

impl Channel for Buggy {
    fn submit(&mut self, ops: &mut Vec<Op>, _: &Chains, _: &mut Vec<Done>) {
        ops.clear();
        panic!("on purpose");
    }

    fn reap(&mut self, _: &Chains, _: &mut Vec<Done>) {}

    fn in_flight(&self) -> usize {
        0
    }
}

#[test]
fn a_queue_whose_code_panicked_is_broken_with_a_reason_and_let_go_of_with_requests_in_flight() {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    let mut rig = Rig::new(Arc::new(Buggy), Ring::SPLIT);
    rig.try_send(&[&header(IN, 0)], &[512, 1], 0).unwrap();
    let poll = catch_unwind(AssertUnwindSafe(|| rig.poller.poll(Ticks(0), BUDGET)));
    assert!(poll.is_err());
    assert!(!rig.poller.drain(Ticks(0)), "the request is lost");
    assert!(rig.poller.abandon());
    assert_eq!(rig.handle.error(), Some(virtio::RingError::Panicked));
}

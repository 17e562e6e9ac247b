//! Duties of every backend, shown for each of them through a whole device.
#![allow(clippy::unwrap_used, reason = "tests")]

mod fake;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use blk::backends::file::{Direct, Engine, File, FileOptions};
use blk::backends::qcow2::{Qcow2, Qcow2Options};
use blk::backends::{memory::Memory, null::Null};
use blk::{Backend, Blk, Options};
use fake::{
    Answer, DISCARD, FLUSH, IN, IO_ERROR, OK, OUT, Random, Rig, Ring, Sent, UNSUPPORTED, WRITE_ZEROES,
    header, pattern, range,
};
use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};

const DISK_BYTES: u64 = 4 << 20;
const SECTORS: u64 = DISK_BYTES / 512;

/// A file that is gone at the end of the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(folder: &Path) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name =
            format!("exitless-blk-{}-{}.img", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = folder.join(name);
        std::fs::File::create(&path).unwrap().set_len(DISK_BYTES).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A backend under test.
struct Case {
    name: String,
    backend: Arc<dyn Backend>,
    /// What was written can be read.
    keeps: bool,
    _file: Option<Scratch>,
}

fn file_case(folder: &str, options: FileOptions) -> Option<Case> {
    let scratch = Scratch::new(Path::new(folder));
    let name = format!("file in {folder}, {options:?}");
    match File::open(&scratch.0, options) {
        Ok(file) => Some(Case { name, backend: Arc::new(file), keeps: true, _file: Some(scratch) }),
        Err(error) if options.direct == Direct::On => {
            println!("skipped: {name}: {error}");
            None
        }
        Err(error) => panic!("{name}: {error}"),
    }
}

fn qcow2_case(folder: &str, options: Qcow2Options) -> Case {
    let scratch = Scratch::new(Path::new(folder));
    fake::format_qcow2(&scratch.0, DISK_BYTES);
    let backend = Arc::new(Qcow2::open(&scratch.0, options).unwrap());
    Case { name: format!("qcow2 in {folder}, {options:?}"), backend, keeps: true, _file: Some(scratch) }
}

/// Every backend, each on an empty disk of its own.
fn cases() -> Vec<Case> {
    let plain = |name: &str, backend: Arc<dyn Backend>, keeps| Case {
        name: name.into(),
        backend,
        keeps,
        _file: None,
    };
    let mut cases = vec![
        plain("null", Arc::new(Null::new(DISK_BYTES)), false),
        plain("memory", Arc::new(Memory::new(DISK_BYTES, false).unwrap()), true),
        plain("memory in huge pages", Arc::new(Memory::new(DISK_BYTES, true).unwrap()), true),
    ];
    for folder in [env!("CARGO_TARGET_TMPDIR"), "/dev/shm"] {
        let with = |direct, engine, sqpoll_ms, fixed_buffers| {
            file_case(
                folder,
                FileOptions { direct, engine, sqpoll_ms, fixed_buffers, ..FileOptions::default() },
            )
        };
        cases.extend(with(Direct::Auto, Engine::Auto, None, false));
        cases.extend(with(Direct::Off, Engine::Uring, None, false));
        cases.extend(with(Direct::Off, Engine::Inline, None, false));
        cases.extend(with(Direct::On, Engine::Uring, None, true));
        cases.extend(with(Direct::Auto, Engine::Uring, Some(10), false));
    }
    let direct = Qcow2Options { direct: true, ..Qcow2Options::default() };
    cases.push(qcow2_case("/dev/shm", Qcow2Options::default()));
    cases.push(qcow2_case(env!("CARGO_TARGET_TMPDIR"), Qcow2Options::default()));
    let engine = Engine::Inline;
    cases.push(qcow2_case(env!("CARGO_TARGET_TMPDIR"), Qcow2Options { engine, ..Qcow2Options::default() }));
    cases.push(qcow2_case(env!("CARGO_TARGET_TMPDIR"), direct));
    cases
}

#[test]
fn an_empty_disk_reads_as_zeros() {
    for case in cases().iter().filter(|case| case.keeps) {
        let mut rig = Rig::new(case.backend.clone(), Ring::SPLIT);
        assert_eq!(rig.read(0, 4096), [0; 4096], "{}", case.name);
        assert_eq!(rig.read(SECTORS - 3, 1536), [0; 1536], "{}", case.name);
    }
}

/// Cuts `bytes` into up to four parts at random places.
fn cut<'a>(bytes: &'a [u8], random: &mut Random) -> Vec<&'a [u8]> {
    let mut cuts: Vec<usize> =
        (0..random.below(4)).map(|_| random.below(bytes.len() as u64) as usize).collect();
    cuts.sort_unstable();
    cuts.push(bytes.len());
    let mut from = 0;
    let parts = cuts.into_iter().map(|to| &bytes[std::mem::replace(&mut from, to)..to]);
    parts.filter(|part| !part.is_empty()).collect()
}

#[test]
fn a_long_random_history_matches_a_model() {
    for case in cases() {
        let geometry = case.backend.geometry();
        let mut rig = Rig::new(case.backend.clone(), Ring::PACKED);
        let mut model = vec![0; DISK_BYTES as usize];
        let mut random = Random(42);
        for step in 0..300 {
            let sector = random.below(SECTORS);
            let sectors = 1 + random.below((SECTORS - sector).min(if step % 16 == 0 { 2048 } else { 24 }));
            let (from, len) = (sector as usize * 512, sectors as usize * 512);
            // Every fourth request is in buffers that are aligned to nothing.
            let misaligned = if random.below(4) == 0 { random.below(4096) } else { 0 };
            let context = format!("{}: step {step}, {sectors} sectors at {sector}", case.name);
            match random.below(8) {
                0..3 => {
                    let data = pattern(len, step);
                    let parts = if misaligned > 0 { cut(&data, &mut random) } else { vec![&data[..]] };
                    let head = header(OUT, sector);
                    let parts: Vec<_> = [&head[..]].into_iter().chain(parts).collect();
                    let sent = rig.try_send(&parts, &[1], misaligned).unwrap();
                    assert_eq!(rig.wait(sent).status(), OK, "{context}");
                    model[from..from + len].copy_from_slice(&data);
                }
                3 if geometry.discard => {
                    assert_eq!(rig.status(DISCARD, 0, &range(sector, sectors as u32, 0), 0), OK, "{context}");
                    // It may read as anything now: settle on zeros.
                    assert_eq!(
                        rig.status(WRITE_ZEROES, 0, &range(sector, sectors as u32, 1), 0),
                        OK,
                        "{context}"
                    );
                    model[from..from + len].fill(0);
                }
                4 if geometry.write_zeroes => {
                    assert_eq!(
                        rig.status(WRITE_ZEROES, 0, &range(sector, sectors as u32, 0), 0),
                        OK,
                        "{context}"
                    );
                    model[from..from + len].fill(0);
                }
                5 if geometry.flush => {
                    assert_eq!(rig.status(FLUSH, 0, &[], 0), OK, "{context}");
                    case.backend.flush().unwrap();
                }
                _ => {
                    let first = random.below(len as u64) as usize;
                    let sizes =
                        if misaligned > 0 && first > 0 { vec![first, len - first, 1] } else { vec![len, 1] };
                    let sent = rig.try_send(&[&header(IN, sector)], &sizes, misaligned).unwrap();
                    let answer = rig.wait(sent);
                    assert_eq!((answer.status(), answer.written), (OK, len as u32 + 1), "{context}");
                    if case.keeps {
                        assert!(answer.data() == &model[from..from + len], "{context}: wrong data");
                    }
                }
            }
        }
        assert_eq!(rig.disk.counters().errors, 0, "{}", case.name);
    }
}

#[test]
fn many_requests_in_flight_do_not_mix() {
    for case in cases() {
        for ring in [Ring::SPLIT, Ring::PACKED, Ring { in_order: true, indirect: true, ..Ring::SPLIT }] {
            let mut rig = Rig::new(case.backend.clone(), ring);
            for round in 0..2 {
                let mut sent: Vec<(u64, Sent)> = Vec::new();
                for i in 0..64 {
                    let data = pattern(4096, i + 100 * round);
                    let misaligned = if i % 5 == 0 { 8 } else { 0 };
                    match rig.try_send(&[&header(OUT, i * 8), &data], &[1], misaligned) {
                        Some(request) => sent.push((i, request)),
                        None => break,
                    }
                }
                let blocks = sent.len() as u64;
                for (_, request) in sent {
                    assert_eq!(rig.wait(request).status(), OK, "{}", case.name);
                }
                let reads: Vec<Sent> = (0..blocks)
                    .map(|i| rig.try_send(&[&header(IN, i * 8)], &[4096, 1], i % 3 * 4).unwrap())
                    .collect();
                for (i, request) in reads.into_iter().enumerate() {
                    let Answer { bytes, .. } = rig.wait(request);
                    if case.keeps {
                        assert!(bytes[..4096] == pattern(4096, i as u64 + 100 * round), "{} {i}", case.name);
                    }
                }
            }
        }
    }
}

#[test]
fn two_queues_see_one_disk() {
    for case in cases().into_iter().filter(|case| case.keeps) {
        let disk =
            Arc::new(Blk::new(case.backend.clone(), Options { queues: 2, ..Options::default() }).unwrap());
        let mut first = Rig::with(disk.clone(), Ring::SPLIT, u64::MAX, 0);
        let mut second = Rig::with(disk, Ring::PACKED, u64::MAX, 1);
        for i in 0..50 {
            let data = pattern(1536, i);
            first.write(i * 5, &data);
            assert_eq!(second.read(i * 5, 1536), data, "{}", case.name);
        }
    }
}

#[test]
fn a_sleeping_thread_is_woken_by_completions() {
    for case in cases() {
        let mut rig = Rig::new(case.backend.clone(), Ring::SPLIT);
        let fds = rig.poller.wake_fds();
        let watch = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        for &fd in &fds {
            let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
            epoll::add(&watch, fake::borrow(fd), epoll::EventData::new_u64(0), flags).unwrap();
        }
        for i in 0..20 {
            let sent = rig.send(&[&header(OUT, i * 8), &pattern(4096, i)], &[1]);
            let flush = rig.send(&[&header(FLUSH, 0)], &[1]);
            rig.turn();
            let mut sleeps = 0;
            while !(rig.is_back(&sent) && rig.is_back(&flush)) {
                if !rig.poller.arm() {
                    assert_eq!(
                        fds.len(),
                        2,
                        "{}: something is in flight, so there is something to wait for",
                        case.name
                    );
                    sleeps += 1;
                    assert!(sleeps < 100, "{}: woken again and again for nothing", case.name);
                    let mut events = Vec::with_capacity(4);
                    let limit = Timespec { tv_sec: 120, tv_nsec: 0 };
                    match epoll::wait(&watch, spare_capacity(&mut events), Some(&limit)) {
                        // The kernel had this thread make another that waits for storage.
                        Err(rustix::io::Errno::INTR) => {}
                        woken => assert_eq!(woken, Ok(1), "{}: nobody wakes the thread", case.name),
                    }
                }
                rig.poller.disarm();
                rig.turn();
            }
            let _ = (rig.wait(sent), rig.wait(flush));
        }
    }
}

#[test]
fn size_can_change() {
    for case in cases() {
        let mut rig = Rig::new(case.backend.clone(), Ring::SPLIT);
        let data = pattern(512, 1);
        rig.write(SECTORS - 1, &data);
        assert_eq!(rig.disk.resize(Some(2 * DISK_BYTES)).unwrap(), 2 * DISK_BYTES, "{}", case.name);
        rig.write(2 * SECTORS - 1, &data);
        if case.keeps {
            assert_eq!(rig.read(SECTORS - 1, 512), data, "{}", case.name);
            assert_eq!(rig.read(SECTORS, 512), [0; 512], "{}", case.name);
        }
        rig.disk.resize(Some(DISK_BYTES / 2)).unwrap();
        assert_eq!(rig.status(IN, SECTORS - 1, &[], 512), IO_ERROR, "{}", case.name);
        rig.disk.resize(Some(DISK_BYTES)).unwrap();
        if case.keeps {
            assert_eq!(rig.read(SECTORS - 1, 512), [0; 512], "{}: what was cut off is gone", case.name);
        }
    }
}

#[test]
fn a_queue_can_be_torn_down_with_requests_in_flight() {
    for case in cases() {
        for _ in 0..10 {
            let mut rig = Rig::new(case.backend.clone(), Ring::SPLIT);
            for i in 0..32 {
                let data = pattern(4096, i);
                rig.send(&[&header(OUT, i * 8), &data], &[1]);
                rig.send(&[&header(FLUSH, 0)], &[1]);
            }
            rig.turn();
            drop(rig);
        }
        let mut rig = Rig::new(case.backend.clone(), Ring::SPLIT);
        rig.write(0, &pattern(512, 0));
    }
}

#[test]
fn what_a_backend_cannot_do_is_unsupported() {
    for case in cases() {
        let geometry = case.backend.geometry();
        let mut rig = Rig::new(case.backend.clone(), Ring::SPLIT);
        let expected = |possible| if possible { OK } else { UNSUPPORTED };
        assert_eq!(rig.status(FLUSH, 0, &[], 0), expected(geometry.flush), "{}", case.name);
        assert_eq!(rig.status(fake::SECURE_ERASE, 0, &range(0, 1, 0), 0), expected(geometry.secure_erase));
        assert_eq!(rig.status(DISCARD, 0, &range(0, 1, 0), 0), expected(geometry.discard), "{}", case.name);
    }
}

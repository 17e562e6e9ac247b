//! Files on storage that fails: no write is answered as durable that is not, and no flush after one that failed.
#![allow(clippy::unwrap_used, reason = "tests")]

mod fake;
mod fuse;
mod lines;

use std::sync::Arc;
use std::time::{Duration, Instant};

use blk::backends::file::{Direct, Engine, File, FileOptions};
use blk::config::WRITEBACK_OFFSET;
use blk::{Blk, Options};
use fake::{FLUSH, IO_ERROR, OK, OUT, Rig, Ring, WRITE_ZEROES, header, pattern, range};
use fuse::Failing;
use lines::Lines;
use virtio::{ConfigError, Device};

const BLOCK: usize = 4096;
const BLOCKS: usize = 64;
/// The one that cannot be written.
const BAD: usize = 40;

/// Both engines, past the page cache and through it, with one queue and several.
fn each_way(check: impl Fn(&Failing, FileOptions, u16, &str)) {
    for engine in [Engine::Uring, Engine::Inline] {
        for direct in [Direct::On, Direct::Off] {
            for queues in [1, 3] {
                let Some(storage) = Failing::new(BLOCKS * BLOCK) else { return };
                let options = FileOptions { engine, direct, ..FileOptions::default() };
                check(&storage, options, queues, &format!("{engine:?}, direct {direct:?}, {queues} queues"));
            }
        }
    }
}

/// A disk, and a driver for each of its queues.
fn open(storage: &Failing, options: FileOptions, queues: u16) -> (Arc<Blk>, Vec<Rig>) {
    let file = File::open(&storage.path(), options).unwrap();
    let disk = Arc::new(Blk::new(Arc::new(file), Options { queues, ..Options::default() }).unwrap());
    let rigs = (0..queues).map(|index| Rig::with(disk.clone(), Ring::SPLIT, u64::MAX, index)).collect();
    (disk, rigs)
}

fn sector(block: usize) -> u64 {
    (block * BLOCK / 512) as u64
}

#[test]
fn a_write_through_to_a_failing_block_always_fails() {
    each_way(|storage, options, queues, context| {
        storage.fail_writes((BAD * BLOCK) as u64..((BAD + 1) * BLOCK) as u64);
        let (disk, mut rigs) = open(storage, options, queues);
        disk.write_config(WRITEBACK_OFFSET, &[0]).unwrap();
        let count = rigs.len();
        let (mut failed, mut blamed) = (0, 0);
        let deadline = Instant::now() + Duration::from_secs(120);
        for round in 0..200 {
            // One write in four is to the failing block, and not always the first.
            let data: Vec<_> = (0..4).map(|i| pattern(BLOCK, 4 * round as u64 + i)).collect();
            let block = |i: usize| if i == round % 4 { BAD } else { (4 * round + i) % BAD };
            let mut sent: Vec<_> = (0..4)
                .map(|i| rigs[i % count].send(&[&header(OUT, sector(block(i))), &data[i]], &[1]))
                .map(Some)
                .collect();
            // All are under way, and no queue is a step ahead of the others.
            while sent.iter().any(Option::is_some) {
                assert!(Instant::now() < deadline, "{context}: requests do not come back");
                for rig in &mut rigs {
                    rig.turn();
                }
                for i in 0..4 {
                    let rig = &mut rigs[i % count];
                    let Some(back) = sent[i].take_if(|sent| rig.is_back(sent)) else { continue };
                    match (block(i), rig.wait(back).status()) {
                        (BAD, status) => failed += usize::from(status == IO_ERROR),
                        (at, OK) => {
                            assert!(storage.has(at * BLOCK, &data[i]), "{context}, {round}: not durable")
                        }
                        _ => blamed += 1,
                    }
                }
            }
        }
        println!("{context}: {failed} of 200 failed, and {blamed} of 600 good ones");
        assert_eq!(failed, 200, "{context}: of 200 writes to a failing block");
        // Of what goes through the page cache, the system does not say which write it was.
        assert!(options.direct == Direct::Off || blamed == 0, "{context}: {blamed} good writes failed");
    });
}

#[test]
fn once_a_flush_has_failed_all_do_until_the_disk_is_opened_anew() {
    let each_fault = |fault: fn(&Failing), through_cache_only: bool| {
        each_way(|storage, options, queues, context| {
            if through_cache_only && options.direct != Direct::Off {
                return;
            }
            let lines = Lines::that_start_with("flush failed");
            let (_, mut rigs) = open(storage, options, queues);
            fault(storage);
            tracing::subscriber::with_default(lines.clone(), || {
                rigs[0].write(sector(BAD), &pattern(BLOCK, 7));
                assert_eq!(rigs[0].status(FLUSH, 0, &[], 0), IO_ERROR, "{context}");
                storage.fail_writes(0..0);
                storage.fail_fsync(false);
                for rig in &mut rigs {
                    for _ in 0..3 {
                        assert_eq!(rig.status(FLUSH, 0, &[], 0), IO_ERROR, "{context}: it was lost already");
                    }
                }
            });
            assert_eq!(lines.count(), 1, "{context}: lines in the log");
            drop(rigs);
            let (_, mut rigs) = open(storage, options, queues);
            assert_eq!(rigs[0].status(FLUSH, 0, &[], 0), OK, "{context}");
        });
    };
    each_fault(|storage| storage.fail_fsync(true), false);
    each_fault(|storage| storage.fail_writes((BAD * BLOCK) as u64..((BAD + 1) * BLOCK) as u64), true);
}

#[test]
fn a_disk_that_was_let_go_of_has_nothing_in_this_hosts_cache() {
    each_way(|storage, options, queues, context| {
        let (disk, mut rigs) = open(storage, options, queues);
        let data = pattern(BLOCK, 11);
        rigs.iter_mut().zip(0..).for_each(|(rig, block)| rig.write(sector(block), &data));
        let there = |storage: &Failing| (0..rigs.len()).all(|block| storage.has(block * BLOCK, &data));
        assert_eq!(there(storage), options.direct == Direct::On, "{context}: what the test is about");
        let before = storage.fsyncs();
        disk.settle().unwrap();
        assert!(there(storage), "{context}: the next host would read old data");
        assert_eq!(storage.fsyncs() > before, options.direct == Direct::Off, "{context}");
        if options.direct == Direct::Off {
            storage.fail_fsync(true);
            rigs[0].write(0, &data);
            disk.settle().unwrap_err();
            storage.fail_fsync(false);
            assert_eq!(rigs[0].status(FLUSH, 0, &[], 0), IO_ERROR, "{context}: it was lost");
            disk.settle().unwrap_err();
        }
    });
}

#[test]
fn a_cache_that_cannot_be_flushed_stays_one_that_the_driver_has_to_flush() {
    each_way(|storage, options, queues, context| {
        let (disk, mut rigs) = open(storage, options, queues);
        rigs[0].write(0, &pattern(BLOCK, 5));
        storage.fail_fsync(true);
        let error = disk.write_config(WRITEBACK_OFFSET, &[0]).unwrap_err();
        assert!(matches!(error, ConfigError::Failed(_)), "{context}: {error}");
        storage.fail_fsync(false);
        assert_eq!(
            disk.config()[WRITEBACK_OFFSET as usize],
            1,
            "{context}: the driver thinks all is durable"
        );
        // What the driver asks for next tells it so.
        assert_eq!(rigs[0].status(FLUSH, 0, &[], 0), IO_ERROR, "{context}");
        disk.write_config(WRITEBACK_OFFSET, &[1]).unwrap();
    });
}

/// The system tells of a failed write-back once; whoever is told first is not always who has to know.
#[test]
fn an_error_that_a_durable_write_was_told_of_is_the_flushs_too() {
    each_way(|storage, options, queues, context| {
        storage.fail_writes((BAD * BLOCK) as u64..((BAD + 1) * BLOCK) as u64);
        let (disk, mut rigs) = open(storage, options, queues);
        disk.write_config(WRITEBACK_OFFSET, &[0]).unwrap();
        storage.refuse_fallocate();
        let zeros = [&header(WRITE_ZEROES, 0)[..], &range(sector(BAD), 8, 0)];
        let zeros = rigs[0].send(&zeros, &[1]);
        let write = rigs[0].send(&[&header(OUT, sector(BAD)), &pattern(BLOCK, 3)], &[1]);
        assert_eq!(rigs[0].wait(write).status(), IO_ERROR, "{context}");
        assert_eq!(rigs[0].wait(zeros).status(), IO_ERROR, "{context}: the zeros are lost");
    });
}

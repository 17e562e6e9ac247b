//! The driver's choice between a write-back and a write-through cache: what it does, and how long it lasts.
#![allow(clippy::unwrap_used, reason = "tests")]

mod fake;

use std::sync::Arc;

use blk::backends::slow::{Fate, Slow};
use blk::config::{WRITEBACK_OFFSET, features};
use blk::{Blk, Options};
use fake::{FLUSH, OK, OUT, Rig, Ring, WRITE_ZEROES, header, pattern, range};
use virtio::Device;

const BLOCK: usize = 4096;
const BLOCKS: usize = 64;

/// A disk whose operations take so many looks for completions each, full of ones.
fn disk(looks: u32) -> (Arc<Slow>, Arc<Blk>) {
    let fates = Box::new(move |_, _, _| Fate { looks, fails: false });
    let storage = Arc::new(Slow::new(vec![1; BLOCKS * BLOCK], 1000, fates));
    (storage.clone(), Arc::new(Blk::new(storage, Options::default()).unwrap()))
}

fn set_writeback(disk: &Blk, writeback: u8) {
    disk.write_config(WRITEBACK_OFFSET, &[writeback]).unwrap();
}

fn writeback(disk: &Blk) -> u8 {
    disk.config()[WRITEBACK_OFFSET as usize]
}

#[test]
fn what_was_written_before_the_switch_to_write_through_is_durable_after_it() {
    let (storage, disk) = disk(0);
    let mut rig = Rig::with(disk.clone(), Ring::SPLIT, u64::MAX, 0);
    let data = pattern(BLOCK, 3);
    rig.write(0, &data);
    assert!(storage.durable(0, BLOCK) != data, "the cache is one that is written back");
    set_writeback(&disk, 0);
    assert!(storage.durable(0, BLOCK) == data);
    set_writeback(&disk, 1);
    rig.write(8, &data);
    assert!(storage.durable(BLOCK, BLOCK) != data);
    assert_eq!(rig.status(FLUSH, 0, &[], 0), OK);
    assert!(storage.durable(BLOCK, BLOCK) == data);
}

#[test]
fn a_write_that_is_answered_after_the_switch_is_durable_whenever_it_was_sent() {
    for turns_before in [0, 1, 3, 11, 12] {
        let (storage, disk) = disk(10);
        let mut rig = Rig::with(disk.clone(), Ring::PACKED, u64::MAX, 0);
        let data = |i: usize| pattern(BLOCK, i as u64);
        let writes: Vec<_> =
            (0..BLOCKS / 2).map(|i| rig.send(&[&header(OUT, i as u64 * 8), &data(i)], &[1])).collect();
        let zeroes: Vec<_> = (BLOCKS / 2..BLOCKS)
            .map(|i| rig.send(&[&header(WRITE_ZEROES, 0), &range(i as u64 * 8, 8, 0)], &[1]))
            .collect();
        for _ in 0..turns_before {
            rig.turn();
        }
        set_writeback(&disk, 0);
        for (i, sent) in writes.into_iter().enumerate() {
            // Whether it was answered before or is now.
            assert_eq!(rig.wait(sent).status(), OK);
            assert!(
                storage.durable(i * BLOCK, BLOCK) == data(i),
                "{i}, {turns_before} turns before the switch"
            );
        }
        for (i, sent) in (BLOCKS / 2..).zip(zeroes) {
            assert_eq!(rig.wait(sent).status(), OK);
            assert_eq!(
                storage.durable(i * BLOCK, BLOCK),
                [0; BLOCK],
                "{turns_before} turns before the switch"
            );
        }
    }
}

#[test]
fn an_instance_that_takes_a_driver_over_writes_through() {
    let (storage, disk) = disk(0);
    disk.take_over();
    assert_eq!(writeback(&disk), 0);
    let mut rig = Rig::with(disk.clone(), Ring::SPLIT, u64::MAX, 0);
    let data = pattern(BLOCK, 5);
    rig.write(0, &data);
    assert!(storage.durable(0, BLOCK) == data);
    // Until the driver says otherwise.
    set_writeback(&disk, 1);
    rig.write(8, &data);
    assert!(storage.durable(BLOCK, BLOCK) != data);
}

#[test]
fn taking_over_concerns_only_drivers_that_may_choose() {
    let (storage, disk) = disk(0);
    disk.take_over();
    // One that cannot choose sends flushes, or cannot; neither has changed.
    let mut rig = Rig::with(disk.clone(), Ring::SPLIT, features::FLUSH, 0);
    rig.write(0, &[7; 512]);
    assert_eq!(storage.operations(), 1, "no flush follows");
    disk.reset();
    assert_eq!(writeback(&disk), 1, "the device's default, which a driver that begins anew reads");
}

#[test]
fn the_choice_goes_with_the_state() {
    let (_, first) = disk(0);
    set_writeback(&first, 0);
    let (_, second) = disk(0);
    second.restore(&first.save()).unwrap();
    assert_eq!(writeback(&second), 0);
    // A state that was handed over is known, whichever it is.
    set_writeback(&first, 1);
    let (_, third) = disk(0);
    third.take_over();
    third.restore(&first.save()).unwrap();
    assert_eq!(writeback(&third), 1);
}

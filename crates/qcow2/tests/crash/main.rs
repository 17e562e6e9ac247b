//! Crashes at every event of random workloads: the service dies, or the host loses power.
//!
//! `QCOW2_CRASH_SEEDS=N` sets how many workloads each test runs, `QCOW2_CRASH_SEED=N` has it run the one that a failure
//! names.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod model;
mod random;
mod reader;
mod snapshot;
mod store;
mod world;

use qcow2::check::check;
use qcow2::image::Image;
use qcow2::layout::Layout;
use qcow2::repair::repair;

use crate::random::Random;
use crate::reader::read_all;
use crate::store::Dying;
use crate::world::{Case, World};

/// Workloads of each test: all tests together look at more than a million crashes.
const SEEDS: u64 = 350;

fn seeds() -> std::ops::Range<u64> {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    match number("QCOW2_CRASH_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("QCOW2_CRASH_SEEDS").unwrap_or(SEEDS),
    }
}

fn case(seed: u64) -> Case {
    let mut random = Random::new(seed ^ 0x5eed);
    let extended = random.one_in(6);
    let cluster_bits = if extended { 14 } else { random.pick(&[9, 9, 9, 10, 12]) };
    let layout =
        Layout { cluster_bits, refcount_order: random.below(7) as u32, extended, external_data: false };
    let version = if extended || layout.refcount_order != 4 || random.one_in(2) { 3 } else { 2 };
    let disk_sectors = (layout.cluster_bytes() / 512)
        * (random.pick(&[8, 40, 100, if cluster_bits == 9 { 400 } else { 60 }]));
    Case {
        seed,
        version,
        layout,
        disk_sectors,
        backing_sectors: random.pick(&[0, 0, disk_sectors / 2 + 1, disk_sectors, disk_sectors * 2]),
        fresh_is_zero: !random.one_in(4),
        punch: random.one_in(2),
        reuse_after: random.pick(&[1, 1, 4, 256]),
        sectors_max: if random.one_in(2) { disk_sectors * 4 } else { disk_sectors },
        queue_depth: random.pick(&[1, 4, 12]),
        racing: random.one_in(4),
        fails_one_in: 0,
    }
}

/// Runs workloads with a crash looked at after every event; returns how many crashes those were.
fn crashes(seeds: std::ops::Range<u64>, events: u64, restarts: bool, fails_one_in: u64) -> u64 {
    let mut crash_points = 0;
    for seed in seeds {
        let mut world = World::new(Case { fails_one_in, ..case(seed) });
        for _ in 0..events {
            world.step(true);
            world.check_crash(false);
            world.check_crash(true);
            if restarts && world.random.one_in(60) {
                let power_cut = world.random.one_in(2);
                world.restart(power_cut);
            }
        }
        world.close(restarts || fails_one_in > 0);
        assert!(world.answered > 0);
        assert!(fails_one_in > 0 || world.failed == 0, "seed {seed}: requests failed though nothing did");
        crash_points += world.crash_points;
    }
    eprintln!("{crash_points} crash points");
    crash_points
}

#[test]
fn no_crash_costs_what_was_acknowledged_or_flushed() {
    assert!(crashes(seeds(), 400, false, 0) > 0);
}

#[test]
fn nor_what_an_internal_snapshot_holds() {
    let mut crash_points = 0;
    for seed in seeds() {
        let mut case = case(seed);
        case.layout.refcount_order = case.layout.refcount_order.max(1);
        let mut world = World::new(case);
        for _ in 0..200 {
            world.step(true);
        }
        let Some(contents) = snapshot::take(&world.close(false)) else { continue };
        let mut world = World::over(case, contents);
        for _ in 0..300 {
            world.step(true);
            world.check_crash(false);
            world.check_crash(true);
        }
        world.close(false);
        crash_points += world.crash_points;
    }
    assert!(crash_points > 0);
    eprintln!("{crash_points} crash points");
}

#[test]
fn nor_does_a_crash_after_a_crash() {
    assert!(crashes(seeds(), 400, true, 0) > 0);
}

#[test]
fn nor_do_writes_and_barriers_that_fail() {
    assert!(crashes(seeds(), 400, false, 12) > 0);
}

/// What was leaked by crashes is given back, and an image whose refcounts were never written is as good as any.
#[test]
fn a_repair_gives_leaks_back_and_counts_dirty_images_anew() {
    let mut leaks = 0;
    for seed in seeds() {
        let case = case(seed);
        let mut world = World::new(case);
        for _ in 0..100 {
            world.step(true);
        }
        world.restart(false);
        let before = world.close(true);
        let image = Image::read(&before).unwrap();
        let values = read_all(&before, &image, case.backing_sectors);
        let mut contents = before.clone();
        leaks += repair(&mut contents).unwrap().leaks;
        if case.version == 3 {
            // As after a crash of somebody who writes refcounts late.
            let mut sector = image.header_sector.clone();
            sector[79] |= 1;
            contents.write(0, &sector);
            for &block in image.refcount_table.iter().filter(|&&offset| offset != 0) {
                contents.write(block, &vec![0; case.layout.cluster_bytes() as usize]);
            }
            assert!(check(&contents).unwrap().wrong_refcounts > 0);
            repair(&mut contents).unwrap();
        }
        let report = check(&contents).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{:#?}", report.findings);
        let image = Image::read(&contents).unwrap();
        assert_eq!(image.header.incompatible & 1, 0);
        assert!(read_all(&contents, &image, case.backing_sectors) == values);
    }
    assert!(leaks > 0, "no crash leaked anything");
}

/// A repair that is interrupted leaves an image that says it is dirty, or that is sound; and all data.
#[test]
fn a_repair_can_be_interrupted() {
    let mut interrupted = 0;
    for seed in seeds() {
        let case = Case { version: 3, ..case(seed) };
        let mut world = World::new(case);
        for _ in 0..60 {
            world.step(true);
        }
        world.restart(false);
        let mut contents = world.close(true);
        let image = Image::read(&contents).unwrap();
        let values = read_all(&contents, &image, case.backing_sectors);
        // All refcounts are gone; every other seed it was not even said that they may be.
        let mut sector = image.header_sector.clone();
        sector[79] |= (seed % 2) as u8;
        contents.write(0, &sector);
        for &block in image.refcount_table.iter().filter(|&&offset| offset != 0) {
            contents.write(block, &vec![0; case.layout.cluster_bytes() as usize]);
        }
        for writes_left in 0.. {
            let mut file = Dying { contents: contents.clone(), writes_left };
            let done = repair(&mut file).is_ok();
            let mut contents = file.contents;
            let image = Image::read(&contents).unwrap();
            assert!(read_all(&contents, &image, case.backing_sectors) == values, "seed {seed}");
            let dirty = image.header.incompatible & 1 != 0;
            let report = check(&contents).unwrap();
            assert!(
                dirty || report.corruptions == 0 || writes_left == 0,
                "seed {seed}, {writes_left}: {report:?}"
            );
            if done {
                assert!(!dirty && report.corruptions + report.leaks == 0, "seed {seed}: {report:?}");
                break;
            }
            interrupted += 1;
            repair(&mut contents).unwrap();
            let report = check(&contents).unwrap();
            assert_eq!((report.corruptions, report.leaks), (0, 0), "seed {seed}, {writes_left}");
        }
    }
    assert!(interrupted > 0);
}

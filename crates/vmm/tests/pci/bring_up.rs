//! From an unknown bus to answered requests.

use virtio::features::{EVENT_IDX, IN_ORDER, RING_PACKED, RING_RESET, VERSION_1};

use crate::driver::{ACKNOWLEDGE, DRIVER, DRIVER_OK, Driver, FEATURES_OK, Pci, Way};
use crate::echo::{Echo, FEATURE};
use crate::machine::Machine;

#[test]
fn both_ways_into_configuration_space_find_the_same_devices() {
    let machine = Machine::new(&[Echo::new(1), Echo::new(3)]);
    for way in [Way::Ports, Way::Ecam] {
        let found = Pci::scan(&machine, way);
        let ids: Vec<_> = found.iter().map(|pci| (pci.slot, pci.u16(0), pci.u16(2))).collect();
        assert_eq!(ids, [(0, 0x1b36, 8), (1, 0x1af4, 0x107f), (2, 0x1af4, 0x107f)]);
        assert_eq!(found[0].u32(8) >> 8, 0x06_00_00, "a host bridge");
        assert!(found.iter().all(|pci| pci.u8(0xe) == 0), "one function each");
    }
}

#[test]
fn bars_have_sizes_and_addresses() {
    let machine = Machine::new(&[Echo::new(3), Echo::with_shared_memory(1, &[0x1_0000, 0x3000])]);
    for pci in &Pci::scan(&machine, Way::Ports)[1..] {
        let bars = pci.size_bars();
        assert_eq!(pci.size_bars(), bars, "sizing leaves no trace");
        for (_, size, addr) in &bars {
            assert!(addr % size == 0 && *addr != 0, "{size:#x} at {addr:#x}");
        }
        let sizes: Vec<_> = bars.iter().map(|(index, size, _)| (*index, *size)).collect();
        match pci.slot {
            1 => assert_eq!(sizes, [(0, 0x8000), (1, 0x4000)]),
            _ => assert_eq!(sizes, [(0, 0x8000), (1, 0x1000), (4, 0x2_0000)]),
        }
    }
}

#[test]
fn the_structures_are_those_of_a_modern_device() {
    let machine = Machine::new(&[Echo::new(3)]);
    let driver = Driver::probe(&machine, 1, Way::Ecam);
    let bars = driver.pci.size_bars();
    let mut types = Vec::new();
    for structure in &driver.structures {
        types.push(structure.cfg_type);
        let length = u64::from(structure.length);
        let (_, size, _) = bars.iter().find(|(index, ..)| *index == u32::from(structure.bar)).unwrap();
        assert!(u64::from(structure.offset) + length <= *size, "{structure:?}");
        let expected = match structure.cfg_type {
            1 => 64,
            2 => 3 * 4096,
            3 => 4,
            4 => 16,
            _ => 0,
        };
        assert_eq!(length, expected, "{structure:?}");
    }
    assert_eq!(types, [1, 2, 3, 4, 5]);
    assert_eq!(driver.multiplier, 4096, "a page for each queue");
    assert_eq!(driver.vectors(), 4);
    for index in 0..3 {
        driver.set16(0x16, index);
        assert_eq!(driver.u16(0x1e), index);
    }
}

#[test]
fn requests_are_answered_in_both_formats_again_and_again() {
    let machine = Machine::new(&[Echo::new(1), Echo::new(3)]);
    for (slot, way) in [(1, Way::Ports), (2, Way::Ecam)] {
        let mut driver = Driver::probe(&machine, slot, way);
        for without in [RING_PACKED, 0, RING_PACKED | EVENT_IDX, EVENT_IDX, IN_ORDER, RING_PACKED | IN_ORDER]
        {
            driver.bring_up(without, 16);
            driver.exercise(40);
            assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        }
        driver.reset();
    }
    assert!(machine.board.doorbells().is_empty(), "no queue runs");
}

#[test]
fn features_that_are_not_offered_are_refused() {
    let machine = Machine::without(&[Echo::new(1)], IN_ORDER);
    let mut driver = Driver::probe(&machine, 1, Way::Ports);
    let offered = driver.offered();
    assert_eq!(offered & (IN_ORDER | FEATURE | RING_RESET | VERSION_1), FEATURE | RING_RESET | VERSION_1);
    assert!(!driver.negotiate(offered | IN_ORDER));
    assert!(!driver.negotiate(offered | 1 << 63));
    assert!(!driver.negotiate(offered & !VERSION_1), "the legacy interface is not to be had");
    driver.add_status(DRIVER_OK);
    assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER, "not ready without features");
    assert!(driver.negotiate(VERSION_1));
    for select in [2, u32::MAX] {
        driver.set32(0, select);
        driver.set32(8, select);
        driver.set32(0xc, u32::MAX);
        assert_eq!((driver.u32(4), driver.u32(0xc)), (0, 0));
    }
    driver.set32(8, 0);
    driver.set32(0xc, FEATURE as u32);
    assert_eq!(driver.u32(0xc), 0, "they are fixed by now");
}

#[test]
fn a_queue_that_is_enabled_later_starts_at_once() {
    let machine = Machine::new(&[Echo::new(2)]);
    let mut driver = Driver::probe(&machine, 1, Way::Ports);
    let features = driver.usual_features(0);
    assert!(driver.negotiate(features));
    driver.enable_msix();
    driver.add_ring(0, 8, 1);
    driver.add_status(DRIVER_OK);
    driver.exercise(3);
    driver.add_ring(1, 256, 2);
    driver.exercise(3);
    assert!(machine.devices[0].counters().iter().all(|queue| queue.requests >= 3));
}

#[test]
fn an_enabled_queue_does_not_change() {
    let machine = Machine::new(&[Echo::new(1)]);
    let mut driver = Driver::probe(&machine, 1, Way::Ports);
    driver.bring_up(0, 16);
    driver.set16(0x16, 0);
    let before = (driver.u16(0x18), driver.u32(0x20), driver.u32(0x28), driver.u32(0x34));
    driver.set16(0x18, 8);
    [0x20, 0x24, 0x28, 0x2c, 0x30, 0x34].iter().for_each(|&offset| driver.set32(offset, 0x1000));
    driver.set16(0x1c, 0);
    assert_eq!((driver.u16(0x18), driver.u32(0x20), driver.u32(0x28), driver.u32(0x34)), before);
    assert_eq!(driver.u16(0x1c), 1);
    driver.exercise(3);
}

#[test]
fn a_queue_that_is_not_there_has_no_size() {
    let machine = Machine::new(&[Echo::new(1)]);
    let driver = Driver::probe(&machine, 1, Way::Ports);
    for index in [1, 2, 0x8000, 0xffff] {
        driver.set16(0x16, index);
        driver.set16(0x18, 16);
        driver.set16(0x1c, 1);
        driver.set16(0x1a, 0);
        let registers = [0x16, 0x18, 0x1a, 0x1c].map(|offset| driver.u16(offset));
        assert_eq!(registers, [index, 0, 0xffff, 0]);
    }
}

#[test]
fn the_whole_device_works_through_the_configuration_window() {
    let machine = Machine::new(&[Echo::new(1)]);
    let driver = Driver::probe(&machine, 1, Way::Ports);
    // Decoding is off: nothing but the window is left.
    driver.pci.write(4, &[0, 0]);
    let window = driver.structures.iter().find(|structure| structure.cfg_type == 5).unwrap().at;
    let aim = |offset: u32, length: u32| {
        driver.pci.write(window + 4, &[0]);
        driver.pci.write(window + 8, &offset.to_le_bytes());
        driver.pci.write(window + 12, &length.to_le_bytes());
    };
    aim(0x14, 1);
    driver.pci.write(window + 16, &[ACKNOWLEDGE]);
    assert_eq!(driver.pci.u8(window + 16), ACKNOWLEDGE);
    aim(0x12, 2);
    assert_eq!(driver.pci.u16(window + 16), 1, "one queue");
    aim(4, 4);
    assert_eq!(driver.pci.u32(window + 16), driver_features_low());
    for (offset, length) in [(0x14, 3), (0x14, 0), (0x7fff, 2), (u32::MAX, 4)] {
        aim(offset, length);
        driver.pci.write(window + 16, &[0; 4]);
        assert_eq!(driver.pci.u32(window + 16), 0, "nothing moves");
    }
    aim(0x14, 1);
    assert_eq!(driver.pci.u8(window + 16), ACKNOWLEDGE, "not reset by any of these");
}

fn driver_features_low() -> u32 {
    (FEATURE | virtio::features::RING_FEATURES | RING_RESET) as u32
}

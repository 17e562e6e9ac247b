//! Resets in the middle of things, rings that break, machines that pause.

use std::sync::atomic::Ordering;
use std::time::Duration;

use virtio::features::{EVENT_IDX, RING_PACKED, RING_RESET};

use crate::driver::{DRIVER_OK, Driver, NEEDS_RESET, Way};
use crate::echo::Echo;
use crate::machine::{Machine, eventually};

#[test]
fn a_reset_completes_what_is_in_flight() {
    let echo = Echo::new(1);
    let machine = Machine::new(std::slice::from_ref(&echo));
    let mut driver = Driver::probe(&machine, 1, Way::Ports);
    driver.bring_up(0, 16);
    let resets = echo.resets.load(Ordering::SeqCst);
    echo.switches.hold.store(true, Ordering::SeqCst);
    driver.offer(0, &[9; 32]);
    eventually("the request is taken", || echo.switches.taken.load(Ordering::SeqCst) == 1);
    driver.set8(0x14, 0);
    assert_eq!(driver.status(), 0);
    assert_eq!(driver.rings[0].answer(&machine.guest, 32), [9; 32], "answered before the reset was over");
    assert_eq!(echo.resets.load(Ordering::SeqCst), resets + 1);
    let registers = [0x10, 0x16, 0x18, 0x1a, 0x1c].map(|offset| driver.u16(offset));
    assert_eq!(registers, [0xffff, 0, 256, 0xffff, 0]);
    echo.switches.hold.store(false, Ordering::SeqCst);
    driver.bring_up(0, 16);
    driver.exercise(5);
}

#[test]
fn a_reset_that_waits_for_storage_holds_up_nobody_else() {
    let echo = Echo::new(1);
    let machine = Machine::new(&[echo.clone(), Echo::new(1)]);
    let mut slow = Driver::probe(&machine, 1, Way::Ecam);
    let mut other = Driver::probe(&machine, 2, Way::Ecam);
    slow.bring_up(0, 16);
    other.bring_up(0, 16);
    echo.switches.stuck.store(true, Ordering::SeqCst);
    std::thread::scope(|scope| {
        let reset = scope.spawn(|| slow.set8(0x14, 0));
        other.exercise(50);
        // Configuration space, MSI-X and BARs of both are there, too.
        let mover = Driver::probe(&machine, 2, Way::Ports);
        mover.aim(1, mover.data(1));
        mover.pci.size_bars();
        let bystander = crate::driver::Pci { machine: &machine, slot: 1, way: Way::Ports };
        assert_eq!(bystander.size_bars().len(), 2);
        other.exercise(5);
        assert!(!reset.is_finished(), "the device is still draining");
        echo.switches.stuck.store(false, Ordering::SeqCst);
    });
    assert_eq!(slow.status(), 0);
    slow.bring_up(0, 16);
    slow.exercise(5);
}

#[test]
fn a_broken_ring_asks_for_a_reset() {
    let machine = Machine::new(&[Echo::new(2)]);
    let mut driver = Driver::probe(&machine, 1, Way::Ports);
    driver.bring_up(RING_PACKED | EVENT_IDX, 16);
    machine.board.take();
    // The available index jumps further than the ring is long.
    let available = driver.rings[0].config.driver;
    machine.guest.write(virtio::GuestAddr(available.0 + 2), &1000u16.to_le_bytes());
    driver.kick(0);
    machine.board.wait(driver.data(0));
    assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET);
    assert_eq!(driver.read_isr() & 2, 2);
    driver.offer(1, &[5; 8]);
    driver.sleep(1, &[5; 8]);
    driver.bring_up(RING_PACKED, 16);
    driver.exercise(3);
}

#[test]
fn a_queue_that_cannot_start_asks_for_a_reset() {
    let machine = Machine::new(&[Echo::new(1)]);
    let mut driver = Driver::probe(&machine, 1, Way::Ports);
    for (desc, size) in [(0u64, 16), (u64::MAX, 16), (0x10_0001, 16), (0x10_0000 + (32 << 20) - 16, 256)] {
        let features = driver.usual_features(RING_PACKED);
        assert!(driver.negotiate(features));
        driver.enable_msix();
        driver.set16(0x18, size);
        driver.set32(0x20, desc as u32);
        driver.set32(0x24, (desc >> 32) as u32);
        driver.set16(0x1c, 1);
        machine.board.take();
        driver.add_status(DRIVER_OK);
        machine.board.wait(driver.data(0));
        assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET);
        assert!(machine.board.doorbells().is_empty());
    }
    driver.bring_up(0, 16);
    driver.exercise(3);
}

#[test]
fn a_single_queue_is_reset() {
    let machine = Machine::new(&[Echo::new(2)]);
    let mut driver = Driver::probe(&machine, 1, Way::Ports);
    driver.bring_up(0, 16);
    driver.exercise(3);
    for size in [64, 8] {
        driver.set16(0x16, 1);
        driver.set16(0x3a, 1);
        assert_eq!((driver.u16(0x3a), driver.u16(0x1c), driver.u16(0x18)), (0, 0, 256));
        assert_eq!(machine.board.doorbells(), [driver.notify]);
        driver.offer(0, &[1; 4]);
        driver.sleep(0, &[1; 4]);
        driver.add_ring(1, size, 2);
        driver.exercise(3);
    }
    driver.bring_up(RING_RESET, 16);
    driver.set16(0x16, 1);
    driver.set16(0x3a, 1);
    assert_eq!(driver.u16(0x1c), 1, "not negotiated");
    driver.exercise(3);
}

#[test]
fn a_paused_device_goes_on_where_it_stopped() {
    let machine = Machine::new(&[Echo::new(1)]);
    let mut driver = Driver::probe(&machine, 1, Way::Ports);
    for without in [0, RING_PACKED] {
        driver.bring_up(without, 8);
        for round in 0..10 {
            driver.exercise(3);
            machine.devices[0].pause();
            driver.offer(0, &[round; 8]);
            machine.devices[0].resume();
            driver.sleep(0, &[round; 8]);
        }
    }
}

#[test]
fn a_device_that_goes_away_leaves_nothing_behind() {
    let echo = Echo::new(2);
    let machine = Machine::new(std::slice::from_ref(&echo));
    let mut driver = Driver::probe(&machine, 1, Way::Ports);
    driver.bring_up(0, 16);
    driver.exercise(2);
    let Machine { bus, board, devices, .. } = machine;
    assert!(echo.is_listened_to());
    drop((bus, devices));
    assert!(!echo.is_listened_to());
    assert!(board.doorbells().is_empty());
    eventually("the device is released", || {
        std::thread::sleep(Duration::from_millis(1));
        std::sync::Arc::strong_count(&echo) == 1
    });
}

//! How the driver hears of things: vectors that change under load, masks, ISR, changes of the configuration.

use std::sync::atomic::{AtomicBool, Ordering};

use virtio::features::EVENT_IDX;

use crate::driver::{DRIVER_OK, Driver, NO_VECTOR, Way};
use crate::echo::{Echo, WRITABLE_AT};
use crate::machine::Machine;

#[test]
fn a_vector_beyond_the_table_is_refused() {
    let machine = Machine::new(&[Echo::new(1)]);
    let driver = Driver::probe(&machine, 1, Way::Ports);
    for offset in [0x10, 0x1a] {
        driver.set16(offset, 1);
        assert_eq!(driver.u16(offset), 1);
        driver.set16(offset, 2);
        assert_eq!(driver.u16(offset), NO_VECTOR);
    }
}

#[test]
fn a_queue_changes_its_vector_while_it_runs() {
    let machine = Machine::new(&[Echo::new(1)]);
    let mut driver = Driver::probe(&machine, 1, Way::Ports);
    driver.bring_up(EVENT_IDX, 16);
    driver.exercise(3);
    driver.set16(0x16, 0);
    driver.set16(0x1a, 0);
    machine.board.take();
    driver.offer(0, &[1; 8]);
    machine.board.wait(driver.data(0));
    driver.poll(0, &[1; 8]);
}

#[test]
fn a_masked_vector_comes_when_it_is_unmasked() {
    let machine = Machine::new(&[Echo::new(1)]);
    let mut driver = Driver::probe(&machine, 1, Way::Ports);
    driver.bring_up(EVENT_IDX, 16);
    driver.mask(1, true);
    driver.offer(0, &[7; 8]);
    driver.poll(0, &[7; 8]);
    let pending = driver.table - 0x4000 + 0x3000;
    crate::machine::eventually("the pending bit", || machine.read(pending) == [2]);
    assert!(machine.board.take().is_empty());
    driver.mask(1, false);
    machine.board.wait(driver.data(1));
    assert_eq!(machine.read(pending), [0]);
}

#[test]
fn no_interrupt_is_lost_while_its_message_changes() {
    let machine = Machine::new(&[Echo::new(1)]);
    let mut driver = Driver::probe(&machine, 1, Way::Ports);
    driver.bring_up(0, 16);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mover = Driver::probe(&machine, 1, Way::Ecam);
        scope.spawn(|| {
            let mover = mover;
            // Always the same data, so that the sleeper knows them; the address is where each aims anew.
            while !done.load(Ordering::Relaxed) {
                mover.aim(1, mover.data(1));
                mover.msix_control(0x4000, 0);
                mover.msix_control(0, 0x4000);
            }
        });
        driver.exercise(200);
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn without_msix_the_isr_tells() {
    let machine = Machine::new(&[Echo::new(1)]);
    let mut driver = Driver::probe(&machine, 1, Way::Ports);
    let features = driver.usual_features(EVENT_IDX);
    assert!(driver.negotiate(features));
    driver.add_ring(0, 16, NO_VECTOR);
    driver.add_status(DRIVER_OK);
    assert_eq!(driver.read_isr(), 0);
    driver.offer(0, &[3; 4]);
    driver.poll(0, &[3; 4]);
    crate::machine::eventually("the queue's bit", || driver.read_isr() == 1);
    assert_eq!(driver.read_isr(), 0, "reading clears it");
    assert!(machine.board.take().is_empty());
}

#[test]
fn a_change_of_the_configuration_is_announced_and_counted() {
    let echo = Echo::new(1);
    let machine = Machine::new(std::slice::from_ref(&echo));
    let mut driver = Driver::probe(&machine, 1, Way::Ports);
    driver.bring_up(0, 16);
    let read = || {
        let before = driver.u8(0x15);
        let data: [u8; 4] = machine.read(driver.config);
        (before, data, driver.u8(0x15))
    };
    assert_eq!(read(), (0, [0, 1, 2, 3], 0));
    echo.change_config(2, 0xee);
    machine.board.wait(driver.data(0));
    assert_eq!(driver.read_isr() & 2, 2);
    assert_eq!(read(), (0, [0, 1, 0xee, 3], 1), "a reader that began before must begin again");
    assert_eq!(read(), (1, [0, 1, 0xee, 3], 1));
}

#[test]
fn a_change_before_the_driver_is_ready_is_announced_when_it_is() {
    let echo = Echo::new(1);
    let machine = Machine::new(std::slice::from_ref(&echo));
    let mut driver = Driver::probe(&machine, 1, Way::Ports);
    let features = driver.usual_features(0);
    assert!(driver.negotiate(features));
    driver.enable_msix();
    echo.change_config(0, 9);
    assert!(machine.board.take().is_empty());
    driver.add_status(DRIVER_OK);
    machine.board.wait(driver.data(0));
}

#[test]
fn the_configuration_is_written_where_the_device_lets_it() {
    let machine = Machine::new(&[Echo::new(1)]);
    let driver = Driver::probe(&machine, 1, Way::Ports);
    machine.write(driver.config + u64::from(WRITABLE_AT), &[0x77]);
    machine.write(driver.config + u64::from(WRITABLE_AT), &[1, 2]);
    machine.write(driver.config, &[0xff; 8]);
    let data: [u8; 8] = machine.read(driver.config);
    assert_eq!(data, [0, 1, 2, 3, 0x77, 5, 6, 7]);
    let data: [u8; 8] = machine.read(driver.config + 8);
    assert_eq!(data, [8, 9, 10, 11, 12, 0, 0, 0], "zeros beyond its end");
}

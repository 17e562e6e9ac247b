//! BARs that move while the device works.

use virtio::features::{EVENT_IDX, RING_PACKED};

use crate::driver::{Driver, Pci, Way};
use crate::echo::Echo;
use crate::machine::Machine;

fn move_bar(pci: &Pci<'_>, index: u32, addr: u64) {
    pci.write(0x10 + 4 * index, &(addr as u32).to_le_bytes());
}

#[test]
fn doorbells_follow_their_bar() {
    let machine = Machine::new(&[Echo::new(2)]);
    let mut driver = Driver::probe(&machine, 1, Way::Ports);
    driver.bring_up(0, 16);
    assert_eq!(machine.board.doorbells(), [driver.notify, driver.notify + 4096]);
    let old = driver.notify;
    move_bar(&driver.pci, 1, 0xd000_0000);
    driver.notify = 0xd000_0000;
    assert_eq!(machine.board.doorbells(), [0xd000_0000, 0xd000_1000]);
    driver.exercise(5);
    assert_eq!(machine.read(old), [0xff; 4], "nobody is there");
    driver.pci.write(4, &[0]);
    assert!(machine.board.doorbells().is_empty());
    driver.pci.write(4, &[6]);
    driver.exercise(5);
    driver.reset();
    assert!(machine.board.doorbells().is_empty());
}

#[test]
fn kicks_arrive_without_a_doorbell() {
    let machine = Machine::new(&[Echo::new(1)]);
    let mut driver = Driver::probe(&machine, 1, Way::Ports);
    // With neither an event index nor polling every request is kicked.
    driver.bring_up(EVENT_IDX | RING_PACKED, 16);
    for round in 0..50 {
        driver.rings[0].offer(&machine.guest, &[round; 4]);
        machine.bus.mmio_write(driver.notify, &0u16.to_le_bytes());
        driver.sleep(0, &[round; 4]);
    }
}

#[test]
fn registers_follow_their_bar() {
    let machine = Machine::new(&[Echo::new(1)]);
    let mut driver = Driver::probe(&machine, 1, Way::Ports);
    driver.bring_up(0, 16);
    let (old, new) = (driver.common, 0xd123_8000);
    move_bar(&driver.pci, 0, new);
    for register in [&mut driver.common, &mut driver.isr, &mut driver.config, &mut driver.table] {
        *register = *register - old + new;
    }
    driver.exercise(5);
    driver.aim(1, 77);
    driver.aim(1, driver.data(1));
    driver.exercise(5);
}

#[test]
fn a_device_that_moves_onto_another_does_not_disturb_it() {
    let machine = Machine::new(&[Echo::new(1), Echo::new(1)]);
    let mut first = Driver::probe(&machine, 1, Way::Ports);
    let mut second = Driver::probe(&machine, 2, Way::Ports);
    first.bring_up(0, 16);
    second.bring_up(0, 16);
    let home = first.notify;
    move_bar(&first.pci, 1, second.notify);
    move_bar(&first.pci, 0, second.common);
    assert_eq!(machine.board.doorbells(), [second.notify]);
    second.exercise(5);
    move_bar(&first.pci, 1, home);
    move_bar(&first.pci, 0, first.common);
    first.exercise(5);
    second.exercise(5);
}

#[test]
fn shared_memory_is_mapped_where_its_bar_is() {
    let machine = Machine::new(&[Echo::with_shared_memory(1, &[0x1_0000, 0x3000])]);
    assert!(machine.board.mappings().is_empty());
    let driver = Driver::probe(&machine, 1, Way::Ports);
    let shared: Vec<_> = driver.structures.iter().filter(|structure| structure.cfg_type == 8).collect();
    let told: Vec<_> = shared.iter().map(|s| (s.bar, s.id, s.offset, s.length)).collect();
    assert_eq!(told, [(4, 0, 0, 0x1_0000), (4, 1, 0x1_0000, 0x3000)]);
    assert_eq!(driver.pci.u32(shared[1].at + 16), 0, "high half of the offset");
    let base = 0x80_0000_0000;
    assert_eq!(machine.board.mappings(), [(base, 0x1_0000), (base + 0x1_0000, 0x3000)]);
    driver.pci.write(0x20, &0x2000_0000u32.to_le_bytes());
    assert_eq!(machine.board.mappings()[0], (base + 0x2000_0000, 0x1_0000));
    driver.pci.write(4, &[0]);
    assert!(machine.board.mappings().is_empty());
}

//! Writes that no driver makes, to every register of two devices and a third that goes on working.

use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use proptest::strategy::ValueTree;

use crate::driver::{Driver, Pci, Way};
use crate::echo::Echo;
use crate::guest::START;
use crate::machine::Machine;

/// One access by a vCPU.
#[derive(Clone, Debug)]
enum Access {
    /// To configuration space of a victim.
    Config { victim: usize, way: Way, offset: u16, len: usize, value: u64, write: bool },
    /// To any port of PCI.
    Port { port: u16, len: usize, value: u32, write: bool },
    /// To a BAR of a victim, wherever it is now.
    Bar { victim: usize, bar: usize, offset: u64, len: usize, value: u64, write: bool },
    /// A register of the common configuration of the proper width, so that something happens.
    Register { victim: usize, register: usize, value: u32 },
    /// To any address but the neighbour's.
    Anywhere { addr: u64, len: usize, value: u64 },
}

const VICTIMS: [u32; 2] = [1, 2];
const NEIGHBOUR: u32 = 3;
/// Offset and width of what a driver may write in the common configuration.
const REGISTERS: [(u64, usize); 18] = [
    (0x00, 4),
    (0x08, 4),
    (0x0c, 4),
    (0x10, 2),
    (0x14, 1),
    (0x14, 1),
    (0x16, 2),
    (0x18, 2),
    (0x1a, 2),
    (0x1c, 2),
    (0x1c, 2),
    (0x20, 4),
    (0x24, 4),
    (0x28, 4),
    (0x2c, 4),
    (0x30, 4),
    (0x34, 4),
    (0x3a, 2),
];

fn len() -> impl Strategy<Value = usize> {
    prop_oneof![Just(1), Just(2), Just(4), Just(8)]
}

/// Numbers that mean something to some register.
fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0u64..16,
        Just(u64::MAX),
        Just(0),
        (0u64..0x100).prop_map(|page| START + page * 0x1000),
        (0u64..0x20).prop_map(|page| 0xc000_0000 + page * 0x1000),
        (0u64..16).prop_map(|bits| 1 << bits),
    ]
}

fn access() -> impl Strategy<Value = Access> {
    let way = prop_oneof![Just(Way::Ports), Just(Way::Ecam)];
    let offset = prop_oneof![0u16..0x110, any::<u16>().prop_map(|offset| offset % 4096)];
    let within =
        prop_oneof![0u64..0x80, 0xff8u64..0x1008, 0x1ff8u64..0x2018, 0x2ff8u64..0x4048, 0u64..0x1_0000];
    let port = prop_oneof![0xcf8u16..0xd00, Just(0xcfc)];
    let addr = prop_oneof![any::<u64>(), 0xbfff_fff0u64..0xe010_0010, 0x7f_ffff_fff0u64..0x80_0010_0000];
    prop_oneof![
        3 => (0usize..2, way, offset, len(), value(), any::<bool>()).prop_map(
            |(victim, way, offset, len, value, write)| Access::Config { victim, way, offset, len, value, write }
        ),
        1 => (port, len(), any::<u32>(), any::<bool>())
            .prop_map(|(port, len, value, write)| Access::Port { port, len, value, write }),
        4 => (0usize..2, 0usize..3, within, len(), value(), any::<bool>()).prop_map(
            |(victim, bar, offset, len, value, write)| Access::Bar { victim, bar, offset, len, value, write }
        ),
        6 => (0usize..2, 0..REGISTERS.len(), value())
            .prop_map(|(victim, register, value)| Access::Register { victim, register, value: value as u32 }),
        1 => (addr, len(), value()).prop_map(|(addr, len, value)| Access::Anywhere { addr, len, value }),
    ]
}

/// Where BAR `index` (0: registers, 1: doorbells, 2: shared memory) of a victim is.
fn bar(machine: &Machine, victim: usize, index: usize) -> u64 {
    let pci = Pci { machine, slot: VICTIMS[victim], way: Way::Ecam };
    let at = [0x10, 0x14, 0x20][index];
    let low = u64::from(pci.u32(at) & !0xf);
    if index == 2 { low | u64::from(pci.u32(at + 4)) << 32 } else { low }
}

/// Makes an access; one that would be the neighbour's is not made.
fn make(machine: &Machine, theirs: &[std::ops::Range<u64>], access: &Access) {
    let (addr, len, value, write) = match *access {
        Access::Config { victim, way, offset, len, value, write } => {
            let pci = Pci { machine, slot: VICTIMS[victim], way };
            let bytes = value.to_le_bytes();
            match (write, len) {
                (true, _) => pci.write(offset.into(), &bytes[..len]),
                (false, 1) => drop(pci.read::<1>(offset.into())),
                (false, 2) => drop(pci.read::<2>(offset.into())),
                (false, 4) => drop(pci.read::<4>(offset.into())),
                (false, _) => drop(pci.read::<8>(offset.into())),
            }
            return;
        }
        Access::Port { port, len, value, write } => {
            let mut bytes = u64::from(value).to_le_bytes();
            let mut latch = [0; 4];
            machine.bus.port_read(0xcf8, &mut latch);
            let is_theirs = u32::from_le_bytes(latch) >> 11 & 0x1f == NEIGHBOUR && port >= 0xcfc;
            if write && !is_theirs {
                machine.bus.port_write(port, &bytes[..len]);
            } else if !is_theirs {
                machine.bus.port_read(port, &mut bytes[..len]);
            }
            return;
        }
        Access::Bar { victim, bar: index, offset, len, value, write } => {
            (bar(machine, victim, index).wrapping_add(offset), len, value, write)
        }
        Access::Register { victim, register, value } => {
            let (offset, len) = REGISTERS[register];
            (bar(machine, victim, 0) + offset, len, u64::from(value), true)
        }
        Access::Anywhere { addr, len, value } => (addr, len, value, true),
    };
    let end = addr.saturating_add(len as u64);
    if theirs.iter().any(|range| addr < range.end && range.start < end) {
        return;
    }
    let mut bytes = value.to_le_bytes();
    if write {
        machine.write(addr, &bytes[..len]);
    } else {
        machine.bus.mmio_read(addr, &mut bytes[..len]);
    }
}

/// The addresses of a neighbour: its BARs and its configuration space.
fn addresses(driver: &Driver<'_>) -> Vec<std::ops::Range<u64>> {
    let ecam = driver.pci.machine.bus.windows().ecam.start + u64::from(driver.pci.slot << 15);
    let bars = driver.pci.size_bars().into_iter().map(|(_, size, addr)| addr..addr + size);
    bars.chain(std::iter::once(ecam..ecam + 4096)).collect()
}

/// Checks what holds whatever was written.
fn check(machine: &Machine) {
    let windows = machine.bus.windows();
    for addr in machine.board.doorbells() {
        assert!(windows.mmio32.contains(&addr), "a doorbell at {addr:#x}");
    }
    for (addr, len) in machine.board.mappings() {
        let is_inside = |window: &std::ops::Range<u64>| window.start <= addr && addr + len <= window.end;
        assert!(is_inside(&windows.mmio32) || is_inside(&windows.mmio64), "a mapping at {addr:#x}");
    }
    for slot in VICTIMS {
        let pci = Pci { machine, slot, way: Way::Ecam };
        assert_eq!((pci.u16(0), pci.u16(2)), (0x1af4, 0x107f));
        let types: Vec<_> = pci.capabilities().iter().map(|(id, _)| *id).collect();
        assert!(types.starts_with(&[0x11, 9, 9, 9, 9, 9]), "{types:?}");
    }
}

/// Puts the BARs of the victims back to where nobody is, as a guest would that boots again.
fn reassign(machine: &Machine) {
    let victims = VICTIMS.map(|slot| Pci { machine, slot, way: Way::Ports });
    // All leave first: they may lie where others belong.
    victims.iter().for_each(|pci| pci.write(4, &[0, 0]));
    for pci in victims {
        let at = 0xd000_0000 + pci.slot * 0x10_0000;
        for (offset, value) in [(0x10, at), (0x14, at + 0x8_0000), (0x20, pci.slot << 24), (0x24, 0x80)] {
            pci.write(offset, &value.to_le_bytes());
        }
    }
}

fn three() -> Machine {
    Machine::new(&[Echo::with_shared_memory(1, &[0x4000]), Echo::new(3), Echo::new(2)])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 400, ..ProptestConfig::default() })]

    #[test]
    fn garbage_hurts_nobody_else(rounds in prop::collection::vec(prop::collection::vec(access(), 1..120), 1..8)) {
        let machine = three();
        let mut neighbour = Driver::probe(&machine, NEIGHBOUR, Way::Ecam);
        neighbour.bring_up(0, 16);
        let theirs = addresses(&neighbour);
        for (round, accesses) in rounds.iter().enumerate() {
            let slot = VICTIMS[round % 2];
            reassign(&machine);
            Driver::probe(&machine, slot, Way::Ports).bring_up(0, 16);
            accesses.iter().for_each(|access| make(&machine, &theirs, access));
            check(&machine);
            neighbour.exercise(2);
            machine.board.take();
        }
        reassign(&machine);
        for slot in VICTIMS {
            let mut victim = Driver::probe(&machine, slot, Way::Ports);
            victim.bring_up(0, 16);
            victim.exercise(3);
        }
    }
}

#[test]
fn several_vcpus_at_once_hurt_nobody_else() {
    let machine = three();
    let mut neighbour = Driver::probe(&machine, NEIGHBOUR, Way::Ecam);
    neighbour.bring_up(0, 16);
    let theirs = addresses(&neighbour);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for seed in 0..3u8 {
            let (machine, theirs, done) = (&machine, &theirs, &done);
            scope.spawn(move || {
                let rng = proptest::test_runner::TestRng::from_seed(
                    proptest::test_runner::RngAlgorithm::ChaCha,
                    &[seed; 32],
                );
                let mut runner =
                    proptest::test_runner::TestRunner::new_with_rng(ProptestConfig::default(), rng);
                while !done.load(Ordering::Relaxed) {
                    let access = access().new_tree(&mut runner).unwrap().current();
                    // The latch of the ports is everybody's: another vCPU may aim it at the neighbour in between.
                    if !matches!(access, Access::Port { .. } | Access::Config { way: Way::Ports, .. }) {
                        make(machine, theirs, &access);
                    }
                }
            });
        }
        neighbour.exercise(250);
        done.store(true, Ordering::Relaxed);
    });
    check(&machine);
}

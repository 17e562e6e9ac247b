//! What a hostile guest does: writes of pseudo-random values to everything of two devices, by every way there is.
//!
//! Two things are kept out, because they would hurt the program itself and so prove nothing. Devices write where the
//! guest tells them to, so no value names memory below [`VICTIMS_MEMORY_MIN`]. A message that a device sends can be an
//! INIT or an NMI for the processor that writes garbage, so no byte of a value has one of its lowest three bits set,
//! but where the register is known.

use crate::device::{self, Ring, config, doorbells, registers, shared};
use crate::tiny::Program;

/// Slots of the devices that are written to.
pub(crate) const VICTIMS: [u32; 2] = [1, 2];
/// The slot of the one that is left alone.
pub(crate) const NEIGHBOUR: u32 = 3;
/// The lowest address that a device is told to use, apart from those of its rings in good times.
const VICTIMS_MEMORY_MIN: u32 = 0x0800_0000;
/// The rings of the victims: slot and queue choose one.
const RINGS: u32 = 0x1000_0000;
const QUEUES: u32 = 3;
const ADDRESS_PORT: u16 = 0xCF8;
const DATA_PORT: u16 = 0xCFC;

/// Pseudo-random numbers (splitmix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    fn below(&mut self, end: u32) -> u32 {
        (self.next() % u64::from(end)) as u32
    }

    fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u32) as usize]
    }

    /// A value that names no memory of the program and no message that stops it.
    fn harmless(&mut self) -> u32 {
        let value = match self.below(4) {
            0 => 0xC000_0000 | self.next() as u32 & 0x18FF_F800,
            1 => RINGS | self.next() as u32 & 0x000F_F000,
            2 => self.one_of(&[u32::MAX, 1 << 31, 0x8000_0000 | self.0 as u32]),
            _ => self.next() as u32,
        };
        (value & 0xF8F8_F8F8).max(VICTIMS_MEMORY_MIN)
    }
}

/// The memory of a victim's queue.
pub(crate) fn ring(slot: u32, queue: u32) -> Ring {
    Ring(RINGS + (slot * QUEUES + queue) * 0x8000)
}

/// Memory that hostile rings are in, before anything is written there: no descriptor in it names the program.
pub(crate) fn prepare(program: Program) -> Program {
    program.fill(RINGS, 0x1_8000, 0x1008_1000)
}

/// Appends `steps` steps to a program.
pub(crate) fn append(program: Program, random: &mut Random, steps: usize) -> Program {
    (0..steps).fold(program, |program, _| step(program, random))
}

fn step(program: Program, random: &mut Random) -> Program {
    let slot = random.one_of(&VICTIMS);
    match random.below(16) {
        0 => by_ecam(program, random),
        1 => by_ports(program, random),
        2 => {
            let any = random.one_of(&[registers(slot), doorbells(slot), shared(slot), config(slot)]);
            program.read(any + random.below(0x5000), random.one_of(&[1, 2, 4]))
        }
        3 | 4 => {
            let near = random.one_of(&[0, 0xFF8, 0x1FF8, 0x2FF8, 0x3FF8, 0x4010]);
            let at = registers(slot) + near + random.below(0x40);
            write(program, random, at)
        }
        5..8 => register(program, random, slot),
        8 | 9 => {
            let near = random.one_of(&[0, 0, 0x1000, 0x2000, 0x3000]);
            let offset = random.one_of(&[0, 0, 0, 2, 0xFFE]);
            write(program, random, doorbells(slot) + near + offset)
        }
        10 | 11 => in_ring(program, random, slot),
        12 => anywhere(program, random),
        13 => move_bar(program, random, slot),
        14 => device::place(program, &[slot]),
        _ => {
            let queue = random.below(QUEUES);
            let features = random.one_of(&[1, 1, 5, 9, 13, 0x101, 0x105, 1 << 30 | 1, 0]);
            let ring = ring(slot, queue);
            let program = device::place(program, &VICTIMS);
            let program = chains(program.write32(ring.avail(), 0), random, ring);
            let program = device::bring_up(program, slot, queue as u16, ring, features);
            let program = match random.below(3) {
                // Its doorbells move while it runs, onto the neighbour's too.
                0 => move_bar(program, random, slot),
                _ => program,
            };
            let doorbell = doorbells(slot) + queue * 0x1000;
            program.add(ring.avail(), (1 + random.below(4)) << 16).write16(doorbell, 0)
        }
    }
}

fn write(program: Program, random: &mut Random, at: u32) -> Program {
    let value = random.harmless();
    match random.below(3) {
        0 => program.write8(at, value as u8),
        1 => program.write16(at, value as u16),
        _ => program.write32(at, value),
    }
}

/// Any register of configuration space, the victims' and the host bridge's.
fn by_ecam(program: Program, random: &mut Random) -> Program {
    let slot = random.one_of(&[1, 1, 2, 2, 0, 31]);
    let offset = match random.below(3) {
        0 => random.below(0x1000),
        _ => random.below(0x104),
    };
    match offset {
        // Off or on; nothing else is there to be written.
        1..8 => program.write16(config(slot) + 4, random.one_of(&[0, 2, 6, 0xFFFF])),
        _ => write(program, random, config(slot) + offset),
    }
}

/// The same by ports. The address is never the neighbour's: another processor may write the data.
fn by_ports(program: Program, random: &mut Random) -> Program {
    let slot = random.one_of(&[1, 1, 2, 2, 0, 31]);
    let enable = random.one_of(&[1, 1, 1, 0]) << 31;
    let beyond = random.one_of(&[0, 0, 0, 1 << 16, 7 << 8, 0xFF << 16]);
    let program = program.out32(ADDRESS_PORT, enable | beyond | slot << 11 | random.below(256));
    let port = DATA_PORT + random.below(4) as u16;
    let value = random.harmless();
    match random.below(6) {
        0 => program.out8(port, value as u8),
        1 => program.out16(port, value as u16),
        2 => program.out32(port, value),
        // Not the latch, but its neighbours; 0xCF9 with a 4 in it resets the machine.
        3 => program.out8(ADDRESS_PORT + random.below(4) as u16, value as u8),
        4 => program.out16(ADDRESS_PORT + random.below(4) as u16, value as u16),
        _ => program.read_port(port, random.one_of(&[1, 2, 4])),
    }
}

/// A register of the common configuration, where it should be, with a value that means something.
fn register(program: Program, random: &mut Random, slot: u32) -> Program {
    let at = registers(slot);
    let small = random.below(0x20) as u16;
    match random.below(12) {
        0 => program.write8(at + 0x14, random.one_of(&[0, 0, 1, 3, 11, 15, 15, 128, 255])),
        1 => program.write16(at + 0x16, random.one_of(&[0, 1, 2, 3, 0xFFFF])),
        2 => program.write16(at + 0x18, random.one_of(&[0, 1, 2, 16, 255, 256, 257, 0x8000, 0xFFFF])),
        3 => program.write16(at + 0x1A, random.one_of(&[0, 1, 2, 3, 4, 0xFFFF])),
        4 | 5 => program.write16(at + 0x1C, random.one_of(&[1, 1, 1, 0, 2])),
        6 => program.write16(at + 0x3A, random.one_of(&[1, 1, 0])),
        7 => program.write16(at + 0x10, small),
        8 => program.write32(at + random.one_of(&[0, 8]), random.below(3)),
        9 => program.write32(at + 0xC, random.next() as u32),
        10 => {
            let offset = random.below(4);
            let (queue, value) = (random.below(QUEUES), random.harmless() & !0xFFF | (offset * 2));
            let address = random.one_of(&[ring(slot, queue).desc(), ring(slot, queue).used(), value]);
            let register = at + random.one_of(&[0x20, 0x28, 0x30]);
            program.write32(register, address.max(VICTIMS_MEMORY_MIN)).write32(register + 4, 0)
        }
        _ => program.write32(at + 0x4000 + 16 * random.below(4) + 12, random.below(2)),
    }
}

/// Chains that a device can do something with, though it may not like all of them.
fn chains(program: Program, random: &mut Random, ring: Ring) -> Program {
    (0..4).fold(program, |program, index| {
        let at = ring.desc() + 16 * index;
        let flags = random.one_of(&[0, 1, 1, 2, 2, 4]) | random.below(5) << 16;
        let program = program.write32(at, RINGS | random.harmless() & 0x00FF_FFFF).write32(at + 4, 0);
        let program =
            program.write32(at + 8, random.one_of(&[4, 64, 0x1000, 0x8000])).write32(at + 12, flags);
        program.write16(ring.avail() + 4 + 2 * index, random.below(4) as u16)
    })
}

/// A descriptor, an index, or any word of a ring.
fn in_ring(program: Program, random: &mut Random, slot: u32) -> Program {
    let ring = ring(slot, random.below(QUEUES));
    match random.below(4) {
        0 => {
            let at = ring.desc() + 16 * random.below(Ring::SIZE.into());
            let length = random.one_of(&[0, 1, 4, 0x1000, 0x10_0000, u32::MAX]);
            let flags = random.below(8) | random.below(u32::from(Ring::SIZE) + 2) << 16;
            program
                .write32(at, random.harmless())
                .write32(at + 4, 0)
                .write32(at + 8, length)
                .write32(at + 12, flags)
        }
        1 => program.add(ring.avail(), random.one_of(&[1, 1, 1, 2, 0xFFFF, 0x8000]) << 16),
        2 => program.write16(ring.avail() + 4 + 2 * random.below(16), random.below(18) as u16),
        _ => program.write32(ring.0 + 4 * random.below(0xC00), random.harmless()),
    }
}

/// An address in the window of PCI that was not given to the neighbour.
fn anywhere(program: Program, random: &mut Random) -> Program {
    let at = 0xC000_0000 + random.below(0x2000_0000 - 4);
    let theirs = registers(NEIGHBOUR) - 4..registers(NEIGHBOUR + 1);
    if theirs.contains(&at) { program } else { write(program, random, at) }
}

/// A BAR goes where it should not: onto another, over the edge, onto RAM, the interrupt controllers, itself.
fn move_bar(program: Program, random: &mut Random, slot: u32) -> Program {
    let bar = random.one_of(&[0x10, 0x14, 0x14, 0x14, 0x20]);
    let places = [
        registers(NEIGHBOUR),
        doorbells(NEIGHBOUR),
        doorbells(NEIGHBOUR),
        registers(3 - slot),
        doorbells(3 - slot),
        shared(slot),
        0xC000_0000 + (random.below(0x800) << 12),
        0xDFFF_F000,
        0xE000_0000,
        0xFEE0_0000,
        0x1000_0000,
        0,
    ];
    program.write32(config(slot) + bar, random.one_of(&places))
}

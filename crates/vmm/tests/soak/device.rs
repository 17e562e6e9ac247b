//! An echo device as a guest of a few instructions drives it: every address is fixed, and every step is a write.

use crate::tiny::Program;

/// Where the registers of the device in a slot are put.
pub(crate) fn registers(slot: u32) -> u32 {
    0xC800_0000 + slot * 0x10_0000
}

/// Where its notification pages are put.
pub(crate) fn doorbells(slot: u32) -> u32 {
    registers(slot) + 0x8_0000
}

/// Where its shared memory is put, if it has some.
pub(crate) fn shared(slot: u32) -> u32 {
    registers(slot) + 0x800_0000
}

/// A function's configuration space.
pub(crate) fn config(slot: u32) -> u32 {
    0xE000_0000 + (slot << 15)
}

/// The memory of one queue of a driver.
#[derive(Clone, Copy)]
pub(crate) struct Ring(pub(crate) u32);

impl Ring {
    pub(crate) const SIZE: u16 = 16;

    pub(crate) fn desc(self) -> u32 {
        self.0
    }

    pub(crate) fn avail(self) -> u32 {
        self.0 + 0x1000
    }

    pub(crate) fn used(self) -> u32 {
        self.0 + 0x2000
    }

    fn question(self) -> u32 {
        self.0 + 0x3000
    }

    fn answer(self) -> u32 {
        self.0 + 0x3800
    }
}

/// Lets no device answer, then puts each where it belongs, and lets it answer there.
pub(crate) fn place(program: Program, slots: &[u32]) -> Program {
    let off = slots.iter().fold(program, |program, &slot| program.write16(config(slot) + 4, 0));
    slots.iter().fold(off, |program, &slot| {
        program
            .write32(config(slot) + 0x10, registers(slot))
            .write32(config(slot) + 0x14, doorbells(slot))
            .write32(config(slot) + 0x20, shared(slot))
            .write32(config(slot) + 0x24, 0)
            .write16(config(slot) + 4, 6)
    })
}

/// Brings up a device with one queue. `features` are the upper 32: 1 is VIRTIO_F_VERSION_1.
pub(crate) fn bring_up(program: Program, slot: u32, queue: u16, ring: Ring, features: u32) -> Program {
    let at = registers(slot);
    let program = program.write8(at + 0x14, 0).write8(at + 0x14, 3);
    let program =
        program.write32(at + 8, 0).write32(at + 0xC, 0).write32(at + 8, 1).write32(at + 0xC, features);
    let program = program.write8(at + 0x14, 11).write16(at + 0x16, queue).write16(at + 0x18, Ring::SIZE);
    let addresses = [(0x20, ring.desc()), (0x28, ring.avail()), (0x30, ring.used())];
    let program = addresses.into_iter().fold(program, |program, (register, address)| {
        program.write32(at + register, address).write32(at + register + 4, 0)
    });
    program.write16(at + 0x1A, 0).write16(at + 0x1C, 1).write8(at + 0x14, 15)
}

/// Clears a ring, and makes its first chain a question of one word and room for its answer.
pub(crate) fn prepare(program: Program, ring: Ring) -> Program {
    const NEXT: u32 = 1;
    const WRITE: u32 = 2;
    let descriptors = [[ring.question(), 0, 4, 1 << 16 | NEXT], [ring.answer(), 0, 4, WRITE]];
    let words = (ring.desc()..).step_by(4).zip(descriptors.into_iter().flatten());
    words.fold(program.fill(ring.0, 0x1000, 0), |program, (at, word)| program.write32(at, word))
}

/// One question that was never asked before, and its answer. The machine ends with `status` if that is another.
pub(crate) fn ask(program: Program, slot: u32, ring: Ring, status: u8) -> Program {
    program
        .increment(ring.question())
        .add(ring.avail(), 1 << 16)
        .write16(doorbells(slot), 0)
        .wait_until_equal16(ring.avail() + 2, ring.used() + 2)
        .exit_unless_equal(ring.question(), ring.answer(), status)
}

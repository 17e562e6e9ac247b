//! The configuration space of a function: a type 0 header, base address registers, capabilities.
//!
//! It is an array of bytes with a mask that says which bits the guest may write, so that an access of any length at any
//! offset is that many accesses of one byte. Sizing a BAR needs nothing more: the bits below its size cannot be
//! written. Registers that do something are their owner's affair: it looks at them after each write.
//!
//! Sources: PCI Local Bus Specification 3.0, chapter 6; PCI Express Base Specification, section 7.5.1.

use std::ops::Range;

/// Bytes of a function's configuration space in ECAM. What lies beyond the first 256 reads as zero: no extended
/// capabilities.
const SPACE_BYTES: usize = 4096;
const HEADER_BYTES: usize = 0x40;
const REGISTERS_BYTES: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const CACHE_LINE_SIZE: usize = 0x0c;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;

/// The function answers to the addresses in its BARs.
const COMMAND_MEMORY: u16 = 1 << 1;
/// Stored, and of no effect: devices reach memory whether it is set or not.
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_NO_INTX: u16 = 1 << 10;
const STATUS_HAS_CAPABILITIES: u16 = 1 << 4;

const BAR_64_BIT: u32 = 2 << 1;
const BAR_PREFETCHABLE: u32 = 1 << 3;
const BAR_FLAGS: u64 = 0xf;
/// BARs that a function has.
pub(crate) const BARS: usize = 6;
/// The smallest BAR: nothing else is in a page that a guest may map.
const BAR_BYTES_MIN: u64 = 4096;

/// What a function says it is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Who made it.
    pub vendor: u16,
    /// What it is.
    pub device: u16,
    /// Its revision.
    pub revision: u8,
    /// Base class, subclass and programming interface, from the highest byte of three down.
    pub class: u32,
    /// Who made the board.
    pub subsystem_vendor: u16,
    /// The board.
    pub subsystem: u16,
}

/// A range of addresses that a function wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Its register, 0 to 5. One of 64 bits takes the next as well.
    pub index: usize,
    /// Its size in bytes: a power of two, at least 4096.
    pub size: u64,
    /// It may be placed above 4 GiB.
    pub is_64_bit: bool,
    /// It is memory: reads have no side effects.
    pub prefetchable: bool,
}

/// A function that cannot be laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// A BAR that cannot be.
    #[error(
        "BAR {index} of {size} bytes: registers are 0 to 5 and used once; sizes are powers of two from 4096, below 4 GiB \
         for one of 32 bits"
    )]
    Bar {
        /// Its register.
        index: usize,
        /// Its size in bytes.
        size: u64,
    },
    /// More capabilities than fit.
    #[error("a capability of {bytes} bytes at {at:#x}: capabilities end below {REGISTERS_BYTES:#x}")]
    Capability {
        /// Where it would be.
        at: usize,
        /// Its length.
        bytes: usize,
    },
}

/// The registers of a function.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    registers: [u8; REGISTERS_BYTES],
    writable: [u8; REGISTERS_BYTES],
    bars: [Option<Bar>; BARS],
    /// The byte that points to the next capability.
    link: usize,
    /// Where the next capability goes.
    end: usize,
}

impl ConfigSpace {
    /// A function without BARs and capabilities.
    #[must_use]
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            registers: [0; REGISTERS_BYTES],
            writable: [0; REGISTERS_BYTES],
            bars: [None; BARS],
            link: CAPABILITIES,
            end: HEADER_BYTES,
        };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(0x08, &[identity.revision]);
        space.put(0x09, &identity.class.to_le_bytes()[..3]);
        space.put(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_NO_INTX;
        space.allow(COMMAND, &command.to_le_bytes());
        space.allow(CACHE_LINE_SIZE, &[0xff]);
        space.allow(INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Adds a BAR.
    ///
    /// # Errors
    /// [`LayoutError::Bar`].
    pub fn add_bar(&mut self, bar: Bar) -> Result<(), LayoutError> {
        let Bar { index, size, .. } = bar;
        let registers = index..index.saturating_add(if bar.is_64_bit { 2 } else { 1 });
        let is_free = registers.end <= BARS && !registers.clone().any(|index| self.is_used(index));
        let fits = size.is_power_of_two() && size >= BAR_BYTES_MIN && (bar.is_64_bit || size < 1 << 32);
        if !is_free || !fits {
            return Err(LayoutError::Bar { index, size });
        }
        let flags =
            if bar.is_64_bit { BAR_64_BIT } else { 0 } | if bar.prefetchable { BAR_PREFETCHABLE } else { 0 };
        let at = BAR0 + 4 * index;
        let mask = !(size - 1);
        self.put(at, &flags.to_le_bytes());
        self.allow(at, &mask.to_le_bytes()[..4 * registers.len()]);
        self.bars[index] = Some(bar);
        Ok(())
    }

    fn is_used(&self, index: usize) -> bool {
        let before = index.checked_sub(1).and_then(|before| self.bars[before]);
        self.bars[index].is_some() || before.is_some_and(|bar| bar.is_64_bit)
    }

    /// Adds a capability of type `id`; `body` is what follows its two bytes of header, `writable` which of its bits the
    /// guest may write. Returns where it is.
    ///
    /// # Errors
    /// [`LayoutError::Capability`].
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<u16, LayoutError> {
        let at = self.end;
        let bytes = 2 + body.len().max(writable.len());
        if at + bytes > REGISTERS_BYTES {
            return Err(LayoutError::Capability { at, bytes });
        }
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        self.put(self.link, &[at as u8]);
        let status = STATUS_HAS_CAPABILITIES | u16::from_le_bytes(self.get(STATUS));
        self.put(STATUS, &status.to_le_bytes());
        self.link = at + 1;
        self.end = (at + bytes).next_multiple_of(4);
        Ok(at as u16)
    }

    /// What the guest reads at `offset`.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (at, byte) in (usize::from(offset)..).zip(data) {
            let beyond = if at < SPACE_BYTES { 0 } else { 0xff };
            *byte = self.registers.get(at).copied().unwrap_or(beyond);
        }
    }

    /// The guest writes at `offset`.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (at, byte) in (usize::from(offset)..).zip(data) {
            if let (Some(register), Some(mask)) = (self.registers.get_mut(at), self.writable.get(at)) {
                *register = *register & !mask | byte & mask;
            }
        }
    }

    /// `N` bytes of the registers; zeros beyond their end.
    #[must_use]
    pub fn get<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut bytes = [0; N];
        for (at, byte) in (offset..).zip(&mut bytes) {
            *byte = self.registers.get(at).copied().unwrap_or(0);
        }
        bytes
    }

    /// Sets registers, those that the guest cannot write too.
    pub fn put(&mut self, offset: usize, bytes: &[u8]) {
        for (at, byte) in (offset..).zip(bytes) {
            if let Some(register) = self.registers.get_mut(at) {
                *register = *byte;
            }
        }
    }

    fn allow(&mut self, offset: usize, mask: &[u8]) {
        for (at, mask) in (offset..).zip(mask) {
            if let Some(writable) = self.writable.get_mut(at) {
                *writable = *mask;
            }
        }
    }

    /// The BARs there are.
    pub fn bars(&self) -> impl Iterator<Item = Bar> {
        self.bars.iter().flatten().copied()
    }

    /// A BAR, by its register.
    #[must_use]
    pub fn bar(&self, index: usize) -> Option<Bar> {
        self.bars.get(index).copied().flatten()
    }

    /// The addresses that are in a BAR now, if the function answers to them.
    #[must_use]
    pub fn decoded(&self, bar: &Bar) -> Option<Range<u64>> {
        let command = u16::from_le_bytes(self.get(COMMAND));
        let start = self.address(bar);
        (command & COMMAND_MEMORY != 0).then_some(start..start.checked_add(bar.size)?)
    }

    /// The address in a BAR.
    #[must_use]
    pub fn address(&self, bar: &Bar) -> u64 {
        let at = BAR0 + 4 * bar.index;
        let value = match bar.is_64_bit {
            true => u64::from_le_bytes(self.get(at)),
            false => u32::from_le_bytes(self.get(at)).into(),
        };
        value & !BAR_FLAGS
    }

    /// Writes an address to a BAR, as firmware does.
    pub fn assign(&mut self, bar: &Bar, address: u64) {
        self.write(
            (BAR0 + 4 * bar.index) as u16,
            &address.to_le_bytes()[..if bar.is_64_bit { 8 } else { 4 }],
        );
    }
}

/// Reads bytes at an offset; what lies beyond their end is zero.
pub(crate) fn read_at(bytes: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let there = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..)).unwrap_or(&[]);
    let len = there.len().min(data.len());
    data[..len].copy_from_slice(&there[..len]);
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: Identity = Identity {
        vendor: 0x1af4,
        device: 0x1042,
        revision: 1,
        class: 0x01_80_00,
        subsystem_vendor: 0x1af4,
        subsystem: 0x42,
    };

    fn bar(index: usize, size: u64, is_64_bit: bool) -> Bar {
        Bar { index, size, is_64_bit, prefetchable: is_64_bit }
    }

    fn read<const N: usize>(space: &ConfigSpace, offset: u16) -> [u8; N] {
        let mut data = [0xa5; N];
        space.read(offset, &mut data);
        data
    }

    #[test]
    fn the_header_says_what_it_is() {
        let space = ConfigSpace::new(&IDENTITY);
        assert_eq!(read(&space, 0), [0xf4, 0x1a, 0x42, 0x10]);
        assert_eq!(read(&space, 8), [1, 0, 0x80, 1]);
        assert_eq!(read(&space, 0x2c), [0xf4, 0x1a, 0x42, 0]);
        assert_eq!(read(&space, 0x0e), [0], "header type 0, one function");
        assert_eq!(read(&space, 0x3d), [0], "no interrupt pin");
        assert_eq!(read(&space, 0x100), [0; 4], "no extended capabilities");
    }

    #[test]
    fn a_bar_is_sized_by_writing_ones() {
        let mut space = ConfigSpace::new(&IDENTITY);
        space.add_bar(bar(0, 0x8000, false)).unwrap();
        space.add_bar(bar(4, 1 << 33, true)).unwrap();
        space.write(0x10, &[0xff; 4]);
        assert_eq!(u32::from_le_bytes(read(&space, 0x10)), 0xffff_8000);
        space.write(0x14, &[0xff; 4]);
        assert_eq!(read(&space, 0x14), [0; 4], "there is no BAR 1");
        space.write(0x20, &[0xff; 4]);
        space.write(0x24, &[0xff; 4]);
        assert_eq!(u32::from_le_bytes(read(&space, 0x20)), 0xc);
        assert_eq!(u32::from_le_bytes(read(&space, 0x24)), 0xffff_fffe);
    }

    #[test]
    fn a_bar_decodes_only_while_memory_is_enabled() {
        let mut space = ConfigSpace::new(&IDENTITY);
        let low = bar(1, 0x1000, false);
        space.add_bar(low).unwrap();
        space.write(0x14, &0xc123_4567u32.to_le_bytes());
        assert_eq!(space.address(&low), 0xc123_4000);
        assert_eq!(space.decoded(&low), None);
        space.write(4, &[0xff, 0xff]);
        assert_eq!(u16::from_le_bytes(read(&space, 4)), 0x406);
        assert_eq!(space.decoded(&low), Some(0xc123_4000..0xc123_5000));
        space.write(4, &[0]);
        assert_eq!(space.decoded(&low), None);
    }

    #[test]
    fn a_bar_at_the_end_of_the_address_space_decodes_nothing() {
        let mut space = ConfigSpace::new(&IDENTITY);
        let high = bar(2, 0x1000, true);
        space.add_bar(high).unwrap();
        space.write(0x18, &[0xff; 8]);
        space.write(4, &[2]);
        assert_eq!(space.address(&high), !0xfff);
        assert_eq!(space.decoded(&high), None);
    }

    #[test]
    fn impossible_bars_are_refused() {
        let mut space = ConfigSpace::new(&IDENTITY);
        space.add_bar(bar(2, 0x1000, true)).unwrap();
        for wrong in [
            bar(3, 0x1000, false),
            bar(2, 0x1000, false),
            bar(1, 0x1000, true),
            bar(5, 0x1000, true),
            bar(6, 0x1000, false),
            bar(usize::MAX, 0x1000, true),
            bar(0, 0x1800, false),
            bar(0, 0x800, false),
            bar(0, 1 << 32, false),
        ] {
            assert!(space.add_bar(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn capabilities_are_a_list() {
        let mut space = ConfigSpace::new(&IDENTITY);
        assert_eq!(read(&space, 6), [0]);
        let first = space.add_capability(0x11, &[1, 2, 3], &[0, 0x80]).unwrap();
        let second = space.add_capability(9, &[4], &[]).unwrap();
        assert_eq!(read(&space, 6), [0x10]);
        assert_eq!(read(&space, 0x34), [first as u8]);
        assert_eq!(read(&space, first), [0x11, second as u8, 1, 2, 3]);
        assert_eq!(read(&space, second), [9, 0, 4]);
        space.write(first, &[0xff; 5]);
        assert_eq!(read(&space, first), [0x11, second as u8, 1, 0x82, 3]);
        assert!(space.add_capability(9, &[0; 200], &[]).is_err());
    }

    #[test]
    fn any_access_is_accesses_of_bytes() {
        let mut space = ConfigSpace::new(&IDENTITY);
        space.add_bar(bar(0, 0x1000, false)).unwrap();
        space.write(0x0f, &[0xff; 8]);
        assert_eq!(u32::from_le_bytes(read(&space, 0x10)), 0xffff_f000);
        assert_eq!(read(&space, 0xfe), [0; 8]);
        assert_eq!(read(&space, 0xffc), [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        space.write(0xffff, &[0xff; 8]);
        assert_eq!(read(&space, 0xffff), [0xff; 8]);
    }
}

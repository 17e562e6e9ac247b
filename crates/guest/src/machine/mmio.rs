//! Registers of devices in memory.
//!
//! A [`Window`] is a range of physical addresses that a device answers, mapped before the window is made. Reads and
//! writes are single plain instructions, which hypervisors emulate without surprises, and their offsets are checked,
//! so no access leaves the window. Registers are not memory of this program: nothing it holds can change by them but
//! what a driver told a device to write.
#![allow(unsafe_code)]

use core::arch::asm;

use super::paging::{self, PagingError};

/// A range of registers.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    base: usize,
    len: usize,
}

macro_rules! access {
    ($read:ident, $write:ident, $type:ty, $class:ident, $template:literal) => {
        /// Reads the register at `offset`.
        #[inline(always)]
        #[must_use]
        pub fn $read(&self, offset: usize) -> $type {
            let address = self.address(offset, size_of::<$type>());
            let value;
            // SAFETY: the address is in a window that is mapped; see the header.
            unsafe { asm!(concat!("mov {0", $template, "}, [{1}]"), out($class) value, in(reg) address) };
            value
        }

        /// Writes the register at `offset`.
        #[inline(always)]
        pub fn $write(&self, offset: usize, value: $type) {
            let address = self.address(offset, size_of::<$type>());
            // SAFETY: as for reading.
            unsafe { asm!(concat!("mov [{0}], {1", $template, "}"), in(reg) address, in($class) value) };
        }
    };
}

impl Window {
    /// Maps the `len` bytes of registers at a physical address.
    ///
    /// # Errors
    /// The range cannot be mapped.
    pub fn new(physical: u64, len: u64) -> Result<Self, PagingError> {
        paging::map(physical, len)?;
        Ok(Self { base: physical as usize, len: len as usize })
    }

    /// The part of the window that begins at `offset`, at most `len` bytes of it.
    #[must_use]
    pub fn part(&self, offset: usize, len: usize) -> Self {
        let offset = offset.min(self.len);
        Self { base: self.base + offset, len: len.min(self.len - offset) }
    }

    /// Its length in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.len
    }

    access!(read8, write8, u8, reg_byte, "");
    access!(read16, write16, u16, reg, ":x");
    access!(read32, write32, u32, reg, ":e");

    /// Writes 64 bits as two halves, the lower first.
    pub fn write64(&self, offset: usize, value: u64) {
        self.write32(offset, value as u32);
        self.write32(offset + 4, (value >> 32) as u32);
    }

    #[inline(always)]
    fn address(&self, offset: usize, size: usize) -> usize {
        assert!(offset < self.len && self.len - offset >= size, "register {offset:#x} of {:#x}", self.len);
        self.base + offset
    }
}

//! How an access names a register: by address and data port, or by memory address.
//!
//! Configuration mechanism #1 (PCI Local Bus Specification 3.0, section 3.2.2.3.2) has a latch that one vCPU can change
//! under another, as on hardware; ECAM (PCI Express Base Specification, section 7.2.2) has none. There is one bus.

use std::sync::atomic::{AtomicU32, Ordering};

/// Devices on the bus.
pub const SLOTS_MAX: usize = 32;
/// The address port.
const ADDRESS_PORT: u16 = 0xcf8;
/// The first of the four data ports.
const DATA_PORT: u16 = 0xcfc;
/// Bit of the address port: the data ports are configuration space.
const ENABLE: u32 = 1 << 31;
/// Configuration space of one function in ECAM.
const FUNCTION_BYTES: u64 = 4096;

/// Bytes of a function's configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The device.
    pub(crate) slot: usize,
    /// Offset of the first byte.
    pub(crate) offset: u16,
    /// How many of an access's bytes are in the same function's space.
    pub(crate) len: usize,
}

/// What a port access means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Port {
    /// The address latch.
    Address,
    /// Configuration space, or nothing.
    Data(Option<Place>),
    /// Not PCI's.
    Other,
}

/// The address latch.
#[derive(Debug, Default)]
pub(crate) struct Mechanism1(AtomicU32);

impl Mechanism1 {
    /// The meaning of `len` bytes at `port`.
    pub(crate) fn decode(&self, port: u16, len: usize) -> Port {
        match port {
            // Shorter accesses are no accesses to the latch: a byte at 0xcf9 is the reset register.
            ADDRESS_PORT if len == 4 => Port::Address,
            DATA_PORT..=0xcff => {
                let lane = port - DATA_PORT;
                let address = self.0.load(Ordering::Relaxed);
                let register = (address & 0xfc) as u16 + lane;
                let function = u64::from(address >> 8 & 0xffff);
                let place = (address & ENABLE != 0).then(|| place(function, register, len)).flatten();
                // The last data port is the last: what an access asks for beyond it is nobody's.
                let clipped = place.map(|place| Place { len: place.len.min(4 - usize::from(lane)), ..place });
                Port::Data(clipped)
            }
            _ => Port::Other,
        }
    }

    /// Reads the latch.
    pub(crate) fn address(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }

    /// Writes the latch. Its reserved bits read as zero.
    pub(crate) fn set_address(&self, address: u32) {
        self.0.store(address & 0x80ff_fffc, Ordering::Relaxed);
    }
}

/// The meaning of `len` bytes at an offset in ECAM; None if no function can be there.
pub(crate) fn ecam(offset: u64, len: usize) -> Option<Place> {
    place(offset / FUNCTION_BYTES, (offset % FUNCTION_BYTES) as u16, len)
}

/// `function` is bus, device and function number. Each device has one function, and there is one bus.
fn place(function: u64, offset: u16, len: usize) -> Option<Place> {
    let (slot, function) = ((function >> 3) as usize, function & 7);
    let left = FUNCTION_BYTES as usize - usize::from(offset);
    (function == 0 && slot < SLOTS_MAX).then_some(Place { slot, offset, len: len.min(left) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(slot: usize, offset: u16, len: usize) -> Option<Place> {
        Some(Place { slot, offset, len })
    }

    #[test]
    fn ports_name_a_register_while_enabled() {
        let latch = Mechanism1::default();
        assert_eq!(latch.decode(0xcf8, 4), Port::Address);
        assert_eq!(latch.decode(0xcfc, 4), Port::Data(None));
        latch.set_address(0x8000_1814);
        assert_eq!(latch.address(), 0x8000_1814);
        assert_eq!(latch.decode(0xcfc, 4), Port::Data(at(3, 0x14, 4)));
        assert_eq!(latch.decode(0xcfd, 1), Port::Data(at(3, 0x15, 1)));
        assert_eq!(latch.decode(0xcfe, 2), Port::Data(at(3, 0x16, 2)));
        assert_eq!(latch.decode(0xcfe, 4), Port::Data(at(3, 0x16, 2)), "clipped to the data ports");
        latch.set_address(0x1814);
        assert_eq!(latch.decode(0xcfc, 4), Port::Data(None));
    }

    #[test]
    fn other_ports_and_lengths_are_left_alone() {
        let latch = Mechanism1::default();
        for (port, len) in [(0xcf8, 1), (0xcf8, 2), (0xcf8, 8), (0xcf9, 1), (0xcfa, 2), (0xcfb, 1)] {
            assert_eq!(latch.decode(port, len), Port::Other, "{len} bytes at {port:#x}");
        }
        assert_eq!(latch.decode(0xd00, 4), Port::Other);
        assert_eq!(latch.decode(0xcf7, 4), Port::Other);
    }

    #[test]
    fn reserved_bits_of_the_latch_read_as_zero() {
        let latch = Mechanism1::default();
        latch.set_address(u32::MAX);
        assert_eq!(latch.address(), 0x80ff_fffc);
        assert_eq!(latch.decode(0xcfc, 4), Port::Data(None), "bus 255");
    }

    #[test]
    fn other_functions_and_buses_do_not_exist() {
        assert_eq!(ecam(0x0001_9010, 4), None, "function 1 of device 3");
        assert_eq!(ecam(0x0001_8010, 4), at(3, 0x10, 4));
        assert_eq!(ecam(31 << 15, 1), at(31, 0, 1));
        assert_eq!(ecam(1 << 20, 4), None, "bus 1");
        assert_eq!(ecam(u64::MAX, 8), None);
        let latch = Mechanism1::default();
        latch.set_address(0x8001_1800);
        assert_eq!(latch.decode(0xcfc, 4), Port::Data(None), "bus 1");
    }

    #[test]
    fn an_access_stays_in_its_function() {
        assert_eq!(ecam(0x1_8ffe, 8), at(3, 0xffe, 2));
        assert_eq!(ecam(0x1_8fff, 1), at(3, 0xfff, 1));
    }
}

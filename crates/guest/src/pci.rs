//! Devices on PCI bus 0, through configuration mechanism 1 (PCI Local Bus 3.0, section 3.2.2.3.2; 6.1 and 6.2).

use alloc::vec::Vec;

use crate::machine::mmio::Window;
use crate::machine::paging::PagingError;
use crate::machine::service;
use crate::machine::sync::Spin;

const ADDRESS: u16 = 0xCF8;
const DATA: u16 = 0xCFC;
const ENABLE: u32 = 1 << 31;

const COMMAND: u8 = 0x04;
/// Memory and bus master; no port range, no interrupt line.
const COMMAND_ON: u32 = 0x406;
const HEADER_TYPE: u8 = 0x0E;
const MULTIFUNCTION: u8 = 0x80;
const BARS: u8 = 0x10;
const BAR_COUNT: u8 = 6;
const STATUS: u8 = 0x06;
const STATUS_CAPABILITIES: u8 = 0x10;
const CAPABILITIES: u8 = 0x34;
const DEVICES: u8 = 32;
const FUNCTIONS: u8 = 8;
/// More capabilities than fit in a configuration space: they form a loop.
const CAPABILITIES_MAX: usize = 48;

/// Where registers go that nobody has placed: the 32-bit window for them, from its start.
static UNPLACED: Spin<u64> = Spin::new(0xC000_0000);
const UNPLACED_END: u64 = 0xE000_0000;

/// Why a device's registers cannot be reached.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are the values named in each message")]
pub enum PciError {
    /// A capability points to a BAR that is not one.
    #[error("BAR {0} is not for memory")]
    NoMemoryBar(u8),
    /// The window for registers is full.
    #[error("no room for BAR {bar} of {bytes:#x} bytes")]
    NoRoom { bar: u8, bytes: u64 },
    /// It cannot be mapped.
    #[error(transparent)]
    Paging(#[from] PagingError),
}

/// A function's configuration space, in aligned words of 32 bits.
pub trait ConfigSpace {
    /// Reads the word at `at`, a multiple of 4.
    fn read(&self, at: u8) -> u32;
    /// Writes it.
    fn write(&self, at: u8, value: u32);

    /// The byte at `at`.
    fn byte(&self, at: u8) -> u8 {
        (self.read(at & !3) >> (8 * (at & 3))) as u8
    }
}

/// A function on bus 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function {
    device: u8,
    function: u8,
}

impl Function {
    fn select(&self, at: u8) {
        let address = u32::from(self.device) << 11 | u32::from(self.function) << 8 | u32::from(at & !3);
        service::out32(ADDRESS, ENABLE | address);
    }
}

impl ConfigSpace for Function {
    fn read(&self, at: u8) -> u32 {
        self.select(at);
        service::in32(DATA)
    }

    fn write(&self, at: u8, value: u32) {
        self.select(at);
        service::out32(DATA, value);
    }
}

/// All functions, with vendor and device id.
#[must_use]
pub fn scan() -> Vec<(Function, u16, u16)> {
    let mut found = Vec::new();
    for device in 0..DEVICES {
        for function in 0..FUNCTIONS {
            let here = Function { device, function };
            let id = here.read(0);
            if id & 0xFFFF != 0xFFFF {
                found.push((here, id as u16, (id >> 16) as u16));
            }
            let only = id & 0xFFFF == 0xFFFF || here.byte(HEADER_TYPE) & MULTIFUNCTION == 0;
            if function == 0 && only {
                break;
            }
        }
    }
    found
}

/// Where a function's capabilities are, with their ids.
pub fn capabilities(space: &impl ConfigSpace) -> Vec<(u8, u8)> {
    let mut found = Vec::new();
    if space.byte(STATUS) & STATUS_CAPABILITIES == 0 {
        return found;
    }
    let mut at = space.byte(CAPABILITIES) & !3;
    while at >= 0x40 && found.len() < CAPABILITIES_MAX {
        let head = space.read(at);
        found.push((head as u8, at));
        at = (head >> 8) as u8 & !3;
    }
    found
}

/// Lets the function answer memory accesses, make its own, and send interrupt messages.
pub fn turn_on(space: &impl ConfigSpace) {
    space.write(COMMAND, COMMAND_ON);
}

/// The part of a BAR that a capability describes, placed if nobody has.
///
/// # Errors
/// The BAR is none for memory, or cannot be placed or mapped.
pub fn window(space: &impl ConfigSpace, bar: u8, offset: u32, len: u32) -> Result<Window, PciError> {
    let address = address(space, bar)?;
    let start = address.checked_add(offset.into()).ok_or(PciError::NoMemoryBar(bar))?;
    Ok(Window::new(start, len.into())?)
}

fn address(space: &impl ConfigSpace, bar: u8) -> Result<u64, PciError> {
    if bar >= BAR_COUNT {
        return Err(PciError::NoMemoryBar(bar));
    }
    let at = BARS + 4 * bar;
    let low = space.read(at);
    let wide = low & 6 == 4;
    if low & 1 != 0 || (wide && bar + 1 >= BAR_COUNT) {
        return Err(PciError::NoMemoryBar(bar));
    }
    let high = if wide { space.read(at + 4) } else { 0 };
    match u64::from(low & !0xF) | u64::from(high) << 32 {
        0 => place(space, bar, wide),
        address => Ok(address),
    }
}

fn place(space: &impl ConfigSpace, bar: u8, wide: bool) -> Result<u64, PciError> {
    let at = BARS + 4 * bar;
    space.write(at, u32::MAX);
    let low = space.read(at) & !0xF;
    let high = if wide {
        space.write(at + 4, u32::MAX);
        space.read(at + 4)
    } else {
        u32::MAX
    };
    let bytes = (!(u64::from(low) | u64::from(high) << 32)).wrapping_add(1);
    if low == 0 && high == u32::MAX || bytes == 0 {
        return Err(PciError::NoMemoryBar(bar));
    }
    let mut next = UNPLACED.lock();
    let start = next.checked_next_multiple_of(bytes);
    let end = start.and_then(|start| start.checked_add(bytes)).filter(|&end| end <= UNPLACED_END);
    let (Some(start), Some(end)) = (start, end) else { return Err(PciError::NoRoom { bar, bytes }) };
    *next = end;
    space.write(at, start as u32);
    if wide {
        space.write(at + 4, 0);
    }
    Ok(start)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::RefCell;
    use std::vec;

    use super::*;

    /// A configuration space in memory whose BARs have sizes.
    pub(crate) struct Space {
        pub(crate) words: RefCell<[u32; 64]>,
        pub(crate) sizes: [u32; 6],
    }

    impl Space {
        pub(crate) fn new() -> Self {
            Self { words: RefCell::new([0; 64]), sizes: [0; 6] }
        }

        pub(crate) fn set(&self, at: u8, value: u32) {
            self.words.borrow_mut()[usize::from(at / 4)] = value;
        }
    }

    impl ConfigSpace for Space {
        fn read(&self, at: u8) -> u32 {
            self.words.borrow()[usize::from(at / 4)]
        }

        fn write(&self, at: u8, value: u32) {
            let mut words = self.words.borrow_mut();
            let word = &mut words[usize::from(at / 4)];
            *word = match self.sizes.get(usize::from(at / 4).wrapping_sub(4)) {
                Some(&bytes) if bytes != 0 => value & !(bytes - 1) | *word & 0xF,
                Some(_) if *word & 0xF == 0 => value,
                _ => value,
            };
        }
    }

    #[test]
    fn capabilities_are_followed_and_loops_end() {
        let space = Space::new();
        assert!(capabilities(&space).is_empty());
        space.set(0x04, u32::from(STATUS_CAPABILITIES) << 16);
        space.set(0x34, 0x41);
        space.set(0x40, 0x5009);
        space.set(0x50, 0x0011);
        assert_eq!(capabilities(&space), vec![(9, 0x40), (0x11, 0x50)]);
        space.set(0x50, 0x4011);
        assert_eq!(capabilities(&space).len(), CAPABILITIES_MAX);
    }

    #[test]
    fn a_placed_bar_is_found_where_it_is() {
        let space = Space::new();
        space.set(0x10, 0xFEBF_0000);
        space.set(0x14, 0x1000_000C);
        space.set(0x18, 0x80);
        space.set(0x1C, 0xC001);
        assert_eq!(address(&space, 0).unwrap(), 0xFEBF_0000);
        assert_eq!(address(&space, 1).unwrap(), 0x80_1000_0000);
        assert!(matches!(address(&space, 3), Err(PciError::NoMemoryBar(3))), "a BAR for ports");
        assert!(matches!(address(&space, 6), Err(PciError::NoMemoryBar(6))));
    }

    #[test]
    fn bars_that_nobody_placed_are_placed_side_by_side() {
        let mut space = Space::new();
        space.sizes = [0x1000, 0x4000, 0, 0, 0, 0];
        space.set(0x14, 4);
        let (first, second) = (address(&space, 0).unwrap(), address(&space, 1).unwrap());
        assert!(first % 0x1000 == 0 && second % 0x4000 == 0, "{first:#x} {second:#x}");
        assert!(second >= first + 0x1000 || first >= second + 0x4000);
        assert_eq!(u64::from(space.read(0x10)), first);
        assert_eq!(u64::from(space.read(0x14) & !0xF), second);
        assert_eq!(address(&space, 1).unwrap(), second, "it stays there");
    }
}

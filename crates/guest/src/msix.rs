//! Interrupt messages of a PCI function (MSI-X; PCI Local Bus 3.0, section 6.8.2).

use crate::machine::mmio::Window;
use crate::pci::{self, ConfigSpace, PciError};

/// The capability's id.
pub const CAPABILITY: u8 = 0x11;
const ENABLE: u32 = 1 << 31;
const MASK_ALL: u32 = 1 << 30;
const ENTRY_BYTES: usize = 16;

/// The messages of a function.
pub struct Msix {
    control: u8,
    entries: u16,
    table: Window,
}

impl Msix {
    /// Those that the capability at `at` describes.
    ///
    /// # Errors
    /// Their table cannot be reached.
    pub fn new(function: &impl ConfigSpace, at: u8) -> Result<Self, PciError> {
        let entries = (function.read(at) >> 16) as u16 % 2048 + 1;
        let place = function.read(at + 4);
        let bytes = u32::from(entries) * ENTRY_BYTES as u32;
        let table = pci::window(function, (place & 7) as u8, place & !7, bytes)?;
        Ok(Self { control: at, entries, table })
    }

    /// How many there are.
    #[must_use]
    pub fn entries(&self) -> u16 {
        self.entries
    }

    /// Makes the function send `value` to `address` as message `entry`, which is below [`Msix::entries`].
    pub fn set(&self, entry: u16, address: u64, value: u32) {
        let at = usize::from(entry) * ENTRY_BYTES;
        self.table.write64(at, address);
        self.table.write32(at + 8, value);
        self.table.write32(at + 12, 0);
    }

    /// Sends messages from now on.
    pub fn turn_on(&self, function: &impl ConfigSpace) {
        let control = function.read(self.control) & !MASK_ALL;
        function.write(self.control, control | ENABLE);
    }
}

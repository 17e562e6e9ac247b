//! The configuration access capability: a window of up to four bytes from configuration space into a BAR, for drivers
//! that cannot reach the BARs yet (virtio 1.2, section 4.1.4.9).

use std::ops::Range;

use super::layout::SHARED_BAR;
use crate::pci::config_space::ConfigSpace;

/// Offsets in the capability.
const BAR: u16 = 4;
const OFFSET: u16 = 8;
const LENGTH: u16 = 12;
const DATA: u16 = 16;
const DATA_BYTES: u16 = 4;

/// An access through the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Access {
    pub(crate) bar: usize,
    pub(crate) offset: u64,
    pub(crate) len: usize,
}

/// The capability at an offset in configuration space.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window(pub(crate) u16);

impl Window {
    /// Whether an access to configuration space touches the window's data, which is when it is to be moved.
    pub(crate) fn is_touched(self, offset: u16, len: usize) -> bool {
        let data = self.data();
        usize::from(offset) < data.end && usize::from(offset) + len > data.start
    }

    /// What the driver has aimed the window at; None if that is nothing. Shared memory is no structure to look at.
    pub(crate) fn aim(self, space: &ConfigSpace) -> Option<Access> {
        let [bar] = space.get(usize::from(self.0 + BAR));
        let offset = u32::from_le_bytes(space.get(usize::from(self.0 + OFFSET))).into();
        let len = u32::from_le_bytes(space.get(usize::from(self.0 + LENGTH)));
        let bar = space.bar(bar.into()).filter(|bar| bar.index != SHARED_BAR)?;
        let fits = matches!(len, 1 | 2 | 4) && offset + u64::from(len) <= bar.size;
        fits.then_some(Access { bar: bar.index, offset, len: len as usize })
    }

    /// Where the data are in configuration space.
    pub(crate) fn data(self) -> Range<usize> {
        let start = usize::from(self.0 + DATA);
        start..start + usize::from(DATA_BYTES)
    }
}

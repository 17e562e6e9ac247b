//! What a function on the bus is to the bus.

use ::virtio::GuestAddr;

use super::config_space::Bar;

/// A BAR and what is in it now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BarPlace {
    /// The BAR.
    pub bar: Bar,
    /// Where the guest wants it; None while the function does not answer to addresses.
    pub at: Option<GuestAddr>,
}

/// A function on the bus. Every method may be called by several vCPUs at once, with any offset and any length: offsets
/// and lengths are the guest's.
pub trait Function: Send + Sync {
    /// Reads configuration space.
    fn config_read(&self, offset: u16, data: &mut [u8]);

    /// Writes configuration space.
    fn config_write(&self, offset: u16, data: &[u8]);

    /// The BARs, and where the guest wants them.
    fn bars(&self) -> Vec<BarPlace>;

    /// Writes an address to a BAR, before the guest runs.
    fn assign(&self, bar: usize, addr: GuestAddr);

    /// A BAR has come to lie at `addr`, or nowhere: its addresses are not in a window of the bus, or another's. Called by
    /// one thread at a time. Must not wait for anything that takes long.
    fn placed(&self, bar: usize, addr: Option<GuestAddr>);

    /// Reads from a BAR. The access lies inside of it.
    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]);

    /// Writes to a BAR. The access lies inside of it.
    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]);
}

//! One bus: functions by slot, and which of them answers to an address.
//!
//! Functions are added before the guest runs and stay. What moves is their BARs: a guest may write any address to them
//! at any time, on several vCPUs at once. After each write that could have moved something the bus looks where
//! everybody wants to be and grants it to whoever lies in a window and overlaps nobody; who was there first stays. So
//! routes never overlap, and never lie over RAM or another part of the machine; who is refused answers to no address
//! until something moves again. Functions hear where they have come to lie after everybody else has left that place.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use ::virtio::GuestAddr;

use super::address::{self, Mechanism1, Place, Port, SLOTS_MAX};
use super::config_space::Bar;
use super::function::{BarPlace, Function};
use super::host_bridge::HostBridge;
use crate::layout;

/// Configuration space from the command register to the last BAR: what decides who answers to which address.
const DECODING: Range<u16> = 0x04..0x28;

/// The guest-physical addresses that belong to PCI. ACPI tells them to the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Memory-mapped configuration space, of one bus: at most 1 MiB.
    pub ecam: Range<u64>,
    /// For BARs below 4 GiB.
    pub mmio32: Range<u64>,
    /// For BARs of 64 bits.
    pub mmio64: Range<u64>,
}

impl Default for Windows {
    fn default() -> Self {
        Self { ecam: layout::ECAM, mmio32: layout::PCI_WINDOW_32, mmio64: layout::PCI_WINDOW_64 }
    }
}

impl Windows {
    /// Whether a range lies in one of the windows for BARs.
    fn hold(&self, range: &Range<u64>) -> bool {
        [&self.mmio32, &self.mmio64]
            .iter()
            .any(|window| window.start <= range.start && range.end <= window.end)
    }

    fn is_inside(&self, addr: u64) -> bool {
        self.mmio32.contains(&addr) || self.mmio64.contains(&addr)
    }
}

/// A bus that cannot be set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// No slot is left.
    #[error("at most {} devices fit on the bus", SLOTS_MAX - 1)]
    Full,
    /// A window is too small for the BARs in it.
    #[error("slot {slot}, BAR {bar}: no {size} bytes are left in the window of addresses for it")]
    NoAddresses {
        /// The function's slot.
        slot: usize,
        /// The BAR.
        bar: usize,
        /// Its size in bytes.
        size: u64,
    },
}

/// Who answers to a range of addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Route {
    addresses: Range<u64>,
    slot: usize,
    bar: usize,
}

/// One bus with its host bridge.
pub struct Bus {
    windows: Windows,
    latch: Mechanism1,
    functions: Vec<Arc<dyn Function>>,
    /// Held while routes change and functions are told.
    rerouting: Mutex<()>,
    /// In ascending order; none overlap.
    routes: RwLock<Vec<Route>>,
}

impl Bus {
    /// A bus with a host bridge in slot 0 and nothing else.
    #[must_use]
    pub fn new(windows: Windows) -> Self {
        Self {
            windows,
            latch: Mechanism1::default(),
            functions: vec![Arc::new(HostBridge::new())],
            rerouting: Mutex::new(()),
            routes: RwLock::default(),
        }
    }

    /// The addresses that belong to PCI.
    #[must_use]
    pub fn windows(&self) -> &Windows {
        &self.windows
    }

    /// Puts a function into the next slot, and returns its number.
    ///
    /// # Errors
    /// [`BusError::Full`].
    pub fn add(&mut self, function: Arc<dyn Function>) -> Result<usize, BusError> {
        let slot = self.functions.len();
        if slot == SLOTS_MAX {
            return Err(BusError::Full);
        }
        self.functions.push(function);
        Ok(slot)
    }

    /// Gives every BAR an address, as firmware does; those of 64 bits above 4 GiB. Functions do not answer to them before
    /// the guest enables that.
    ///
    /// # Errors
    /// [`BusError::NoAddresses`].
    pub fn assign(&mut self) -> Result<(), BusError> {
        let mut bars: Vec<(usize, Bar)> = Vec::new();
        for (slot, function) in self.functions.iter().enumerate() {
            bars.extend(function.bars().into_iter().map(|BarPlace { bar, .. }| (slot, bar)));
        }
        // Largest first leaves no gaps: all sizes are powers of two.
        bars.sort_by_key(|(_, bar)| std::cmp::Reverse(bar.size));
        let (mut free32, mut free64) = (self.windows.mmio32.clone(), self.windows.mmio64.clone());
        for (slot, bar) in bars {
            let free = if bar.is_64_bit { &mut free64 } else { &mut free32 };
            let Some(start) = take(free, bar.size) else {
                return Err(BusError::NoAddresses { slot, bar: bar.index, size: bar.size });
            };
            self.functions[slot].assign(bar.index, GuestAddr(start));
        }
        self.reroute();
        Ok(())
    }

    /// A vCPU reads from a port. False if the port is not PCI's.
    pub fn port_read(&self, port: u16, data: &mut [u8]) -> bool {
        match self.latch.decode(port, data.len()) {
            Port::Address => data.copy_from_slice(&self.latch.address().to_le_bytes()),
            Port::Data(place) => self.config_read(place, data),
            Port::Other => return false,
        }
        true
    }

    /// A vCPU writes to a port. False if the port is not PCI's.
    pub fn port_write(&self, port: u16, data: &[u8]) -> bool {
        match (self.latch.decode(port, data.len()), data) {
            (Port::Address, &[a, b, c, d]) => self.latch.set_address(u32::from_le_bytes([a, b, c, d])),
            (Port::Data(place), data) => self.config_write(place, data),
            _ => return false,
        }
        true
    }

    /// A vCPU reads from an address. False if it is not PCI's; what is PCI's and nobody's reads as all ones.
    pub fn mmio_read(&self, addr: u64, data: &mut [u8]) -> bool {
        if self.windows.ecam.contains(&addr) {
            self.config_read(address::ecam(addr - self.windows.ecam.start, data.len()), data);
            return true;
        }
        match self.find(addr, data.len()) {
            Some((function, bar, offset)) => function.bar_read(bar, offset, data),
            None if self.windows.is_inside(addr) => data.fill(0xff),
            None => return false,
        }
        true
    }

    /// A vCPU writes to an address. False if it is not PCI's.
    pub fn mmio_write(&self, addr: u64, data: &[u8]) -> bool {
        if self.windows.ecam.contains(&addr) {
            self.config_write(address::ecam(addr - self.windows.ecam.start, data.len()), data);
            return true;
        }
        match self.find(addr, data.len()) {
            Some((function, bar, offset)) => function.bar_write(bar, offset, data),
            None => return self.windows.is_inside(addr),
        }
        true
    }

    fn config_read(&self, place: Option<Place>, data: &mut [u8]) {
        data.fill(0xff);
        let Some(Place { slot, offset, len }) = place else { return };
        if let (Some(function), Some(data)) = (self.functions.get(slot), data.get_mut(..len)) {
            function.config_read(offset, data);
        }
    }

    fn config_write(&self, place: Option<Place>, data: &[u8]) {
        let Some(Place { slot, offset, len }) = place else { return };
        if let (Some(function), Some(data)) = (self.functions.get(slot), data.get(..len)) {
            function.config_write(offset, data);
            if offset < DECODING.end && usize::from(offset) + len > usize::from(DECODING.start) {
                self.reroute();
            }
        }
    }

    /// Whose BAR holds all of `len` bytes at `addr`, and at which offset. No lock is held when this returns.
    fn find(&self, addr: u64, len: usize) -> Option<(Arc<dyn Function>, usize, u64)> {
        let routes = self.routes.read().unwrap_or_else(PoisonError::into_inner);
        let after = routes.partition_point(|route| route.addresses.start <= addr);
        let route = routes.get(after.checked_sub(1)?)?;
        let end = addr.checked_add(len as u64)?;
        if addr >= route.addresses.end || end > route.addresses.end {
            return None;
        }
        Some((self.functions.get(route.slot)?.clone(), route.bar, addr - route.addresses.start))
    }

    /// Grants places anew.
    fn reroute(&self) {
        let _alone = self.rerouting.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.routes.read().unwrap_or_else(PoisonError::into_inner).clone();
        let new = self.granted(&old);
        if old == new {
            return;
        }
        let set = |routes| *self.routes.write().unwrap_or_else(PoisonError::into_inner) = routes;
        set(old.iter().filter(|route| new.contains(route)).cloned().collect());
        for Route { slot, bar, .. } in old.iter().filter(|route| !new.contains(route)) {
            self.functions[*slot].placed(*bar, None);
        }
        set(new.clone());
        for Route { slot, bar, addresses } in new.iter().filter(|route| !old.contains(route)) {
            self.functions[*slot].placed(*bar, Some(GuestAddr(addresses.start)));
        }
    }

    /// The places that are to be had, of those that are wanted.
    fn granted(&self, old: &[Route]) -> Vec<Route> {
        let mut granted: Vec<Route> = Vec::new();
        let (there, new): (Vec<_>, Vec<_>) = self.wanted().into_iter().partition(|route| old.contains(route));
        for route in there.into_iter().chain(new) {
            let Range { start, end } = route.addresses;
            let is_free =
                granted.iter().all(|other| end <= other.addresses.start || other.addresses.end <= start);
            if is_free && self.windows.hold(&route.addresses) {
                granted.push(route);
            }
        }
        granted.sort_by_key(|route| route.addresses.start);
        granted
    }

    /// Where the guest wants everybody, lowest slots first.
    fn wanted(&self) -> Vec<Route> {
        let mut wanted = Vec::new();
        for (slot, function) in self.functions.iter().enumerate() {
            for BarPlace { bar, at } in function.bars() {
                if let Some(GuestAddr(start)) = at
                    && let Some(end) = start.checked_add(bar.size)
                {
                    wanted.push(Route { addresses: start..end, slot, bar: bar.index });
                }
            }
        }
        wanted
    }
}

/// Takes `size` addresses, a power of two, from the start of `free`, at a multiple of their number.
fn take(free: &mut Range<u64>, size: u64) -> Option<u64> {
    let start = free.start.checked_next_multiple_of(size)?;
    let end = start.checked_add(size).filter(|&end| end <= free.end)?;
    free.start = end;
    Some(start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::config_space::{ConfigSpace, Identity};

    /// A function that remembers what it was told.
    struct Probe {
        space: Mutex<ConfigSpace>,
        told: Mutex<Vec<(usize, Option<u64>)>>,
        written: Mutex<Vec<(usize, u64, Vec<u8>)>>,
    }

    impl Probe {
        fn new(bars: &[Bar]) -> Arc<Self> {
            let mut space = ConfigSpace::new(&Identity {
                vendor: 0x1234,
                device: 0x5678,
                revision: 0,
                class: 0,
                subsystem_vendor: 0,
                subsystem: 0,
            });
            bars.iter().for_each(|bar| space.add_bar(*bar).unwrap());
            Arc::new(Self { space: Mutex::new(space), told: Mutex::default(), written: Mutex::default() })
        }

        fn told(&self) -> Vec<(usize, Option<u64>)> {
            std::mem::take(&mut *self.told.lock().unwrap())
        }
    }

    impl Function for Probe {
        fn config_read(&self, offset: u16, data: &mut [u8]) {
            self.space.lock().unwrap().read(offset, data);
        }

        fn config_write(&self, offset: u16, data: &[u8]) {
            self.space.lock().unwrap().write(offset, data);
        }

        fn bars(&self) -> Vec<BarPlace> {
            let space = self.space.lock().unwrap();
            let place =
                |bar| BarPlace { bar, at: space.decoded(&bar).map(|addresses| GuestAddr(addresses.start)) };
            space.bars().map(place).collect()
        }

        fn assign(&self, bar: usize, addr: GuestAddr) {
            let mut space = self.space.lock().unwrap();
            let bar = space.bars().find(|known| known.index == bar).unwrap();
            space.assign(&bar, addr.0);
        }

        fn placed(&self, bar: usize, addr: Option<GuestAddr>) {
            self.told.lock().unwrap().push((bar, addr.map(|addr| addr.0)));
        }

        fn bar_read(&self, bar: usize, _offset: u64, data: &mut [u8]) {
            data.fill(bar as u8);
        }

        fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) {
            self.written.lock().unwrap().push((bar, offset, data.to_vec()));
        }
    }

    const LOW: Bar = Bar { index: 0, size: 0x1000, is_64_bit: false, prefetchable: false };
    const HIGH: Bar = Bar { index: 2, size: 0x10_0000, is_64_bit: true, prefetchable: true };

    fn config(bus: &Bus, slot: u64, offset: u64, data: &[u8]) {
        assert!(bus.mmio_write(bus.windows().ecam.start + (slot << 15) + offset, data));
    }

    fn two() -> (Bus, Arc<Probe>, Arc<Probe>) {
        let mut bus = Bus::new(Windows::default());
        let (first, second) = (Probe::new(&[LOW, HIGH]), Probe::new(&[LOW, HIGH]));
        assert_eq!(bus.add(first.clone()), Ok(1));
        assert_eq!(bus.add(second.clone()), Ok(2));
        bus.assign().unwrap();
        (bus, first, second)
    }

    #[test]
    fn bars_lie_in_their_windows_and_decode_when_enabled() {
        let (bus, first, second) = two();
        assert_eq!(first.told(), []);
        config(&bus, 1, 4, &[2, 0]);
        config(&bus, 2, 4, &[2, 0]);
        assert_eq!(first.told(), [(0, Some(0xc000_0000)), (2, Some(0x80_0000_0000))]);
        assert_eq!(second.told(), [(0, Some(0xc000_1000)), (2, Some(0x80_0010_0000))]);
        assert!(bus.mmio_write(0xc000_1ffe, &[1, 2]));
        assert_eq!(*second.written.lock().unwrap(), [(0, 0xffe, vec![1, 2])]);
    }

    #[test]
    fn an_access_over_the_end_of_a_bar_reaches_nobody() {
        let (bus, first, second) = two();
        config(&bus, 1, 4, &[2, 0]);
        config(&bus, 2, 4, &[2, 0]);
        assert!(bus.mmio_write(0xc000_0ffe, &[1; 4]));
        let mut data = [0; 4];
        assert!(bus.mmio_read(0xc000_0ffe, &mut data));
        assert_eq!(data, [0xff; 4]);
        assert!(bus.mmio_read(0xdfff_ffff, &mut data));
        assert!(first.written.lock().unwrap().is_empty() && second.written.lock().unwrap().is_empty());
    }

    #[test]
    fn what_is_not_the_bus_is_left_alone() {
        let (bus, ..) = two();
        let mut data = [0x5a; 4];
        for addr in [0, 0xbfff_ffff, 0xe010_0000, 0xfee0_0000, 0x80_4000_0000, u64::MAX] {
            assert!(!bus.mmio_read(addr, &mut data) && !bus.mmio_write(addr, &data), "{addr:#x}");
        }
        assert!(!bus.port_read(0xcf9, &mut data[..1]) && !bus.port_write(0x3f8, &data[..1]));
        assert_eq!(data, [0x5a; 4]);
    }

    #[test]
    fn who_was_there_first_stays_and_the_other_gets_the_place_afterwards() {
        let (bus, first, second) = two();
        config(&bus, 1, 4, &[2, 0]);
        config(&bus, 2, 4, &[2, 0]);
        first.told();
        second.told();
        config(&bus, 1, 0x10, &0xc000_1000u32.to_le_bytes());
        assert_eq!(second.told(), []);
        assert_eq!(first.told(), [(0, None)]);
        config(&bus, 2, 4, &[0, 0]);
        assert_eq!(second.told(), [(0, None), (2, None)]);
        assert_eq!(first.told(), [(0, Some(0xc000_1000))]);
    }

    #[test]
    fn nothing_lies_outside_of_the_windows() {
        let (bus, first, _) = two();
        config(&bus, 1, 4, &[2, 0]);
        first.told();
        for addr in [0u32, 0xbfff_f000, 0xe000_0000, 0xfee0_0000, 0xffff_f000] {
            config(&bus, 1, 0x10, &addr.to_le_bytes());
            first.told();
            config(&bus, 1, 0x10, &addr.to_le_bytes());
            assert_eq!(first.told(), [], "{addr:#x}");
            assert!(bus.routes.read().unwrap().iter().all(|route| (route.slot, route.bar) != (1, 0)));
        }
        config(&bus, 1, 0x18, &0x80_3ff8_0000u64.to_le_bytes());
        assert_eq!(first.told(), [(2, None), (2, Some(0x80_3ff0_0000))], "the low bits are not to be had");
    }

    #[test]
    fn ports_reach_the_same_registers() {
        let (bus, ..) = two();
        let mut data = [0; 4];
        assert!(bus.port_write(0xcf8, &0x8000_1000u32.to_le_bytes()));
        assert!(bus.port_read(0xcfc, &mut data));
        assert_eq!(data, [0x34, 0x12, 0x78, 0x56]);
        assert!(bus.port_read(0xcfe, &mut data[..2]));
        assert_eq!(data[..2], [0x78, 0x56]);
        assert!(bus.port_read(0xcfe, &mut data));
        assert_eq!(data, [0x78, 0x56, 0xff, 0xff]);
        assert!(bus.port_write(0xcf8, &0x8000_f800u32.to_le_bytes()));
        assert!(bus.port_read(0xcfc, &mut data));
        assert_eq!(data, [0xff; 4], "an empty slot");
    }

    #[test]
    fn slots_and_addresses_run_out() {
        let mut bus = Bus::new(Windows { mmio32: 0xc000_0000..0xc000_1000, ..Windows::default() });
        bus.add(Probe::new(&[LOW])).unwrap();
        bus.assign().unwrap();
        bus.add(Probe::new(&[LOW])).unwrap();
        assert_eq!(bus.assign(), Err(BusError::NoAddresses { slot: 2, bar: 0, size: 0x1000 }));
        while bus.functions.len() < SLOTS_MAX {
            bus.add(Probe::new(&[])).unwrap();
        }
        assert_eq!(bus.add(Probe::new(&[])), Err(BusError::Full));
    }
}

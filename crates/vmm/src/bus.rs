//! Which device an access belongs to: ports, and addresses that are not memory.
//!
//! A bus is filled before the first virtual CPU runs and not changed any more, so that looking up takes no lock. What
//! moves about (the BARs of PCI) is behind one handler.

use std::ops::Range;
use std::sync::Arc;

use crate::Error;

/// What an access that nobody answers reads.
const NOBODY: u8 = 0xFF;

/// A device's registers. Called by any virtual CPU, by several at a time.
///
/// Offset and length are the guest's choice; what the bus promises is that the access begins in the range that the
/// device was given. `rep ins` and `rep outs` arrive as one access with the bytes of all repetitions.
pub(crate) trait Handler: Send + Sync {
    /// The guest reads: `data` holds all ones, which is the answer of a register that does not exist.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// The guest writes.
    fn write(&self, offset: u64, data: &[u8]);
}

struct Entry {
    range: Range<u64>,
    name: &'static str,
    handler: Arc<dyn Handler>,
}

/// Devices by address.
#[derive(Default)]
pub(crate) struct Bus {
    /// Disjoint, in ascending order.
    entries: Vec<Entry>,
}

impl Bus {
    /// Gives `range` to a device.
    pub(crate) fn add(
        &mut self,
        name: &'static str,
        range: Range<u64>,
        handler: Arc<dyn Handler>,
    ) -> Result<(), Error> {
        let at = self.entries.partition_point(|entry| entry.range.start < range.start);
        let before = at.checked_sub(1).map(|before| &self.entries[before]);
        let neighbours = before.into_iter().chain(self.entries.get(at));
        let overlaps = |other: &&Entry| other.range.start < range.end && range.start < other.range.end;
        if let Some(other) = neighbours.into_iter().find(overlaps) {
            return Err(Error::Overlap { name, start: range.start, end: range.end, other: other.name });
        }
        self.entries.insert(at, Entry { range, name, handler });
        Ok(())
    }

    /// The guest reads at `address`.
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(NOBODY);
        if let Some((handler, offset)) = self.find(address) {
            handler.read(offset, data);
        }
    }

    /// The guest writes at `address`.
    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        if let Some((handler, offset)) = self.find(address) {
            handler.write(offset, data);
        }
    }

    fn find(&self, address: u64) -> Option<(&dyn Handler, u64)> {
        let after = self.entries.partition_point(|entry| entry.range.start <= address);
        let entry = &self.entries[after.checked_sub(1)?];
        entry.range.contains(&address).then(|| (&*entry.handler, address - entry.range.start))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Answers with the offset, notes what is written.
    #[derive(Default)]
    struct Probe(Mutex<Vec<(u64, Vec<u8>)>>);

    impl Handler for Probe {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data[0] = offset as u8;
        }

        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn an_access_reaches_the_device_it_begins_in() {
        let (low, high) = (Arc::new(Probe::default()), Arc::new(Probe::default()));
        let mut bus = Bus::default();
        bus.add("high", 0x20..0x30, high.clone()).unwrap();
        bus.add("low", 0x10..0x20, low.clone()).unwrap();
        let mut data = [0; 4];
        bus.read(0x2f, &mut data);
        assert_eq!(data, [0xf, NOBODY, NOBODY, NOBODY]);
        bus.write(0x1f, &[1, 2]);
        assert_eq!(*low.0.lock().unwrap(), [(0xf, vec![1, 2])]);
        assert!(high.0.lock().unwrap().is_empty());
    }

    #[test]
    fn an_access_that_nobody_answers_reads_all_ones() {
        let mut bus = Bus::default();
        bus.add("device", 0x10..0x20, Arc::new(Probe::default())).unwrap();
        for address in [0, 0xf, 0x20, u64::MAX] {
            let mut data = [0; 2];
            bus.read(address, &mut data);
            assert_eq!(data, [NOBODY; 2], "{address:#x}");
            bus.write(address, &data);
        }
    }

    #[test]
    fn devices_do_not_overlap() {
        let mut bus = Bus::default();
        bus.add("first", 0x10..0x20, Arc::new(Probe::default())).unwrap();
        for range in [0x1f..0x21, 0xf..0x11, 0x12..0x13, 0..0x100, 0x10..0x20] {
            let error = bus.add("second", range.clone(), Arc::new(Probe::default())).unwrap_err();
            assert!(error.to_string().contains("overlaps first"), "{range:?}: {error}");
        }
        bus.add("second", 0x20..0x21, Arc::new(Probe::default())).unwrap();
    }
}

//! MSI-X: a table of messages in a BAR, a mask for each and one for all, and bits for those that wait for their mask
//! (PCI Local Bus Specification 3.0, section 6.8.2).
//!
//! Interrupts are raised by I/O threads while vCPUs rewrite the table, so each vector has a state of its own behind a
//! lock that is held for one message at most. A message is changed in three steps: raises are held back, the machine
//! learns the new message, raises go through again. So none is lost, and none is sent to where the guest no longer
//! expects it once its write to the table is done.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{io, ops::Range};

use super::config_space::read_at;
use super::{Interrupts, Msi, Vector};

/// The most entries a table has.
pub(crate) const VECTORS_MAX: u16 = 2048;
const ENTRY_BYTES: usize = 16;
/// Bit of an entry's last word.
const ENTRY_MASKED: u8 = 1;
/// Bits of the high byte of message control.
const CONTROL_ENABLE: u8 = 1 << 7;
const CONTROL_MASK: u8 = 1 << 6;

/// What becomes of a raised interrupt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Delivery {
    /// MSI-X is off.
    #[default]
    Off,
    /// It waits.
    Held,
    /// It is sent.
    Sent,
}

#[derive(Debug, Default)]
struct State {
    delivery: Delivery,
    pending: bool,
}

/// One interrupt of a function, as its owner raises it.
pub struct MsixVector {
    vector: Arc<dyn Vector>,
    state: Mutex<State>,
}

impl MsixVector {
    /// Raises it: it is sent, or noted as pending while it is masked. False if MSI-X is off.
    pub fn raise(&self) -> bool {
        let mut state = self.state();
        match state.delivery {
            Delivery::Off => return false,
            Delivery::Held => state.pending = true,
            Delivery::Sent => {
                self.vector.call();
            }
        }
        true
    }

    fn set(&self, delivery: Delivery) {
        let mut state = self.state();
        state.delivery = delivery;
        match delivery {
            Delivery::Off => state.pending = false,
            Delivery::Held => {}
            Delivery::Sent if std::mem::take(&mut state.pending) => {
                self.vector.call();
            }
            Delivery::Sent => {}
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the guest wrote.
struct Table {
    entries: Vec<[u8; ENTRY_BYTES]>,
    /// The messages that the machine knows.
    known: Vec<Option<Msi>>,
    enabled: bool,
    masked: bool,
}

/// The MSI-X of a function.
pub struct Msix {
    vectors: Box<[Arc<MsixVector>]>,
    table: Mutex<Table>,
    enabled: AtomicBool,
}

impl Msix {
    /// A table of `vectors` masked entries, MSI-X being off.
    ///
    /// # Errors
    /// An interrupt is not to be had.
    pub fn new(vectors: u16, interrupts: &dyn Interrupts) -> io::Result<Self> {
        let make = |index| {
            let vector = interrupts.vector(index)?;
            Ok(Arc::new(MsixVector { vector, state: Mutex::default() }))
        };
        let vectors = (0..vectors).map(make).collect::<io::Result<Box<[_]>>>()?;
        let mut entry = [0; ENTRY_BYTES];
        entry[12] = ENTRY_MASKED;
        let table = Table {
            entries: vec![entry; vectors.len()],
            known: vec![None; vectors.len()],
            enabled: false,
            masked: false,
        };
        Ok(Self { vectors, table: Mutex::new(table), enabled: AtomicBool::new(false) })
    }

    /// A vector; None if there is no such.
    #[must_use]
    pub fn vector(&self, index: u16) -> Option<Arc<MsixVector>> {
        self.vectors.get(usize::from(index)).cloned()
    }

    /// Whether MSI-X is on.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::Relaxed)
    }

    /// The body of the capability: `table` and `pending` are where in BAR `bar` the two are.
    #[must_use]
    pub fn capability(&self, bar: u8, table: u32, pending: u32) -> [u8; 10] {
        let [size_low, size_high] = (self.vectors.len().saturating_sub(1) as u16).to_le_bytes();
        let [t0, t1, t2, t3] = (table | u32::from(bar)).to_le_bytes();
        let [p0, p1, p2, p3] = (pending | u32::from(bar)).to_le_bytes();
        [size_low, size_high, t0, t1, t2, t3, p0, p1, p2, p3]
    }

    /// Which bits of the capability's body the guest may write: enable and function mask.
    pub const WRITABLE: [u8; 2] = [0, CONTROL_ENABLE | CONTROL_MASK];

    /// The guest has written the capability; `control` is the high byte of its message control word.
    pub fn set_control(&self, control: u8) {
        let (enabled, masked) = (control & CONTROL_ENABLE != 0, control & CONTROL_MASK != 0);
        let mut table = self.table();
        if (table.enabled, table.masked) == (enabled, masked) {
            return;
        }
        (table.enabled, table.masked) = (enabled, masked);
        self.enabled.store(enabled, Ordering::Relaxed);
        self.apply(&mut table, 0..self.vectors.len());
    }

    /// Reads the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        read_at(self.table().entries.as_flattened(), offset, data);
    }

    /// Writes to the table.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let mut table = self.table();
        let bytes = table.entries.as_flattened_mut();
        let offset = offset as usize;
        let end = offset.saturating_add(data.len()).min(bytes.len());
        let Some(place) = bytes.get_mut(offset..end) else { return };
        place.copy_from_slice(&data[..end - offset]);
        let touched = offset / ENTRY_BYTES..end.div_ceil(ENTRY_BYTES);
        for entry in &mut table.entries[touched.clone()] {
            entry[0] &= !3;
            entry[12] &= ENTRY_MASKED;
            entry[13..].fill(0);
        }
        self.apply(&mut table, touched);
    }

    /// Reads the bits of those that are pending.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let bits = |vectors: &[Arc<MsixVector>]| {
            let vectors = vectors.iter().enumerate();
            vectors.fold(0, |bits, (bit, vector)| bits | u8::from(vector.state().pending) << bit)
        };
        let bytes: Vec<u8> = self.vectors.chunks(8).map(bits).collect();
        read_at(&bytes, offset, data);
    }

    /// Makes it so for some of the entries.
    fn apply(&self, table: &mut Table, touched: Range<usize>) {
        for index in touched {
            let (vector, entry) = (&self.vectors[index], &table.entries[index]);
            if !table.enabled {
                vector.set(Delivery::Off);
                continue;
            }
            if table.masked || entry[12] & ENTRY_MASKED != 0 {
                vector.set(Delivery::Held);
                continue;
            }
            let [a0, a1, a2, a3, a4, a5, a6, a7, d0, d1, d2, d3, ..] = *entry;
            let msi = Msi {
                address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
                data: u32::from_le_bytes([d0, d1, d2, d3]),
            };
            if table.known[index] != Some(msi) {
                vector.set(Delivery::Held);
                vector.vector.set(msi);
                table.known[index] = Some(msi);
            }
            vector.set(Delivery::Sent);
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use ::virtio::Call;

    use super::*;

    /// Remembers the messages it sent.
    #[derive(Default)]
    struct Line {
        msi: Mutex<Option<Msi>>,
        sent: Mutex<Vec<Msi>>,
    }

    impl Call for Line {
        fn call(&self) -> bool {
            let msi = self.msi.lock().unwrap().expect("no call before a message is known");
            self.sent.lock().unwrap().push(msi);
            true
        }
    }

    impl Vector for Line {
        fn set(&self, msi: Msi) {
            *self.msi.lock().unwrap() = Some(msi);
        }
    }

    #[derive(Default)]
    struct Lines(Mutex<Vec<Arc<Line>>>);

    impl Interrupts for Lines {
        fn vector(&self, index: u16) -> io::Result<Arc<dyn Vector>> {
            let mut lines = self.0.lock().unwrap();
            assert_eq!(lines.len(), usize::from(index));
            lines.push(Arc::default());
            Ok(lines[usize::from(index)].clone())
        }
    }

    impl Lines {
        fn sent(&self, index: usize) -> Vec<Msi> {
            std::mem::take(&mut *self.0.lock().unwrap()[index].sent.lock().unwrap())
        }
    }

    const MSI: Msi = Msi { address: 0xfee0_1000, data: 0x4025 };

    fn write(msix: &Msix, index: u64, msi: Msi) {
        msix.write_table(index * 16, &msi.address.to_le_bytes());
        msix.write_table(index * 16 + 8, &msi.data.to_le_bytes());
    }

    fn mask(msix: &Msix, index: u64, on: u32) {
        msix.write_table(index * 16 + 12, &on.to_le_bytes());
    }

    fn three() -> (Msix, Lines) {
        let lines = Lines::default();
        (Msix::new(3, &lines).unwrap(), lines)
    }

    #[test]
    fn a_vector_is_sent_when_it_is_enabled_and_unmasked() {
        let (msix, lines) = three();
        let vector = msix.vector(1).unwrap();
        assert!(!vector.raise(), "MSI-X is off");
        write(&msix, 1, MSI);
        mask(&msix, 1, 0);
        assert!(!vector.raise(), "MSI-X is off");
        msix.set_control(0x80);
        assert!(vector.raise());
        assert_eq!(lines.sent(1), [MSI]);
        assert!(msix.vector(3).is_none());
    }

    #[test]
    fn a_masked_vector_is_pending_until_it_is_unmasked() {
        let (msix, lines) = three();
        msix.set_control(0x80);
        write(&msix, 2, MSI);
        let vector = msix.vector(2).unwrap();
        assert!(vector.raise() && vector.raise());
        let mut bits = [0; 8];
        msix.read_pending(0, &mut bits);
        assert_eq!(bits, [4, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(lines.sent(2), []);
        mask(&msix, 2, 0);
        assert_eq!(lines.sent(2), [MSI], "once, however often it was raised");
        msix.read_pending(0, &mut bits);
        assert_eq!(bits, [0; 8]);
    }

    #[test]
    fn the_function_mask_holds_all_back() {
        let (msix, lines) = three();
        msix.set_control(0xc0);
        for index in 0..3 {
            write(&msix, index, Msi { data: index as u32, ..MSI });
            mask(&msix, index, 0);
            assert!(msix.vector(index as u16).unwrap().raise());
        }
        assert_eq!(lines.sent(1), []);
        msix.set_control(0x80);
        for index in 0..3 {
            assert_eq!(lines.sent(index), [Msi { data: index as u32, ..MSI }]);
        }
    }

    #[test]
    fn switching_off_forgets_what_is_pending() {
        let (msix, lines) = three();
        msix.set_control(0xc0);
        write(&msix, 0, MSI);
        mask(&msix, 0, 0);
        msix.vector(0).unwrap().raise();
        msix.set_control(0);
        msix.set_control(0x80);
        assert_eq!(lines.sent(0), []);
        assert!(msix.is_enabled());
    }

    #[test]
    fn a_message_changes_while_it_is_in_use() {
        let (msix, lines) = three();
        msix.set_control(0x80);
        write(&msix, 0, MSI);
        mask(&msix, 0, 0);
        msix.vector(0).unwrap().raise();
        msix.write_table(8, &[7]);
        msix.vector(0).unwrap().raise();
        assert_eq!(lines.sent(0), [MSI, Msi { data: 0x4007, ..MSI }]);
    }

    #[test]
    fn the_table_reads_as_written_but_for_reserved_bits() {
        let (msix, _) = three();
        let mut entry = [0; 16];
        msix.read_table(16, &mut entry);
        assert_eq!(entry, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
        msix.write_table(16, &[0xff; 16]);
        msix.read_table(16, &mut entry);
        assert_eq!(entry, [0xfc, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1, 0, 0, 0]);
    }

    #[test]
    fn accesses_at_and_over_the_end_touch_nothing_else() {
        let (msix, _) = three();
        msix.write_table(44, &[0; 8]);
        let mut data = [0xa5; 8];
        msix.read_table(44, &mut data);
        assert_eq!(data, [0; 8]);
        for offset in [47, 48, 49, 1 << 40, u64::MAX] {
            msix.write_table(offset, &[0xff; 8]);
            msix.read_table(offset, &mut data);
            msix.read_pending(offset, &mut data);
            assert_eq!(data, [0; 8]);
        }
    }
}

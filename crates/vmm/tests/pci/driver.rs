//! A driver that does what Linux does, in the order in which Linux does it: `pci_scan_slot`, `__pci_read_base`,
//! `vp_modern_probe`, `pci_alloc_irq_vectors`, `vp_modern_find_vqs`, `virtio_device_ready`.

use virtio::features::{NOTIFICATION_DATA, VERSION_1};

use crate::guest::Ring;
use crate::machine::{Machine, eventually};

pub(crate) const ACKNOWLEDGE: u8 = 1;
pub(crate) const DRIVER: u8 = 2;
pub(crate) const DRIVER_OK: u8 = 4;
pub(crate) const FEATURES_OK: u8 = 8;
pub(crate) const NEEDS_RESET: u8 = 64;

pub(crate) const NO_VECTOR: u16 = 0xffff;

/// How configuration space is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Ports,
    Ecam,
}

/// One function.
#[derive(Clone, Copy)]
pub(crate) struct Pci<'m> {
    pub(crate) machine: &'m Machine,
    pub(crate) slot: u32,
    pub(crate) way: Way,
}

impl<'m> Pci<'m> {
    pub(crate) fn read<const N: usize>(&self, offset: u32) -> [u8; N] {
        let bus = &self.machine.bus;
        let mut data = [0; N];
        match self.way {
            Way::Ecam => {
                bus.mmio_read(bus.windows().ecam.start + u64::from(self.slot << 15 | offset), &mut data)
            }
            Way::Ports => {
                let address = 0x8000_0000 | self.slot << 11 | offset & 0xfc;
                bus.port_write(0xcf8, &address.to_le_bytes());
                bus.port_read(0xcfc + (offset & 3) as u16, &mut data)
            }
        };
        data
    }

    pub(crate) fn write(&self, offset: u32, data: &[u8]) {
        let bus = &self.machine.bus;
        match self.way {
            Way::Ecam => bus.mmio_write(bus.windows().ecam.start + u64::from(self.slot << 15 | offset), data),
            Way::Ports => {
                let address = 0x8000_0000 | self.slot << 11 | offset & 0xfc;
                bus.port_write(0xcf8, &address.to_le_bytes());
                bus.port_write(0xcfc + (offset & 3) as u16, data)
            }
        };
    }

    pub(crate) fn u8(&self, offset: u32) -> u8 {
        u8::from_le_bytes(self.read(offset))
    }

    pub(crate) fn u16(&self, offset: u32) -> u16 {
        u16::from_le_bytes(self.read(offset))
    }

    pub(crate) fn u32(&self, offset: u32) -> u32 {
        u32::from_le_bytes(self.read(offset))
    }

    /// The functions that answer.
    pub(crate) fn scan(machine: &'m Machine, way: Way) -> Vec<Self> {
        let all = (0..32).map(|slot| Self { machine, slot, way });
        all.filter(|pci| pci.u16(0) != 0xffff).collect()
    }

    /// Size and address of each BAR, found with decoding off, and without leaving a trace.
    pub(crate) fn size_bars(&self) -> Vec<(u32, u64, u64)> {
        let command = self.u16(4);
        self.write(4, &(command & !3).to_le_bytes());
        let probe = |at: u32| {
            let old = self.u32(at);
            self.write(at, &[0xff; 4]);
            let ones = self.u32(at);
            self.write(at, &old.to_le_bytes());
            (u64::from(old), u64::from(ones))
        };
        let mut bars = Vec::new();
        let mut index = 0;
        while index < 6 {
            let (mut old, mut ones) = probe(0x10 + 4 * index);
            let is_64_bit = ones & 6 == 4;
            if is_64_bit {
                let (old_high, ones_high) = probe(0x14 + 4 * index);
                old |= old_high << 32;
                ones |= ones_high << 32;
            } else if ones != 0 {
                ones |= !0xffff_ffff;
            }
            if ones != 0 {
                bars.push((index, (!(ones & !0xf)).wrapping_add(1), old & !0xf));
            }
            index += if is_64_bit { 2 } else { 1 };
        }
        self.write(4, &command.to_le_bytes());
        bars
    }

    /// Type and offset of each capability.
    pub(crate) fn capabilities(&self) -> Vec<(u8, u32)> {
        assert_ne!(self.u16(6) & 0x10, 0, "there is a list");
        let mut found = Vec::new();
        let mut at = u32::from(self.u8(0x34));
        while at != 0 {
            assert!(at >= 0x40 && at % 4 == 0 && found.len() < 48, "a sound list");
            found.push((self.u8(at), at));
            at = self.u8(at + 1).into();
        }
        found
    }
}

/// A virtio structure in a BAR.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Structure {
    pub(crate) at: u32,
    pub(crate) cfg_type: u8,
    pub(crate) bar: u8,
    pub(crate) id: u8,
    pub(crate) offset: u32,
    pub(crate) length: u32,
}

/// A device that has been found.
pub(crate) struct Driver<'m> {
    pub(crate) pci: Pci<'m>,
    pub(crate) structures: Vec<Structure>,
    pub(crate) common: u64,
    pub(crate) notify: u64,
    pub(crate) multiplier: u64,
    pub(crate) isr: u64,
    pub(crate) config: u64,
    msix: u32,
    pub(crate) table: u64,
    pub(crate) rings: Vec<Ring>,
    pub(crate) features: u64,
}

impl<'m> Driver<'m> {
    /// Finds the structures of a device and lets it decode and master the bus.
    pub(crate) fn probe(machine: &'m Machine, slot: u32, way: Way) -> Self {
        let pci = Pci { machine, slot, way };
        assert_eq!((pci.u16(0), pci.u16(2), pci.u8(8)), (0x1af4, 0x1040 + 63, 1));
        let bars = pci.size_bars();
        pci.write(4, &(pci.u16(4) | 6).to_le_bytes());
        let capabilities = pci.capabilities();
        let structure = |&(id, at): &(u8, u32)| {
            (id == 9).then(|| Structure {
                at,
                cfg_type: pci.u8(at + 3),
                bar: pci.u8(at + 4),
                id: pci.u8(at + 5),
                offset: pci.u32(at + 8),
                length: pci.u32(at + 12),
            })
        };
        let structures: Vec<Structure> = capabilities.iter().filter_map(structure).collect();
        let base = |bar: u8| {
            bars.iter().find(|(index, ..)| *index == u32::from(bar)).map(|(_, _, addr)| *addr).unwrap()
        };
        let find = |cfg_type| {
            let found = structures.iter().find(|structure| structure.cfg_type == cfg_type).unwrap();
            base(found.bar) + u64::from(found.offset)
        };
        let notify_at = structures.iter().find(|structure| structure.cfg_type == 2).unwrap().at;
        let msix = capabilities.iter().find(|(id, _)| *id == 0x11).unwrap().1;
        let table = pci.u32(msix + 4);
        Self {
            common: find(1),
            notify: find(2),
            multiplier: pci.u32(notify_at + 16).into(),
            isr: find(3),
            config: find(4),
            msix,
            table: base((table & 7) as u8) + u64::from(table & !7),
            pci,
            structures,
            rings: Vec::new(),
            features: 0,
        }
    }

    // Registers of the common configuration.

    pub(crate) fn u8(&self, offset: u64) -> u8 {
        u8::from_le_bytes(self.pci.machine.read(self.common + offset))
    }

    pub(crate) fn u16(&self, offset: u64) -> u16 {
        u16::from_le_bytes(self.pci.machine.read(self.common + offset))
    }

    pub(crate) fn u32(&self, offset: u64) -> u32 {
        u32::from_le_bytes(self.pci.machine.read(self.common + offset))
    }

    pub(crate) fn set8(&self, offset: u64, value: u8) {
        self.pci.machine.write(self.common + offset, &[value]);
    }

    pub(crate) fn set16(&self, offset: u64, value: u16) {
        self.pci.machine.write(self.common + offset, &value.to_le_bytes());
    }

    pub(crate) fn set32(&self, offset: u64, value: u32) {
        self.pci.machine.write(self.common + offset, &value.to_le_bytes());
    }

    pub(crate) fn status(&self) -> u8 {
        self.u8(0x14)
    }

    pub(crate) fn add_status(&self, bit: u8) {
        self.set8(0x14, self.status() | bit);
    }

    pub(crate) fn read_isr(&self) -> u8 {
        u8::from_le_bytes(self.pci.machine.read(self.isr))
    }

    // The life of a device.

    pub(crate) fn reset(&mut self) {
        self.set8(0x14, 0);
        eventually("the device resets", || self.status() == 0);
        self.rings.clear();
    }

    pub(crate) fn offered(&self) -> u64 {
        let half = |select| {
            self.set32(0, select);
            u64::from(self.u32(4))
        };
        half(0) | half(1) << 32
    }

    /// Accepts features; false if the device does not have them.
    pub(crate) fn negotiate(&mut self, features: u64) -> bool {
        self.reset();
        self.add_status(ACKNOWLEDGE);
        self.add_status(DRIVER);
        for select in 0..2 {
            self.set32(8, select);
            self.set32(0xc, (features >> (32 * select)) as u32);
        }
        self.add_status(FEATURES_OK);
        self.features = features;
        self.status() & FEATURES_OK != 0
    }

    /// What can be had, without `without`.
    pub(crate) fn usual_features(&self, without: u64) -> u64 {
        let offered = self.offered();
        assert_ne!(offered & VERSION_1, 0);
        assert_eq!(offered & NOTIFICATION_DATA, 0);
        offered & !without
    }

    /// Vectors in the table.
    pub(crate) fn vectors(&self) -> u16 {
        (self.pci.u16(self.msix + 2) & 0x7ff) + 1
    }

    pub(crate) fn msix_control(&self, set: u16, clear: u16) {
        let control = self.pci.u16(self.msix + 2);
        self.pci.write(self.msix + 2, &(control & !clear | set).to_le_bytes());
    }

    /// Writes an entry of the table, which is masked meanwhile. Its data tell slot and vector.
    pub(crate) fn aim(&self, vector: u16, data: u32) {
        let entry = self.table + 16 * u64::from(vector);
        let machine = self.pci.machine;
        self.mask(vector, true);
        machine.write(entry, &0xfee0_0000u32.to_le_bytes());
        machine.write(entry + 4, &0u32.to_le_bytes());
        machine.write(entry + 8, &data.to_le_bytes());
        self.mask(vector, false);
    }

    pub(crate) fn mask(&self, vector: u16, on: bool) {
        let entry = self.table + 16 * u64::from(vector);
        self.pci.machine.write(entry + 12, &u32::from(on).to_le_bytes());
    }

    /// The data that [`Driver::enable_msix`] gives to a vector.
    pub(crate) fn data(&self, vector: u16) -> u32 {
        self.pci.slot << 16 | u32::from(vector)
    }

    pub(crate) fn enable_msix(&self) {
        self.msix_control(0xc000, 0);
        for vector in 0..self.vectors() {
            self.mask(vector, true);
        }
        self.msix_control(0, 0x4000);
        for vector in 0..self.vectors() {
            self.aim(vector, self.data(vector));
        }
        self.set16(0x10, 0);
        assert_eq!(self.u16(0x10), 0);
    }

    /// Sets up a ring and enables its queue.
    pub(crate) fn add_ring(&mut self, index: u16, size: u16, vector: u16) {
        self.set16(0x16, index);
        assert!(self.u16(0x18) >= size, "the queue is there");
        assert_eq!(self.u16(0x1c), 0, "and not enabled");
        self.set16(0x18, size);
        let ring = Ring::new(&self.pci.machine.guest, self.features, size);
        for (offset, addr) in
            [(0x20, ring.config.desc), (0x28, ring.config.driver), (0x30, ring.config.device)]
        {
            self.set32(offset, addr.0 as u32);
            self.set32(offset + 4, (addr.0 >> 32) as u32);
        }
        if vector != NO_VECTOR {
            self.set16(0x1a, vector);
            assert_eq!(self.u16(0x1a), vector);
        }
        self.set16(0x1c, 1);
        assert_eq!(self.u16(0x1c), 1);
        match self.rings.get_mut(usize::from(index)) {
            Some(place) => *place = ring,
            None => self.rings.push(ring),
        }
    }

    /// Everything from reset to a device that works, with a vector for each queue.
    pub(crate) fn bring_up(&mut self, without: u64, size: u16) {
        let features = self.usual_features(without);
        assert!(self.negotiate(features));
        self.enable_msix();
        for index in 0..self.u16(0x12) {
            self.add_ring(index, size, index + 1);
        }
        self.add_status(DRIVER_OK);
        assert_eq!(self.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    pub(crate) fn kick(&self, index: u16) {
        self.set16(0x16, index);
        let offset = u64::from(self.u16(0x1e)) * self.multiplier;
        self.pci.machine.write(self.notify + offset, &index.to_le_bytes());
    }

    /// Offers a request, and kicks if the device wants that.
    pub(crate) fn offer(&mut self, index: u16, data: &[u8]) {
        let ring = &mut self.rings[usize::from(index)];
        ring.offer(&self.pci.machine.guest, data);
        if ring.ring.needs_kick() {
            self.kick(index);
        }
    }

    /// Waits for the answer to a request, by sleeping until the vector comes.
    pub(crate) fn sleep(&mut self, index: u16, data: &[u8]) {
        loop {
            let ring = &mut self.rings[usize::from(index)];
            if ring.ring.reap().unwrap().is_some() {
                break;
            }
            if !ring.ring.arm_calls() {
                self.pci.machine.board.wait(self.data(index + 1));
            }
        }
        self.check(index, data);
    }

    /// The same, by looking at the ring.
    pub(crate) fn poll(&mut self, index: u16, data: &[u8]) {
        let ring = &mut self.rings[usize::from(index)];
        eventually("an answer", || ring.ring.reap().unwrap().is_some());
        self.check(index, data);
    }

    fn check(&self, index: u16, data: &[u8]) {
        let ring = &self.rings[usize::from(index)];
        assert_eq!(ring.answer(&self.pci.machine.guest, data.len()), data);
    }

    /// One request after the other on every queue, with interrupts.
    pub(crate) fn exercise(&mut self, rounds: u8) {
        for round in 0..rounds {
            for index in 0..self.rings.len() as u16 {
                let data = [round, index as u8, 0x5a, 0xa5].repeat(8);
                self.offer(index, &data);
                self.sleep(index, &data);
            }
        }
    }
}

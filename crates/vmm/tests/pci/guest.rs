//! A guest's memory and the driver end of its rings.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio::features::{EVENT_IDX, IN_ORDER, RING_PACKED};
use virtio::memory::{Mapping, Translator, gather, scatter};
use virtio::ring::{Buffer, DriverRing};
use virtio::{GuestAddr, Memory, Region, RingConfig, RingFormat};

/// Guest-physical address of the first byte of memory.
pub(crate) const START: u64 = 0x10_0000;
const BYTES: u64 = 32 << 20;

pub(crate) struct Guest {
    pub(crate) memory: Arc<Memory>,
    next: AtomicU64,
}

impl Guest {
    pub(crate) fn new() -> Self {
        let (mapping, _file) = Mapping::anonymous("guest", BYTES).unwrap();
        let region = Region::new(GuestAddr(START), Arc::new(mapping)).unwrap();
        Self { memory: Arc::new(Memory::new(vec![region]).unwrap()), next: AtomicU64::new(START) }
    }

    pub(crate) fn alloc(&self, bytes: usize) -> GuestAddr {
        let bytes = bytes.next_multiple_of(64) as u64;
        let at = self.next.fetch_add(bytes, Ordering::Relaxed);
        assert!(at + bytes <= START + BYTES, "out of guest memory");
        GuestAddr(at)
    }

    pub(crate) fn write(&self, addr: GuestAddr, data: &[u8]) {
        let mut done = 0;
        let mut translator = Translator::new(self.memory.clone());
        translator.translate(addr, data.len() as u32, |s| done += scatter(&[s], 0, &data[done..])).unwrap();
    }

    pub(crate) fn read(&self, addr: GuestAddr, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        let mut done = 0;
        let mut translator = Translator::new(self.memory.clone());
        translator.translate(addr, len as u32, |s| done += gather(&[s], 0, &mut data[done..])).unwrap();
        data
    }
}

/// The driver of one ring.
pub(crate) struct Ring {
    pub(crate) config: RingConfig,
    pub(crate) ring: DriverRing,
    from: GuestAddr,
    to: GuestAddr,
}

impl Ring {
    pub(crate) fn new(guest: &Guest, features: u64, size: u16) -> Self {
        let format = if features & RING_PACKED != 0 { RingFormat::Packed } else { RingFormat::Split };
        let [desc, driver, device] = DriverRing::layout(format, size).map(|bytes| {
            let at = guest.alloc(bytes);
            guest.write(at, &vec![0; bytes]);
            at
        });
        let config = RingConfig {
            format,
            size,
            desc,
            driver,
            device,
            event_idx: features & EVENT_IDX != 0,
            indirect: true,
            in_order: features & IN_ORDER != 0,
        };
        let ring = DriverRing::new(&config, &guest.memory).unwrap();
        Self { config, ring, from: guest.alloc(4096), to: guest.alloc(4096) }
    }

    /// Offers a request that carries `data` and has as much room for the answer. One at a time.
    pub(crate) fn offer(&mut self, guest: &Guest, data: &[u8]) {
        guest.write(self.from, data);
        guest.write(self.to, &vec![0; data.len()]);
        let len = data.len() as u32;
        let buffers =
            [Buffer { addr: self.from, len, writable: false }, Buffer { addr: self.to, len, writable: true }];
        self.ring.add(&buffers).expect("room in the ring");
        self.ring.publish();
    }

    /// The answer to the request offered last.
    pub(crate) fn answer(&self, guest: &Guest, len: usize) -> Vec<u8> {
        guest.read(self.to, len)
    }
}

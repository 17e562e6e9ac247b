//! A guest's memory and the driver end of its rings.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserMemoryRegion;
use vhost::{VhostUserMemoryRegionInfo, VringConfigData};
use virtio::memory::{Mapping, Translator, gather, scatter};
use virtio::ring::{Buffer, DriverRing};
use virtio::{GuestAddr, Memory, Region, RingConfig, RingFormat};

/// Guest-physical address of the first byte of memory.
pub(crate) const START: u64 = 0x10_0000;
/// What is added to a guest address to make the front end's.
pub(crate) const USER: u64 = 0x7f00_0000_0000;

pub(crate) struct Guest {
    pub(crate) memory: Arc<Memory>,
    pub(crate) files: Vec<File>,
    region_bytes: u64,
    next: u64,
}

impl Guest {
    /// `regions` regions of `region_bytes` each, adjacent.
    pub(crate) fn new(regions: usize, region_bytes: u64) -> Self {
        let mut files = Vec::new();
        let regions = (0..regions as u64)
            .map(|i| {
                let (mapping, file) = Mapping::anonymous("guest", region_bytes).unwrap();
                files.push(file);
                Region::new(GuestAddr(START + i * region_bytes), Arc::new(mapping)).unwrap()
            })
            .collect();
        Self { memory: Arc::new(Memory::new(regions).unwrap()), files, region_bytes, next: START }
    }

    /// The table of regions, as the front end sends it.
    pub(crate) fn table(&self) -> Vec<VhostUserMemoryRegionInfo> {
        (0u64..)
            .zip(&self.files)
            .map(|(i, file)| VhostUserMemoryRegionInfo {
                guest_phys_addr: START + i * self.region_bytes,
                memory_size: self.region_bytes,
                userspace_addr: USER + START + i * self.region_bytes,
                mmap_offset: 0,
                mmap_handle: file.as_raw_fd(),
            })
            .collect()
    }

    /// The same for a message made by hand.
    pub(crate) fn raw_table(&self) -> Vec<VhostUserMemoryRegion> {
        let region = |r: &VhostUserMemoryRegionInfo| {
            VhostUserMemoryRegion::new(r.guest_phys_addr, r.memory_size, r.userspace_addr, r.mmap_offset)
        };
        self.table().iter().map(region).collect()
    }

    pub(crate) fn alloc(&mut self, bytes: usize) -> GuestAddr {
        let at = self.next;
        self.next += bytes.next_multiple_of(64) as u64;
        assert!(self.next <= START + self.region_bytes * self.files.len() as u64, "out of guest memory");
        GuestAddr(at)
    }

    /// What is allocated from here on can be given back.
    pub(crate) fn mark(&self) -> u64 {
        self.next
    }

    /// Gives back all that was allocated since.
    pub(crate) fn rewind(&mut self, mark: u64) {
        self.next = mark;
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
pub(crate) struct Driver {
    pub(crate) config: RingConfig,
    pub(crate) ring: DriverRing,
}

impl Driver {
    pub(crate) fn new(guest: &mut Guest, format: RingFormat, size: u16, event_idx: bool) -> Self {
        let [desc, driver, device] = DriverRing::layout(format, size).map(|bytes| guest.alloc(bytes));
        let config =
            RingConfig { format, size, desc, driver, device, event_idx, indirect: true, in_order: false };
        Self { config, ring: DriverRing::new(&config, &guest.memory).unwrap() }
    }

    /// Where the ring is, as the front end sends it.
    pub(crate) fn addresses(&self) -> VringConfigData {
        VringConfigData {
            queue_max_size: self.config.size,
            queue_size: self.config.size,
            flags: 0,
            desc_table_addr: USER + self.config.desc.0,
            used_ring_addr: USER + self.config.device.0,
            avail_ring_addr: USER + self.config.driver.0,
            log_addr: None,
        }
    }

    /// Offers a request that carries `data` and has as much room for the answer, which will be at the address returned.
    pub(crate) fn offer(&mut self, guest: &mut Guest, data: &[u8]) -> GuestAddr {
        let (from, to) = (guest.alloc(data.len()), guest.alloc(data.len()));
        guest.write(from, data);
        let len = data.len() as u32;
        let buffers = [Buffer { addr: from, len, writable: false }, Buffer { addr: to, len, writable: true }];
        self.ring.add(&buffers).expect("room in the ring");
        self.ring.publish();
        to
    }
}

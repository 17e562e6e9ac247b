//! A guest of the program, with a disk: one front end, one queue, one request at a time.
#![allow(dead_code, unreachable_pub, reason = "each test uses a part of it")]

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio::fake::{FakeDriver, FakeOptions, MEMORY_START};
use virtio::memory::Mapping;
use virtio::ring::Buffer;
use virtio::{GuestAddr, Memory, Region};
use vmm_sys_util::eventfd::EventFd;

use crate::process::LIMIT;

pub const BLOCK: usize = 4096;
const MEMORY_BYTES: u64 = 1 << 20;
/// What is added to a guest address to make the front end's.
const USER: u64 = 0x7f00_0000_0000;
/// Request types (virtio 1.2, section 5.2.6).
pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;

/// A front end that has negotiated what there is, and set up nothing.
pub fn front_end(socket: &str) -> Frontend {
    let mut frontend = Frontend::connect(socket, 1).unwrap();
    frontend.set_owner().unwrap();
    let unwanted = virtio::features::RING_PACKED | virtio::features::IN_ORDER | virtio::features::EVENT_IDX;
    let features = frontend.get_features().unwrap() & !unwanted;
    let offered = frontend.get_protocol_features().unwrap();
    frontend.set_protocol_features(offered & !VhostUserProtocolFeatures::INBAND_NOTIFICATIONS).unwrap();
    frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    frontend.set_features(features).unwrap();
    frontend
}

/// A guest with a disk in service.
pub struct Guest {
    pub frontend: Frontend,
    driver: FakeDriver,
    kick: EventFd,
    /// Where requests are: 16 bytes, a block, and the status.
    at: GuestAddr,
}

impl Guest {
    pub fn new(socket: &str) -> Self {
        let (mapping, file) = Mapping::anonymous("guest", MEMORY_BYTES).unwrap();
        let region = Region::new(GuestAddr(MEMORY_START), Arc::new(mapping)).unwrap();
        let options = FakeOptions { memory_bytes: MEMORY_BYTES, ..FakeOptions::default() };
        let mut driver = FakeDriver::in_memory(options, Memory::new(vec![region]).unwrap());
        let at = driver.alloc(16 + BLOCK + 16);
        let mut frontend = front_end(socket);
        let table = VhostUserMemoryRegionInfo {
            guest_phys_addr: MEMORY_START,
            memory_size: MEMORY_BYTES,
            userspace_addr: USER + MEMORY_START,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        };
        frontend.set_mem_table(&[table]).unwrap();
        let ring = driver.ring_config();
        let addresses = VringConfigData {
            queue_max_size: ring.size,
            queue_size: ring.size,
            flags: 0,
            desc_table_addr: USER + ring.desc.0,
            used_ring_addr: USER + ring.device.0,
            avail_ring_addr: USER + ring.driver.0,
            log_addr: None,
        };
        let [kick, call] = [(); 2].map(|()| EventFd::new(0).unwrap());
        frontend.set_vring_num(0, ring.size).unwrap();
        frontend.set_vring_base(0, 0).unwrap();
        frontend.set_vring_addr(0, &addresses).unwrap();
        frontend.set_vring_call(0, &call).unwrap();
        frontend.set_vring_kick(0, &kick).unwrap();
        frontend.set_vring_enable(0, true).unwrap();
        Self { frontend, driver, kick, at }
    }

    /// The status of a request for one block.
    pub fn request(&mut self, kind: u32, block: u64, data: &[u8]) -> u8 {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&(block * (BLOCK / 512) as u64).to_le_bytes());
        let driver = &mut self.driver;
        let (head, data_at, status) = (self.at, GuestAddr(self.at.0 + 16), GuestAddr(self.at.0 + 4112));
        driver.write(head, &header);
        driver.write(data_at, data);
        let buffer = |addr, len, writable| Buffer { addr, len, writable };
        let block = buffer(data_at, BLOCK as u32, kind != OUT);
        driver.offer(&[buffer(head, 16, false), block, buffer(status, 1, true)], false);
        self.kick.write(1).unwrap();
        eventually("the answer", || driver.ring.reap().unwrap().is_some());
        driver.read(status, 1)[0]
    }

    /// What a block holds.
    pub fn block(&mut self, block: u64) -> Vec<u8> {
        assert_eq!(self.request(IN, block, &[]), 0);
        self.driver.read(GuestAddr(self.at.0 + 16), BLOCK)
    }
}

/// Waits until `condition` holds.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {LIMIT:?}");
        thread::sleep(Duration::from_millis(1));
    }
}

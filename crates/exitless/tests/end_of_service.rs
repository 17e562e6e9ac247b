//! The program's last duties: it leaves nothing of an image in this host's cache, and nothing that a successor needs in
//! the hands of a thread that is stuck.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

#[path = "../../blk/tests/fuse/mod.rs"]
mod fuse;
mod process;

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use fuse::Failing;
use process::{LIMIT, Scratch, Service};
use rustix::process::{Signal, kill_process};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio::fake::{FakeDriver, FakeOptions, MEMORY_START};
use virtio::memory::Mapping;
use virtio::{GuestAddr, Memory, Region};
use vmm_sys_util::eventfd::EventFd;

const BLOCK: usize = 4096;
const MEMORY_BYTES: u64 = 1 << 20;
/// What is added to a guest address to make the front end's.
const USER: u64 = 0x7f00_0000_0000;
/// Request types (virtio 1.2, section 5.2.6).
const IN: u32 = 0;
const OUT: u32 = 1;

/// A front end that has negotiated what there is, and set up nothing.
fn front_end(socket: &str) -> Frontend {
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
struct Guest {
    frontend: Frontend,
    driver: FakeDriver,
    kick: EventFd,
}

impl Guest {
    fn new(socket: &str) -> Self {
        let (mapping, file) = Mapping::anonymous("guest", MEMORY_BYTES).unwrap();
        let region = Region::new(GuestAddr(MEMORY_START), Arc::new(mapping)).unwrap();
        let options = FakeOptions { memory_bytes: MEMORY_BYTES, ..FakeOptions::default() };
        let driver = FakeDriver::in_memory(options, Memory::new(vec![region]).unwrap());
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
        Self { frontend, driver, kick }
    }

    /// The status of a request for one block.
    fn request(&mut self, kind: u32, block: u64, data: &[u8]) -> u8 {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&(block * (BLOCK / 512) as u64).to_le_bytes());
        let driver = &mut self.driver;
        let head = driver.readable(&header);
        let data = if kind == OUT { driver.readable(data) } else { driver.writable(BLOCK) };
        let status = driver.writable(1);
        driver.offer(&[head, data, status], false);
        self.kick.write(1).unwrap();
        eventually("the answer", || driver.ring.reap().unwrap().is_some());
        driver.read(status.addr, 1)[0]
    }
}

/// Waits until `condition` holds.
fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {LIMIT:?}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Another host may serve the image next, and knows nothing of this one's cache.
#[test]
fn nothing_of_an_image_is_left_in_the_cache_when_its_service_ends() {
    for engine in ["uring", "inline"] {
        for told_by_front_end in [true, false] {
            let context = format!("{engine}, told by its front end: {told_by_front_end}");
            let Some(storage) = Failing::new(16 * BLOCK) else { return };
            let scratch = Scratch::new();
            let socket = scratch.path("a.sock");
            let image = storage.path_for_others();
            let backend = format!("file:{},direct=off,engine={engine}", image.display());
            let mut service = Service::start(&["blk", "--socket", &socket, "--backend", &backend]);
            service.line("ready: ");
            let mut guest = Guest::new(&socket);
            let data = [7; BLOCK];
            assert_eq!(guest.request(OUT, 3, &data), 0, "{context}");
            assert!(!storage.has(3 * BLOCK, &data), "{context}: what the test is about");
            let before = storage.fsyncs();
            if told_by_front_end {
                guest.frontend.get_vring_base(0).unwrap();
            } else {
                assert_eq!(service.end(Signal::TERM), Some(0), "{context}");
            }
            assert!(storage.fsyncs() > before, "{context}: nobody asked for it to be durable");
            assert!(storage.has(3 * BLOCK, &data), "{context}: the next host would read old data");
            if told_by_front_end {
                assert_eq!(service.end(Signal::TERM), Some(0), "{context}");
            }
        }
    }
}

/// Two disks in one process: the front end of the one leaves a thread stuck, and the other's image, socket and guest are
/// a successor's when the process was told to end, although it cannot go before the thread does.
#[test]
fn a_thread_that_is_stuck_in_a_close_keeps_nothing_from_a_successor() {
    let scratch = Scratch::new();
    let sockets = ["a", "b"].map(|name| scratch.path(&format!("{name}.sock")));
    let mut config = String::new();
    for socket in &sockets {
        let image = format!("{socket}.raw");
        File::create(&image).unwrap().set_len(1 << 20).unwrap();
        config += &format!("[[blk]]\nsocket = '{socket}'\nbackend = 'file:{image}'\n");
    }
    let file = scratch.path("vm.toml");
    std::fs::write(&file, config).unwrap();
    let start = || {
        let service = Service::start(&["serve", "--config", &file]);
        sockets.iter().for_each(|_| drop(service.line("ready: ")));
        service
    };
    let mut service = start();
    // Behind the service: its process is waited for after the file system has let go of it.
    let Some(stuck) = Failing::new(BLOCK) else { return };
    let mut neighbour = Guest::new(&sockets[1]);
    assert_eq!(neighbour.request(OUT, 1, &[9; BLOCK]), 0);

    let hostile = front_end(&sockets[0]);
    let closing = into_eventfd(File::options().write(true).open(stuck.path()).unwrap());
    stuck.hold_one_close();
    let _ = hostile.set_vring_call(0, &closing);
    eventually("a thread is stuck", || stuck.held() == 1);
    drop((closing, hostile));
    assert_eq!(neighbour.request(IN, 1, &[]), 0);
    kill_process(service.pid(), Signal::TERM).unwrap();
    service.line("stopped: ");
    assert!(!sockets.iter().any(|socket| Path::new(socket).exists()));
    let mut successor = start();
    let mut neighbour = Guest::new(&sockets[1]);
    assert_eq!(neighbour.request(IN, 1, &[]), 0);
    assert_eq!(successor.end(Signal::TERM), Some(0));
    stuck.release();
    assert_eq!(service.code(), Some(0));
}

/// The front end's library sends eventfds only.
#[allow(unsafe_code, reason = "a descriptor of another kind is to be sent as an eventfd")]
fn into_eventfd(file: impl Into<OwnedFd>) -> EventFd {
    use std::os::fd::{FromRawFd, IntoRawFd};
    // SAFETY: whatever it is, it is open and ours to give; it is only sent and closed.
    unsafe { EventFd::from_raw_fd(file.into().into_raw_fd()) }
}

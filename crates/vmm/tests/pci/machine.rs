//! A machine without vCPUs: a bus, and the three things that devices need of a machine.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use reactor::{Mode, Pool};
use virtio::{Call, GuestAddr, QueueSet};
use vmm::pci::virtio::Resources;
use vmm::pci::{Bell, Bus, Doorbells, Interrupts, Mappings, Msi, Registration, Vector, VirtioPci, Windows};

use crate::echo::Echo;
use crate::guest::Guest;

/// The limit for what must happen at once on a machine with nothing else to do.
const PATIENCE: Duration = Duration::from_secs(120);

/// Waits until `condition` holds.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::yield_now();
    }
}

/// The machine's side of all devices: messages that arrived, doorbells and mappings that are registered.
#[derive(Default)]
pub(crate) struct Board {
    arrived: Mutex<Vec<Msi>>,
    news: Condvar,
    doorbells: Mutex<Vec<(u64, OwnedFd)>>,
    mappings: Mutex<Vec<(u64, u64)>>,
}

impl Board {
    /// Takes the messages that have arrived.
    pub(crate) fn take(&self) -> Vec<Msi> {
        std::mem::take(&mut *self.arrived.lock().unwrap())
    }

    /// Waits for a message with these data, and takes one.
    pub(crate) fn wait(&self, data: u32) -> Msi {
        let deadline = Instant::now() + PATIENCE;
        let mut arrived = self.arrived.lock().unwrap();
        loop {
            if let Some(at) = arrived.iter().position(|msi| msi.data == data) {
                return arrived.remove(at);
            }
            let left = deadline.checked_duration_since(Instant::now()).expect("an interrupt comes in time");
            arrived = self.news.wait_timeout(arrived, left).unwrap().0;
        }
    }

    /// The addresses of the doorbells.
    pub(crate) fn doorbells(&self) -> Vec<u64> {
        self.doorbells.lock().unwrap().iter().map(|(addr, _)| *addr).collect()
    }

    /// Addresses and lengths of the mappings.
    pub(crate) fn mappings(&self) -> Vec<(u64, u64)> {
        self.mappings.lock().unwrap().clone()
    }

    /// What an ioeventfd does.
    fn ring(&self, addr: u64) -> bool {
        let doorbells = self.doorbells.lock().unwrap();
        let Some((_, kick)) = doorbells.iter().find(|(at, _)| *at == addr) else { return false };
        rustix::io::write(kick, &1u64.to_ne_bytes()).unwrap();
        true
    }
}

struct Line {
    board: Arc<Board>,
    msi: Mutex<Option<Msi>>,
}

impl Call for Line {
    fn call(&self) -> bool {
        let msi = self.msi.lock().unwrap().expect("a message is known before it is sent");
        self.board.arrived.lock().unwrap().push(msi);
        self.board.news.notify_all();
        true
    }
}

impl Vector for Line {
    fn set(&self, msi: Msi) {
        *self.msi.lock().unwrap() = Some(msi);
    }
}

struct Handle(Arc<Board>);

impl Interrupts for Handle {
    fn vector(&self, _index: u16) -> io::Result<Arc<dyn Vector>> {
        Ok(Arc::new(Line { board: self.0.clone(), msi: Mutex::default() }))
    }
}

/// A doorbell, as KVM has them.
struct Knob {
    board: Arc<Board>,
    kick: OwnedFd,
    at: Mutex<Option<u64>>,
}

impl std::fmt::Debug for Knob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Knob").field("at", &self.at).finish_non_exhaustive()
    }
}

impl virtio::Doorbell for Knob {
    fn fd(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    fn awake(&self) {}

    fn listen(&self) -> bool {
        false
    }
}

impl Bell for Knob {
    fn place(&self, addr: GuestAddr) -> io::Result<()> {
        let mut doorbells = self.board.doorbells.lock().unwrap();
        assert!(doorbells.iter().all(|(at, _)| *at != addr.0), "two doorbells at {addr}");
        assert_eq!(self.at.lock().unwrap().replace(addr.0), None, "it is elsewhere");
        doorbells.push((addr.0, self.kick.try_clone()?));
        Ok(())
    }

    fn remove(&self) {
        let at = self.at.lock().unwrap().take().expect("it is somewhere");
        self.board.doorbells.lock().unwrap().retain(|(addr, _)| *addr != at);
    }
}

impl Doorbells for Handle {
    fn bell(&self, _queue: u16, kick: OwnedFd) -> io::Result<Arc<dyn Bell>> {
        Ok(Arc::new(Knob { board: self.0.clone(), kick, at: Mutex::default() }))
    }
}

/// Ends a registration.
struct End<F: FnMut()>(F);

impl<F: FnMut()> Drop for End<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

impl Mappings for Handle {
    fn map(&self, addr: GuestAddr, file: BorrowedFd<'_>, len: u64) -> io::Result<Registration> {
        assert!(rustix::fs::fstat(file.as_fd()).unwrap().st_size as u64 >= len);
        let mut mappings = self.0.mappings.lock().unwrap();
        let overlaps = |(at, other): &(u64, u64)| addr.0 < at + other && *at < addr.0 + len;
        assert!(!mappings.iter().any(overlaps), "two mappings at {addr}");
        mappings.push((addr.0, len));
        let board = self.0.clone();
        let end = move || board.mappings.lock().unwrap().retain(|(at, _)| *at != addr.0);
        Ok(Box::new(End(end)))
    }
}

/// A machine with some devices.
pub(crate) struct Machine {
    pub(crate) bus: Bus,
    pub(crate) board: Arc<Board>,
    pub(crate) guest: Guest,
    pub(crate) devices: Vec<Arc<VirtioPci>>,
}

impl Machine {
    /// Puts devices into slots from 1 up.
    pub(crate) fn new(devices: &[Arc<Echo>]) -> Self {
        Self::without(devices, 0)
    }

    /// The same, with features that are not offered.
    pub(crate) fn without(devices: &[Arc<Echo>], without: u64) -> Self {
        let pool = Arc::new(Pool::start(reactor::Options::default()).unwrap());
        let (board, guest) = (Arc::<Board>::default(), Guest::new());
        let mut bus = Bus::new(Windows::default());
        let attach = |(slot, device): (usize, &Arc<Echo>)| {
            let queues = QueueSet::new(device.clone(), pool.clone(), Mode::Hybrid, format!("echo{slot}"));
            let resources = Resources {
                memory: guest.memory.clone(),
                interrupts: Arc::new(Handle(board.clone())),
                doorbells: Arc::new(Handle(board.clone())),
                mappings: Arc::new(Handle(board.clone())),
                without,
            };
            let device = Arc::new(VirtioPci::new(queues, resources).unwrap());
            assert_eq!(bus.add(device.clone()), Ok(slot + 1));
            device
        };
        let devices = devices.iter().enumerate().map(attach).collect();
        bus.assign().unwrap();
        Self { bus, board, guest, devices }
    }

    /// A vCPU writes to memory that is not RAM.
    pub(crate) fn write(&self, addr: u64, data: &[u8]) {
        if !self.board.ring(addr) {
            self.bus.mmio_write(addr, data);
        }
    }

    /// A vCPU reads from memory that is not RAM.
    pub(crate) fn read<const N: usize>(&self, addr: u64) -> [u8; N] {
        let mut data = [0x5a; N];
        if !self.bus.mmio_read(addr, &mut data) {
            data.fill(0xff);
        }
        data
    }
}

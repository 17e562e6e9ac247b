//! A guest that accesses anything of two PCI devices in any way, beside a third that it leaves alone.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use blk::Blk;
use blk::backends::null::Null;
use reactor::{Mode, Pool};
use virtio::fake::{FakeDriver, FakeOptions, MEMORY_START};
use virtio::{Call, Device, GuestAddr, Memory, QueueSet};
use vmm::pci::virtio::Resources;
use vmm::pci::{Bell, Bus, Doorbells, Interrupts, Mappings, Msi, Registration, Vector, VirtioPci, Windows};

use crate::input::Input;

/// Slots of the devices that the input is about, and of the one that it is not.
const VICTIMS: [u64; 2] = [1, 2];
const NEIGHBOUR: u64 = 3;
const STEPS_MAX: usize = 512;
/// Offset and width of what a driver writes in the common configuration.
const REGISTERS: [(u64, usize); 17] = [
    (0x00, 4),
    (0x08, 4),
    (0x0c, 4),
    (0x10, 2),
    (0x14, 1),
    (0x16, 2),
    (0x18, 2),
    (0x1a, 2),
    (0x1c, 2),
    (0x20, 4),
    (0x24, 4),
    (0x28, 4),
    (0x2c, 4),
    (0x30, 4),
    (0x34, 4),
    (0x3a, 2),
    (0x14, 1),
];
/// Offsets in memory of the rings that devices are brought up with, and of buffers for their chains.
const DESCRIPTORS: u32 = 0;
const AVAILABLE: u32 = 0x400;
const USED: u32 = 0x800;
const BUFFERS: u32 = 0x4000;
/// What makes queue 0 of a fresh device run: writes to REGISTERS.
const BRING_UP: [(usize, u32); 10] = [
    (4, 3),
    (1, 1),
    (2, 1),
    (4, 11),
    (6, 16),
    (9, DESCRIPTORS),
    (11, AVAILABLE),
    (13, USED),
    (8, 1),
    (4, 15),
];
/// Descriptors by victim: a disk's request to read its first sector, and a buffer to be filled with entropy. Offset of
/// the buffer, length, flags, the next one.
const CHAINS: [&[(u32, u32, u16, u16)]; 2] =
    [&[(0, 16, 1, 1), (0x1000, 512, 3, 2), (0x100, 1, 2, 0)], &[(0, 64, 2, 0)]];

/// Runs one input: a program of accesses.
///
/// # Panics
/// The device that was left alone does not work any more, or a device lost its identity: a bug.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let guest = || FakeDriver::new(FakeOptions { memory_bytes: 256 << 10, ..FakeOptions::default() });
    // Memory of its own: what victims do to each other's rings is not what this is about.
    let (theirs, mut driver) = (guest(), guest());
    let machine = Machine::new([theirs.memory(), theirs.memory(), driver.memory()]);
    machine.bring_up_neighbour(&driver);
    let mut steps = 0;
    while !input.is_empty() && steps < STEPS_MAX {
        machine.step(&mut input, &theirs);
        steps += 1;
    }
    machine.ask_neighbour(&mut driver);
    for slot in VICTIMS.into_iter().chain([0, NEIGHBOUR]) {
        let vendor = u16::from_le_bytes(machine.config_read(slot, 0));
        assert_eq!(vendor, if slot == 0 { 0x1b36 } else { 0x1af4 });
    }
}

/// A bus with a disk, a source of entropy, and another of those that is left alone.
struct Machine {
    bus: Bus,
    victims: Vec<Arc<VirtioPci>>,
    /// The neighbour's registers and doorbells.
    registers: u64,
    doorbells: u64,
}

impl Machine {
    fn new(memories: [&Arc<Memory>; 3]) -> Self {
        let disk = Blk::new(Arc::new(Null::new(1 << 20)), blk::Options::default()).expect("allowed options");
        let entropy = || Arc::new(rng::Rng::new(None));
        let devices: [Arc<dyn Device>; 3] = [Arc::new(disk), entropy(), entropy()];
        let (mut bus, mut victims) = (Bus::new(Windows::default()), Vec::new());
        // Runs may overlap, and a label is unique in its pool.
        static RUNS: AtomicU64 = AtomicU64::new(0);
        let run = RUNS.fetch_add(1, Ordering::Relaxed);
        for (index, (device, memory)) in devices.into_iter().zip(memories).enumerate() {
            let queues = QueueSet::new(device, pool().clone(), Mode::Hybrid, format!("pci{run}.{index}"));
            let resources = Resources {
                memory: memory.clone(),
                interrupts: Arc::new(Nothing),
                doorbells: Arc::new(Nothing),
                mappings: Arc::new(Nothing),
                without: 0,
            };
            let device = Arc::new(VirtioPci::new(queues, resources).expect("a device that fits"));
            bus.add(device.clone()).expect("a free slot");
            victims.push(device);
        }
        bus.assign().expect("addresses for all");
        victims.truncate(VICTIMS.len());
        let mut machine = Self { bus, victims, registers: 0, doorbells: 0 };
        machine.registers = machine.bar(NEIGHBOUR, 0);
        machine.doorbells = machine.bar(NEIGHBOUR, 1);
        VICTIMS.into_iter().chain([NEIGHBOUR]).for_each(|slot| machine.config_write(slot, 4, &[6, 0]));
        machine
    }

    fn step(&self, input: &mut Input<'_>, theirs: &FakeDriver) {
        let choice = input.u8();
        let index = usize::from(choice >> 7);
        let victim = VICTIMS[index];
        let len = 1 << (choice >> 5 & 3);
        match choice & 0x1f {
            27 => theirs.write(GuestAddr(MEMORY_START + u64::from(input.u16() >> 2)), input.bytes(len)),
            28 => self.offer(index, theirs, input.u8()),
            29 => {
                self.victims[index].pause();
                assert_eq!(self.victims[index].counters().len(), 1);
                self.victims[index].resume();
            }
            30 => {
                // From the start, with features of the ring: the lower half from bit 24 up.
                let (low, high) = (u32::from(input.u8()) << 24, u32::from(input.u16()));
                let features = [(4, 0), (4, 3), (1, 0), (2, low), (1, 1), (2, high)];
                let writes = features.iter().chain(&BRING_UP[3..]);
                writes.for_each(|(register, value)| self.set(victim, *register, *value));
            }
            _ => self.access(choice, victim, len, input),
        }
    }

    /// Makes a chain that the device understands available `times` times, and says so.
    fn offer(&self, index: usize, theirs: &FakeDriver, times: u8) {
        let at = |offset: u32| GuestAddr(MEMORY_START + u64::from(offset));
        for (descriptor, (offset, len, flags, next)) in (0..).zip(CHAINS[index]) {
            let mut bytes = at(BUFFERS + offset).0.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend([flags.to_le_bytes(), next.to_le_bytes()].concat());
            theirs.write(at(DESCRIPTORS + 16 * descriptor), &bytes);
        }
        let available = theirs.read(at(AVAILABLE + 2), 2);
        let available = u16::from_le_bytes([available[0], available[1]]).wrapping_add((times % 8).into());
        theirs.write(at(AVAILABLE + 2), &available.to_le_bytes());
        self.write(self.bar(VICTIMS[index], 1), &[0, 0]);
    }

    /// Makes one access.
    fn access(&self, choice: u8, victim: u64, len: usize, input: &mut Input<'_>) {
        match choice % 9 {
            0 => self.config_write(victim, (input.u16() % 4096).into(), input.bytes(len)),
            1 => drop(self.config_read::<8>(victim, (input.u16() % 4096).into())),
            2 | 3 => {
                let port = 0xcf8 + u16::from(input.u8() % 8);
                let mut latch = [0; 4];
                self.bus.port_read(0xcf8, &mut latch);
                if u64::from(u32::from_le_bytes(latch) >> 11 & 0x1f) == NEIGHBOUR && port >= 0xcfc {
                    return;
                }
                if choice % 9 == 2 {
                    self.bus.port_write(port, input.bytes(len));
                } else {
                    self.bus.port_read(port, &mut [0; 8][..len]);
                }
            }
            4 => {
                let addr = self.bar(victim, u64::from(input.u8() & 1)).wrapping_add(input.u16().into());
                self.write(addr, input.bytes(len));
            }
            5 => {
                let addr = self.bar(victim, u64::from(input.u8() & 1)).wrapping_add(input.u16().into());
                self.bus.mmio_read(addr, &mut [0; 8][..len]);
            }
            6 => {
                let register = usize::from(input.u8()) % REGISTERS.len();
                self.set(victim, register, u32::from(input.u16()));
            }
            7 => {
                let addr = u64::from(input.u16()) << 16 | u64::from(input.u16());
                self.write(addr, input.bytes(len));
            }
            _ => BRING_UP.iter().for_each(|(register, value)| self.set(victim, *register, *value)),
        }
    }

    /// Writes one register; ring addresses are offsets in memory.
    fn set(&self, victim: u64, register: usize, value: u32) {
        let (offset, len) = REGISTERS[register];
        let value = match offset {
            0x20 | 0x28 | 0x30 => MEMORY_START as u32 + value,
            0x24 | 0x2c | 0x34 => value & 1,
            _ => value,
        };
        self.write(self.bar(victim, 0).wrapping_add(offset), &value.to_le_bytes()[..len]);
    }

    /// Writes, but not to the neighbour.
    fn write(&self, addr: u64, data: &[u8]) {
        let config = self.bus.windows().ecam.start + (NEIGHBOUR << 15);
        let theirs = [(self.registers, 0x8000), (self.doorbells, 0x1000), (config, 0x1000)];
        let end = addr.saturating_add(data.len() as u64);
        if theirs.iter().all(|&(start, len)| end <= start || addr >= start + len) {
            self.bus.mmio_write(addr, data);
        }
    }

    fn config_read<const N: usize>(&self, slot: u64, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.bus.mmio_read(self.bus.windows().ecam.start + (slot << 15) + offset, &mut data);
        data
    }

    fn config_write(&self, slot: u64, offset: u64, data: &[u8]) {
        self.bus.mmio_write(self.bus.windows().ecam.start + (slot << 15) + offset, data);
    }

    fn bar(&self, slot: u64, index: u64) -> u64 {
        (u32::from_le_bytes(self.config_read(slot, 0x10 + 4 * index)) & !0xf).into()
    }

    fn bring_up_neighbour(&self, driver: &FakeDriver) {
        let config = driver.ring_config();
        let features = virtio::features::VERSION_1 | virtio::features::INDIRECT_DESC;
        let write = |offset, data: &[u8]| self.bus.mmio_write(self.registers + offset, data);
        write(0x14, &[3]);
        for select in 0..2u32 {
            write(0x08, &select.to_le_bytes());
            write(0x0c, &((features >> (32 * select)) as u32).to_le_bytes());
        }
        write(0x14, &[11]);
        write(0x18, &config.size.to_le_bytes());
        write(0x20, &config.desc.0.to_le_bytes());
        write(0x28, &config.driver.0.to_le_bytes());
        write(0x30, &config.device.0.to_le_bytes());
        write(0x1c, &[1, 0]);
        write(0x14, &[15]);
        let mut status = [0];
        self.bus.mmio_read(self.registers + 0x14, &mut status);
        assert_eq!(status, [15]);
    }

    fn ask_neighbour(&self, driver: &mut FakeDriver) {
        let mut status = [0];
        self.bus.mmio_read(self.registers + 0x14, &mut status);
        assert_eq!(status, [15], "nobody has reset or broken it");
        let buffer = driver.writable(16);
        driver.offer(&[buffer], false);
        self.bus.mmio_write(self.doorbells, &[0, 0]);
        let deadline = Instant::now() + Duration::from_secs(120);
        while driver.ring.reap().expect("a sound ring").is_none() {
            assert!(Instant::now() < deadline, "the neighbour does not answer");
            std::thread::yield_now();
        }
    }
}

fn pool() -> &'static Arc<Pool> {
    static POOL: OnceLock<Arc<Pool>> = OnceLock::new();
    POOL.get_or_init(|| Arc::new(Pool::start(reactor::Options::default()).expect("an I/O thread")))
}

/// A machine that does nothing for its devices: all kicks come through the bus.
struct Nothing;

impl Call for Nothing {
    fn call(&self) -> bool {
        true
    }
}

impl Vector for Nothing {
    fn set(&self, _msi: Msi) {}
}

impl Interrupts for Nothing {
    fn vector(&self, _index: u16) -> io::Result<Arc<dyn Vector>> {
        Ok(Arc::new(Self))
    }
}

#[derive(Debug)]
struct Knob(OwnedFd);

impl virtio::Doorbell for Knob {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn awake(&self) {}

    fn listen(&self) -> bool {
        false
    }
}

impl Bell for Knob {
    fn place(&self, _addr: GuestAddr) -> io::Result<()> {
        Ok(())
    }

    fn remove(&self) {}
}

impl Doorbells for Nothing {
    fn bell(&self, _queue: u16, kick: OwnedFd) -> io::Result<Arc<dyn Bell>> {
        Ok(Arc::new(Knob(kick)))
    }
}

impl Mappings for Nothing {
    fn map(&self, _addr: GuestAddr, _file: BorrowedFd<'_>, _len: u64) -> io::Result<Registration> {
        Ok(Box::new(()))
    }
}

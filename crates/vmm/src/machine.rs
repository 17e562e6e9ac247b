//! A machine: puts the parts together, runs them, and says how it ended and what was counted.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use reactor::{CPUS_MAX, Clock, Pool};
use virtio::QueueSet;

use crate::boot::{self, Boot};
use crate::bus::Bus;
use crate::config::{Config, PciDevice};
use crate::doorbell::PageFaults;
use crate::irq::{self, Messages};
use crate::kvm::Vm;
use crate::legacy::{Cmos, DebugExit, EndWord, I8042, MarkPort, PanicPort};
use crate::memory::Ram;
use crate::pci::virtio::Resources;
use crate::pci::{self, VirtioPci};
use crate::platform::{self, DeviceDoorbells, Shown};
use crate::pm1::Pm1;
use crate::power::Power;
use crate::serial::Console;
use crate::stats::{QueueSnapshot, Snapshot};
use crate::vcpu::{Buses, Meter, Running, Vcpu};
use crate::{Error, Outcome, layout};

/// A virtual machine. All its methods may be called from any thread.
pub struct Machine {
    power: Arc<Power>,
    /// What will run. Taken by [`Machine::run`].
    waiting: Mutex<Option<Vec<Vcpu>>>,
    running: Mutex<Vec<Running>>,
    buses: Arc<Buses>,
    console: Arc<Console>,
    buttons: Buttons,
    counted: Arc<Counted>,
    /// Held while a pause begins or ends.
    pausing: Mutex<()>,
    /// What virtual CPUs and devices work in, so it goes last.
    _ram: Ram,
}

/// The ways to ask the guest for an end.
struct Buttons {
    pm1: Arc<Pm1>,
    end_word: Arc<EndWord>,
}

/// A device in its slot.
struct Attached {
    label: String,
    function: Arc<VirtioPci>,
    doorbells: Arc<DeviceDoorbells>,
}

/// What snapshots are taken of.
struct Counted {
    meters: Vec<Meter>,
    devices: Vec<Attached>,
    pool: Arc<Pool>,
    marks: Mutex<Marks>,
}

/// What the guest marked: a part that has begun, and what was counted in the last one that has ended.
#[derive(Default)]
struct Marks {
    begin: Option<Snapshot>,
    measured: Option<Snapshot>,
}

impl Machine {
    /// Builds a machine with everything in it, ready to run. The devices' queues run on the I/O threads of `pool`; the
    /// devices are in the slots of the PCI bus from 1 on, in the order given.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn new(config: Config, devices: Vec<PciDevice>, pool: Arc<Pool>) -> Result<Self, Error> {
        let vm = Arc::new(Vm::new()?);
        let cpus = config.cpus;
        if !(1..=vm.cpus_max).contains(&cpus) {
            return Err(Error::Cpus { cpus, max: vm.cpus_max });
        }
        if !config.pin.is_empty() && config.pin.len() != cpus {
            return Err(Error::Pins { pins: config.pin.len(), cpus });
        }
        if let Some(&cpu) = config.pin.iter().find(|&&cpu| cpu >= CPUS_MAX) {
            return Err(Error::HostCpu { cpu, max: CPUS_MAX });
        }
        let mut ram = Ram::new(config.memory_bytes, config.huge_pages)?;
        ram.attach(&vm)?;
        let (kernel, initrd, command_line) = (&config.kernel, config.initrd.as_deref(), &config.command_line);
        let entry = boot::load(&Boot { kernel, initrd, command_line, cpus }, &ram)?;
        let vcpus = (0..cpus)
            .map(|index| Vcpu::new(&vm, index, cpus, entry, config.pin.get(index).copied()))
            .collect::<Result<Vec<_>, _>>()?;

        let meters: Vec<_> = vcpus.iter().map(Vcpu::meter).collect();
        let faults: PageFaults = {
            let meters = meters.clone();
            Arc::new(move || meters.iter().map(Meter::page_faults).sum())
        };
        let bells = |vm: &Arc<Vm>| DeviceDoorbells::new(vm.clone(), config.doorbells, faults.clone());
        let mut bus = pci::Bus::new(platform::windows());
        let devices = devices
            .into_iter()
            .map(|device| attach(device, &vm, &ram, bells(&vm), &pool, &mut bus))
            .collect::<Result<Vec<_>, _>>()?;
        bus.assign()
            .map_err(|error| Error::Device { label: "devices".to_owned(), reason: error.to_string() })?;

        let counted = Arc::new(Counted { meters, devices, pool, marks: Mutex::default() });
        let power = Arc::new(Power::new());
        let console = Arc::new(Console::new(irq::line(&vm.fd, layout::COM1_IRQ)?, config.serial));
        let (mut ports, mut mmio) = (Bus::default(), Bus::default());
        platform::connect(&Arc::new(bus), &power, &mut ports, &mut mmio)?;
        let sci = Box::new(irq::level(vm.fd.clone(), layout::SCI_IRQ));
        let buttons = Buttons {
            pm1: Arc::new(Pm1::new(power.clone(), sci)),
            end_word: Arc::new(EndWord::new(ram.memory().clone())),
        };
        connect(&mut ports, &power, &console, &buttons, &counted)?;
        Ok(Self {
            power,
            waiting: Mutex::new(Some(vcpus)),
            running: Mutex::default(),
            buses: Arc::new(Buses { ports, mmio }),
            console,
            buttons,
            counted,
            pausing: Mutex::new(()),
            _ram: ram,
        })
    }

    /// Runs it until it ends, which may be never.
    ///
    /// # Errors
    /// [`Error::Used`] the second time, [`Error::Vcpu`] if a virtual CPU cannot go on, [`Error::System`] if a thread
    /// cannot be started.
    pub fn run(&self) -> Result<Outcome, Error> {
        let vcpus = lock(&self.waiting).take().ok_or(Error::Used)?;
        let mut result = Ok(());
        for vcpu in vcpus {
            // Whoever wants to kick all waits until the one that is being started can be.
            let mut running = lock(&self.running);
            match vcpu.start(self.buses.clone(), self.power.clone()) {
                Ok(started) => running.push(started),
                Err(error) => {
                    self.power.end(Outcome::Stopped);
                    result = Err(error);
                    break;
                }
            }
        }
        let outcome = self.power.wait();
        self.kick();
        let mut running = std::mem::take(&mut *lock(&self.running));
        for vcpu in &mut running {
            result = result.and(vcpu.join());
        }
        result.map(|()| outcome)
    }

    /// Ends it, if it has not ended. [`Machine::run`] returns soon.
    pub fn stop(&self) {
        self.power.end(Outcome::Stopped);
    }

    /// Presses the power button, which asks the guest to come to an end of its own. False if it has not said that it
    /// listens, and so will not.
    pub fn press_power_button(&self) -> bool {
        // Both: who listens to one does not listen to the other.
        let (pressed, told) = (self.buttons.pm1.press(), self.buttons.end_word.ask());
        pressed || told
    }

    /// Stops all virtual CPUs where they are, then the devices' queues, and returns when nothing moves any more: that
    /// takes as long as the requests in flight. False if the machine has ended.
    pub fn pause(&self) -> bool {
        let _alone = lock(&self.pausing);
        if !self.power.pause() {
            return false;
        }
        self.kick();
        self.power.wait_for_rest();
        self.counted.devices.iter().for_each(|device| device.function.pause());
        true
    }

    /// Lets them go on.
    pub fn resume(&self) {
        let _alone = lock(&self.pausing);
        self.counted.devices.iter().for_each(|device| device.function.resume());
        self.power.resume();
    }

    /// Types on its serial console as much of `bytes` as is taken now, and says how much that was.
    pub fn input(&self, bytes: &[u8]) -> usize {
        self.console.input(bytes)
    }

    /// What was counted so far.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        self.counted.snapshot()
    }

    /// What was counted between two moments that the guest marked, by writing 1 and 2 to port 0x502; the last time, if it
    /// did so more than once.
    #[must_use]
    pub fn measured(&self) -> Option<Snapshot> {
        lock(&self.counted.marks).measured.clone()
    }

    fn kick(&self) {
        lock(&self.running).iter().for_each(Running::kick);
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Nothing runs any more, unless `run` panicked.
        self.power.end(Outcome::Stopped);
        self.kick();
        lock(&self.running).iter_mut().for_each(|vcpu| drop(vcpu.join()));
    }
}

impl Counted {
    fn snapshot(&self) -> Snapshot {
        let vcpus = self.meters.iter().map(Meter::read).collect();
        let queues = self.devices.iter().flat_map(Attached::queues).collect();
        Snapshot::new(Clock::get().now(), vcpus, queues, self.pool.report())
    }

    /// The guest writes a mark.
    fn mark(&self, mark: u8) {
        const BEGIN: u8 = 1;
        const END: u8 = 2;
        match mark {
            BEGIN => lock(&self.marks).begin = Some(self.snapshot()),
            END => {
                let end = self.snapshot();
                let mut marks = lock(&self.marks);
                marks.measured = marks.begin.take().map(|begin| end - &begin);
            }
            _ => {}
        }
    }
}

impl Attached {
    fn queues(&self) -> Vec<QueueSnapshot> {
        let queues = self.function.counters().into_iter().zip(self.doorbells.counters());
        let snapshot = |(queue, (counters, doorbell))| QueueSnapshot {
            device: self.label.clone(),
            queue,
            counters,
            doorbell,
        };
        (0..).zip(queues).map(snapshot).collect()
    }
}

/// Puts a device into the next slot.
fn attach(
    device: PciDevice,
    vm: &Arc<Vm>,
    ram: &Ram,
    doorbells: DeviceDoorbells,
    pool: &Arc<Pool>,
    bus: &mut pci::Bus,
) -> Result<Attached, Error> {
    let label = device.label;
    let failed = |reason: String| Error::Device { label: label.clone(), reason };
    let doorbells = Arc::new(doorbells);
    let resources = Resources {
        memory: ram.memory().clone(),
        interrupts: Arc::new(Messages(vm.fd.clone())),
        doorbells: doorbells.clone(),
        mappings: Arc::new(Shown(vm.clone())),
        without: device.without,
    };
    let queues = QueueSet::new(device.device, pool.clone(), device.mode, label.clone());
    let function = VirtioPci::new(queues, resources).map_err(|error| failed(error.to_string()))?;
    let function = Arc::new(function);
    bus.add(function.clone()).map_err(|error| failed(error.to_string()))?;
    Ok(Attached { label, function, doorbells })
}

/// The devices on ports, apart from PCI.
fn connect(
    ports: &mut Bus,
    power: &Arc<Power>,
    console: &Arc<Console>,
    buttons: &Buttons,
    counted: &Arc<Counted>,
) -> Result<(), Error> {
    let marked = counted.clone();
    let mark = MarkPort(Box::new(move |mark| marked.mark(mark)));
    ports.add("the serial port", layout::COM1, console.clone())?;
    ports.add("the keyboard controller", layout::I8042, Arc::new(I8042(power.clone())))?;
    ports.add("the real-time clock", layout::CMOS, Arc::new(Cmos::default()))?;
    ports.add("power management", layout::PM1, buttons.pm1.clone())?;
    ports.add("the exit port", layout::DEBUG_EXIT, Arc::new(DebugExit(power.clone())))?;
    ports.add("the panic device", layout::PANIC, Arc::new(PanicPort(power.clone())))?;
    ports.add("the port for the word that ends", layout::END_WORD, buttons.end_word.clone())?;
    ports.add("the mark port", layout::MARKS, Arc::new(mark))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

//! A machine: puts the parts together, runs them, and says how it ended and what was counted.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use reactor::{Clock, Pool};

use crate::boot::{self, Boot};
use crate::bus::Bus;
use crate::config::{Config, PciDevice};
use crate::kvm::Vm;
use crate::legacy::{Cmos, DebugExit, I8042, MarkPort, Pm1};
use crate::memory::Ram;
use crate::power::Power;
use crate::serial::Console;
use crate::stats::Snapshot;
use crate::vcpu::{Buses, Meter, Running, Vcpu};
use crate::{Error, Outcome, irq, layout};

/// A virtual machine. All its methods may be called from any thread.
pub struct Machine {
    power: Arc<Power>,
    /// Before it runs: what will run. Taken by [`Machine::run`].
    waiting: Mutex<Option<Vec<Vcpu>>>,
    running: Mutex<Vec<Running>>,
    buses: Arc<Buses>,
    console: Arc<Console>,
    counted: Arc<Counted>,
    /// What virtual CPUs and devices work in, so it goes last.
    _ram: Ram,
}

/// What snapshots are taken of.
struct Counted {
    meters: Vec<Meter>,
    pool: Arc<Pool>,
    marks: Mutex<Marks>,
}

/// When the guest said that what it measures begins and ends.
#[derive(Default)]
struct Marks {
    begin: Option<Snapshot>,
    end: Option<Snapshot>,
}

impl Machine {
    /// Builds a machine with everything in it, ready to run. The devices' queues run on the I/O threads of `pool`.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn new(config: Config, devices: Vec<PciDevice>, pool: Arc<Pool>) -> Result<Self, Error> {
        let vm = Vm::new()?;
        let cpus = config.cpus;
        if !(1..=vm.cpus_max).contains(&cpus) {
            return Err(Error::Cpus { cpus, max: vm.cpus_max });
        }
        if !config.pin.is_empty() && config.pin.len() != cpus {
            return Err(Error::Pins { pins: config.pin.len(), cpus });
        }
        let mut ram = Ram::new(config.memory_bytes, config.huge_pages)?;
        ram.attach(&vm)?;
        let power = Arc::new(Power::new());
        let entry = boot::load(
            &Boot {
                kernel: &config.kernel,
                initrd: config.initrd.as_deref(),
                command_line: &config.command_line,
                cpus,
            },
            &ram,
        )?;
        let vcpus = (0..cpus)
            .map(|index| Vcpu::new(&vm, index, cpus, entry, config.pin.get(index).copied()))
            .collect::<Result<Vec<_>, _>>()?;
        let counted = Arc::new(Counted {
            meters: vcpus.iter().map(Vcpu::meter).collect(),
            pool,
            marks: Mutex::default(),
        });
        let console = Arc::new(Console::new(irq::line(&vm.fd, layout::COM1_IRQ)?, config.serial));
        let ports = ports(&power, &console, &counted)?;
        let mmio = Bus::default();
        drop(devices);
        Ok(Self {
            power,
            waiting: Mutex::new(Some(vcpus)),
            running: Mutex::default(),
            buses: Arc::new(Buses { ports, mmio }),
            console,
            counted,
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
            match vcpu.start(self.buses.clone(), self.power.clone()) {
                Ok(running) => lock(&self.running).push(running),
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

    /// Stops all virtual CPUs where they are, and returns when they have. Devices go on with what they were asked. False
    /// if the machine has ended.
    pub fn pause(&self) -> bool {
        let paused = self.power.pause();
        self.kick();
        self.power.wait_for_rest();
        paused
    }

    /// Lets them go on.
    pub fn resume(&self) {
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

    /// What was counted between the two moments that the guest marked, if it did.
    #[must_use]
    pub fn measured(&self) -> Option<Snapshot> {
        let marks = lock(&self.counted.marks);
        Some(marks.end.clone()? - marks.begin.as_ref()?)
    }

    fn kick(&self) {
        lock(&self.running).iter().for_each(Running::kick);
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Nothing runs any more unless `run` panicked.
        self.power.end(Outcome::Stopped);
        self.kick();
        lock(&self.running).iter_mut().for_each(|vcpu| drop(vcpu.join()));
    }
}

impl Counted {
    fn snapshot(&self) -> Snapshot {
        let vcpus = self.meters.iter().map(Meter::read).collect();
        Snapshot::new(Clock::get().now(), vcpus, Vec::new(), self.pool.report())
    }

    /// The guest writes a mark.
    fn mark(&self, mark: u8) {
        const BEGIN: u8 = 1;
        const END: u8 = 2;
        match mark {
            BEGIN => *lock(&self.marks) = Marks { begin: Some(self.snapshot()), end: None },
            END => lock(&self.marks).end = Some(self.snapshot()),
            _ => {}
        }
    }
}

/// The devices on ports, apart from PCI.
fn ports(power: &Arc<Power>, console: &Arc<Console>, counted: &Arc<Counted>) -> Result<Bus, Error> {
    let mut ports = Bus::default();
    let marked = counted.clone();
    ports.add("the serial port", layout::COM1, console.clone())?;
    ports.add("the keyboard controller", layout::I8042, Arc::new(I8042(power.clone())))?;
    ports.add("the real-time clock", layout::CMOS, Arc::new(Cmos::default()))?;
    ports.add("power management", layout::PM1, Arc::new(Pm1::new(power.clone())))?;
    ports.add("the exit port", layout::DEBUG_EXIT, Arc::new(DebugExit(power.clone())))?;
    ports.add("the mark port", layout::MARKS, Arc::new(MarkPort(Box::new(move |mark| marked.mark(mark)))))?;
    Ok(ports)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

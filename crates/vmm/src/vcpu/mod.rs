//! Virtual CPUs: a thread each, that runs the guest and answers its exits.

mod kick;
mod registers;

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread::JoinHandle;

use kvm_ioctls::{VcpuExit, VcpuFd};
use reactor::Clock;
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::Error;
use crate::bus::Bus;
use crate::kvm::Vm;
use crate::power::{Outcome, Power};
use crate::raw;
use crate::stats::binary::Binary;
use crate::stats::{VcpuCounters, VcpuSnapshot, sampled};

use kick::{Kickable, Kicker};
pub(crate) use registers::{Entry, GDT};

/// Where exits go.
pub(crate) struct Buses {
    pub(crate) ports: Bus,
    pub(crate) mmio: Bus,
}

/// What a virtual CPU's thread shares with everybody else.
struct Shared {
    index: usize,
    counters: VcpuCounters,
    kvm: Option<Binary>,
    kicker: Kicker,
    /// The thread; 0 while there is none.
    tid: AtomicI32,
    cpu_time: sampled::Kept,
}

/// A virtual CPU that does not run yet.
pub(crate) struct Vcpu {
    fd: VcpuFd,
    shared: Arc<Shared>,
    pin: Option<u32>,
}

/// A virtual CPU's thread.
pub(crate) struct Running {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<(), Error>>>,
}

/// Reads what a virtual CPU counts, before, while and after it runs.
#[derive(Clone)]
pub(crate) struct Meter(Arc<Shared>);

impl Vcpu {
    /// Virtual CPU `index` of `count`, pinned to host CPU `pin` when it runs. The first begins at `entry`.
    pub(crate) fn new(
        vm: &Vm,
        index: usize,
        count: usize,
        entry: Entry,
        pin: Option<u32>,
    ) -> Result<Self, Error> {
        let fd = vm
            .fd
            .create_vcpu(index as u64)
            .map_err(|error| Error::kvm(format!("create virtual CPU {index}"), error))?;
        registers::prepare(&fd, index, count, &vm.cpuid, vm.has_tsc_deadline, entry)?;
        let kvm = vm.has_stats.then(|| raw::stats_fd(&fd).ok().and_then(Binary::open)).flatten();
        let shared = Arc::new(Shared {
            index,
            counters: VcpuCounters::default(),
            kvm,
            kicker: Kicker::default(),
            tid: AtomicI32::new(0),
            cpu_time: sampled::Kept::default(),
        });
        Ok(Self { fd, shared, pin })
    }

    pub(crate) fn meter(&self) -> Meter {
        Meter(self.shared.clone())
    }

    /// Runs it on a thread of its own until the machine ends.
    pub(crate) fn start(self, buses: Arc<Buses>, power: Arc<Power>) -> Result<Running, Error> {
        let Self { fd, shared, pin } = self;
        power.begin();
        let thread = std::thread::Builder::new().name(format!("vcpu-{}", shared.index)).spawn({
            let (shared, power) = (shared.clone(), power.clone());
            move || {
                let _ending = Ending(&power, &shared);
                begin(&shared, fd, pin).and_then(|cpu| run(&shared, cpu, &buses, &power))
            }
        });
        match thread {
            Ok(thread) => Ok(Running { shared, thread: Some(thread) }),
            Err(error) => {
                power.retire();
                Err(Error::system("start a thread for a virtual CPU", error))
            }
        }
    }
}

/// Whatever keeps a virtual CPU from going on, a panic too, ends the machine: the others would wait for it.
struct Ending<'a>(&'a Power, &'a Shared);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        // The last reading: the thread takes its files with it.
        self.1.read_cpu_time();
        self.1.tid.store(0, Ordering::Relaxed);
        self.0.end(Outcome::Stopped);
        self.0.retire();
    }
}

impl Meter {
    pub(crate) fn read(&self) -> VcpuSnapshot {
        let sampled = self.0.read_cpu_time();
        VcpuSnapshot::read(&self.0.counters, self.0.kvm.as_ref().and_then(Binary::read), sampled)
    }

    /// Page faults of the guest's so far that KVM handled; 0 where it does not say.
    pub(crate) fn page_faults(&self) -> u64 {
        let values = self.0.kvm.as_ref().and_then(Binary::read);
        values.and_then(|values| values.get("pf_taken").copied()).unwrap_or(0)
    }
}

impl Shared {
    fn read_cpu_time(&self) -> sampled::CpuTime {
        match self.tid.load(Ordering::Relaxed) {
            0 => self.cpu_time.get(),
            tid => self.cpu_time.read(tid),
        }
    }
}

impl Running {
    /// Gets it out of the guest, to look at what the machine is doing.
    pub(crate) fn kick(&self) {
        self.shared.kicker.kick();
    }

    /// Waits until it has ended.
    pub(crate) fn join(&mut self) -> Result<(), Error> {
        let cpu = self.shared.index;
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(Error::Vcpu { cpu, reason: "its thread panicked".to_owned() }),
        }
    }
}

/// On the thread: who it is and where it runs.
fn begin(shared: &Shared, fd: VcpuFd, pin: Option<u32>) -> Result<Kickable<'_>, Error> {
    shared.tid.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::Relaxed);
    if let Some(cpu) = pin {
        let mut mask = CpuSet::new();
        mask.set(cpu as usize);
        if let Err(error) = sched_setaffinity(None, &mask) {
            tracing::warn!(vcpu = shared.index, cpu, %error, "cannot pin a virtual CPU; it runs anywhere");
        }
    }
    shared.kicker.register(fd)
}

fn run(shared: &Shared, mut cpu: Kickable<'_>, buses: &Buses, power: &Power) -> Result<(), Error> {
    let clock = Clock::get();
    let counters = &shared.counters;
    let mut out = clock.now();
    loop {
        cpu.answer();
        if !power.may_go_on() {
            return Ok(());
        }
        let entered = clock.now();
        counters.outside_ns.add(entered.since_ns(out));
        let exit = cpu.fd.run();
        out = clock.now();
        counters.inside_ns.add(out.since_ns(entered));
        match exit {
            Ok(VcpuExit::IoOut(port, data)) => {
                counters.port_writes.add(1);
                buses.ports.write(port.into(), data);
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                counters.port_reads.add(1);
                buses.ports.read(port.into(), data);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                counters.mmio_writes.add(1);
                buses.mmio.write(address, data);
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                counters.mmio_reads.add(1);
                buses.mmio.read(address, data);
            }
            Ok(VcpuExit::Intr) => counters.signals.add(1),
            Ok(VcpuExit::Shutdown) => {
                counters.others.add(1);
                power.end(Outcome::TripleFault);
            }
            Ok(exit) => {
                let reason = format!("it left the guest for a reason that nobody handles ({exit:?})");
                return Err(failed(shared, &cpu, reason));
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => counters.signals.add(1),
            Err(error) => {
                let reason = format!("KVM_RUN says: {error}");
                return Err(failed(shared, &cpu, reason));
            }
        }
    }
}

/// What is to be said of a virtual CPU that cannot go on, with where it was.
fn failed(shared: &Shared, cpu: &Kickable<'_>, mut reason: String) -> Error {
    if let Ok(regs) = cpu.fd.get_regs() {
        reason = format!("{reason}; rip {:#x}, rsp {:#x}, rflags {:#x}", regs.rip, regs.rsp, regs.rflags);
    }
    Error::Vcpu { cpu: shared.index, reason }
}

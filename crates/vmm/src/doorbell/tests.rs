use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use virtio::Doorbell as _;

use super::policy::EXIT_NS;
use super::*;
use crate::boot::{self, Boot, Kernel};
use crate::bus::Bus;
use crate::kvm::Vm;
use crate::memory::Ram;
use crate::power::{Outcome, Power};
use crate::vcpu::{Buses, Running, Vcpu};

#[path = "../../tests/tiny/mod.rs"]
mod tiny;

use tiny::{Program, SCRATCH};

/// Where the page is.
const PAGE: u32 = 0xC000_0000;
/// What the guest counts up before each ring, and what it waits for after.
const RUNG: u32 = SCRATCH;
const ANSWERED: u32 = SCRATCH + 4;

#[test]
fn modes_read_as_they_print() {
    for mode in [DoorbellMode::Trap, DoorbellMode::Adaptive, DoorbellMode::Map] {
        assert_eq!(mode.to_string().parse(), Ok(mode));
    }
    let error = "Map".parse::<DoorbellMode>().unwrap_err();
    assert_eq!(error.to_string(), "doorbell mode `Map` is none of `trap`, `adaptive`, `map`");
}

/// A machine whose guest rings and waits for an answer, over and over.
struct Ringer {
    power: Arc<Power>,
    vcpu: Running,
    doorbell: Doorbell,
    answered: Area,
    ram: Ram,
}

impl Ringer {
    /// None where machines cannot be run.
    fn start(mode: DoorbellMode) -> Option<Self> {
        if let Err(error) = crate::check() {
            eprintln!("skipped: {error}");
            return None;
        }
        let vm = Vm::new().unwrap();
        let mut ram = Ram::new(64 << 20, false).unwrap();
        ram.attach(&vm).unwrap();
        let program = Program::new();
        let start = program.here();
        // Queue 0's notification is 0, which is what a page that nobody wrote to would hold, too.
        let program = program.increment(RUNG).write16(PAGE, 0).wait_until_equal(RUNG, ANSWERED).jump(start);
        let kernel = Kernel::Embedded(program.elf());
        let boot = Boot { kernel: &kernel, initrd: None, command_line: "", cpus: 1 };
        let entry = boot::load(&boot, &ram).unwrap();
        let vcpu = Vcpu::new(&vm, 0, 1, entry, None).unwrap();
        let fd = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
        let doorbell = Doorbell::new(vm.fd.clone(), vm.slot().unwrap(), mode, Arc::new(|| 0), fd).unwrap();
        doorbell.place(GuestAddr(PAGE.into())).unwrap();
        let power = Arc::new(Power::new());
        let buses = Arc::new(Buses { ports: Bus::default(), mmio: Bus::default() });
        let answered = ram.memory().area(GuestAddr(ANSWERED.into()), 4, 4).unwrap();
        let vcpu = vcpu.start(buses, power.clone()).unwrap();
        Some(Self { power, vcpu, doorbell, answered, ram })
    }

    /// Lets the guest ring again.
    fn answer(&self) {
        self.answered.u32(0).fetch_add(1, Ordering::SeqCst);
    }

    /// How many rings the guest has begun.
    fn rung(&self) -> u32 {
        let area = self.ram.memory().area(GuestAddr(RUNG.into()), 4, 4).unwrap();
        area.u32(0).load(Ordering::SeqCst)
    }

    /// Sleeps until a trapped write, as an I/O thread would.
    fn sleep(&self) {
        let deadline = Timespec { tv_sec: 120, tv_nsec: 0 };
        let mut fds = [PollFd::from_borrowed_fd(self.doorbell.fd(), PollFlags::IN)];
        let ready = poll(&mut fds, Some(&deadline)).unwrap();
        assert_eq!(
            ready,
            1,
            "a kick was lost: {:?}, the guest is in ring {}",
            self.doorbell.counters(),
            self.rung()
        );
    }

    /// Rings that were noticed, in either way.
    fn noticed(&self) -> u64 {
        let DoorbellCounters { kicks, rung_while_mapped, .. } = self.doorbell.counters();
        kicks + rung_while_mapped
    }
}

impl Drop for Ringer {
    fn drop(&mut self) {
        self.power.end(Outcome::Stopped);
        self.vcpu.kick();
        self.vcpu.join().unwrap();
    }
}

/// Goes to sleep and wakes `rounds` times, with no look at anything but the doorbell. Every ring must be noticed, once.
///
/// How long the page stays mapped follows the guest: longer if it has not rung by then, shorter if it has, so that most
/// rounds end where it is about to.
fn switch(rounds: u64) -> Option<DoorbellCounters> {
    const STEP_NS: u64 = 2_000;
    const MAPPED_NS_MAX: u64 = 400_000;
    let ringer = Ringer::start(DoorbellMode::Map)?;
    let (mut mapped_ns, mut mapped, mut trapped) = (20_000, 0u64, 0u64);
    for round in 0..rounds {
        // The price is none of this test's business.
        ringer.doorbell.lock().budget = Budget::new(Clock::get().now());
        ringer.doorbell.lock().cost = Cost::default();
        ringer.doorbell.awake();
        let until = Instant::now() + Duration::from_nanos(mapped_ns);
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        if ringer.doorbell.listen() {
            mapped += 1;
            mapped_ns = u64::saturating_sub(mapped_ns, STEP_NS);
        } else if ringer.noticed() == round {
            ringer.sleep();
            ringer.doorbell.awake();
            trapped += 1;
            mapped_ns = (mapped_ns + STEP_NS).min(MAPPED_NS_MAX);
        }
        assert_eq!(ringer.noticed(), round + 1, "in round {round}");
        ringer.answer();
    }
    eprintln!("{rounds} rounds, {mapped} rung while mapped, {trapped} slept for, at last {mapped_ns} ns");
    Some(ringer.doorbell.counters())
}

#[test]
fn no_kick_is_lost_while_a_page_is_mapped_and_unmapped() {
    if let Some(counters) = switch(1_000) {
        assert!(counters.maps >= 1_000, "{counters:?}");
    }
}

#[test]
#[ignore = "minutes: the same for as long as it takes to meet rare moments"]
fn no_kick_is_lost_in_100_000_switches() {
    switch(100_000);
}

#[test]
fn a_page_that_stays_mapped_costs_no_exit() {
    let Some(ringer) = Ringer::start(DoorbellMode::Adaptive) else { return };
    // The thread is awake and looks now and then; the guest's first rings trap.
    while ringer.doorbell.counters().maps == 0 {
        let before = ringer.noticed();
        while ringer.noticed() == before {
            ringer.sleep();
            ringer.doorbell.awake();
        }
        ringer.answer();
    }
    let kicks = ringer.doorbell.counters().kicks;
    assert_eq!(kicks, Cost::default().ns().div_ceil(EXIT_NS));
    // From now on it is known by its counter only.
    for _ in 0..1_000 {
        let deadline = Instant::now() + Duration::from_secs(120);
        while ringer.rung() == ringer.answered.u32(0).load(Ordering::SeqCst) {
            assert!(Instant::now() < deadline, "the guest stands still");
        }
        ringer.doorbell.awake();
        ringer.answer();
    }
    let counters = ringer.doorbell.counters();
    assert_eq!((counters.kicks, counters.maps), (kicks, 1));
    ringer.doorbell.remove();
    assert!(!ringer.doorbell.listen(), "nothing is mapped any more");
}

#[test]
fn a_page_over_memory_is_not_mapped() {
    let Some(ringer) = Ringer::start(DoorbellMode::Map) else { return };
    ringer.doorbell.remove();
    ringer.doorbell.place(GuestAddr(0x10_0000)).unwrap();
    assert!(ringer.doorbell.place(GuestAddr(0x20_0000)).is_err(), "it is somewhere already");
    ringer.doorbell.awake();
    assert_eq!(ringer.doorbell.counters().maps, 0);
    assert!(!ringer.doorbell.listen());
}

#[test]
fn a_thread_that_sleeps_after_every_ring_maps_no_more_than_it_may() {
    let began = Instant::now();
    let Some(ringer) = Ringer::start(DoorbellMode::Map) else { return };
    let (mut maps, mut spent_ns) = (0, 0);
    for round in 0..200 {
        while ringer.noticed() == round {
            ringer.sleep();
            let cost = ringer.doorbell.lock().cost;
            ringer.doorbell.awake();
            let price_ns = cost.by(Clock::get().now()).ns();
            let mapped = ringer.doorbell.counters().maps;
            spent_ns += (mapped - std::mem::replace(&mut maps, mapped)) * price_ns;
            ringer.doorbell.listen();
        }
        ringer.answer();
    }
    let allowed_ns = began.elapsed().as_nanos() as u64 / policy::SHARE + Cost::default().ns();
    let counters = ringer.doorbell.counters();
    assert!(counters.maps > 0 && spent_ns <= allowed_ns, "{counters:?}: {spent_ns} of {allowed_ns} ns");
}

//! What the machine costs without any device: the clock, a service of ring 0, an exit to the monitor, a cache line
//! between two processors, and a request through a ring whose device end is on the other processor.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt::{self, Display, Formatter};
use core::hint::black_box;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use virtio::ring::{Buffer, Chains, DeviceRing, DriverRing, Used};
use virtio::{RingConfig, RingError, RingFormat};

use super::JobError;
use crate::histogram::Histogram;
use crate::machine::clock::Clock;
use crate::machine::console::{self, Mark, mark};
use crate::machine::patience::{PROCESSOR_SECONDS, Patience};
use crate::machine::service::{self, ticks};
use crate::machine::smp::SmpError;
use crate::machine::sync::Spin;
use crate::machine::{self, Machine, heap};
use crate::options::Options;
use crate::report::{Object, cut_short};

const ROUNDS_ALONE: u64 = 1_000;
/// The port of POST codes, which nothing depends on.
const PORT: u16 = 0x80;
const RING_SIZE: u16 = 64;
/// Parts of the job, each of which has an equal share of its time.
const PARTS: u64 = 3;

/// Runs the job, on one processor or two, and prints its result.
///
/// # Errors
/// See [`JobError`].
pub fn run(machine: &Machine, options: &Options) -> Result<(), JobError> {
    mark(Mark::Begin);
    let costs = Costs {
        clock: each(|| _ = black_box(ticks())),
        service: each(|| _ = black_box(service::cpuid(0))),
        exit: each(|| service::out8(PORT, 0)),
    };
    let mut pair = Pair::default();
    if machine.processors.count() > 1 {
        let ms = options.ms / PARTS;
        pair.line = ping_pong(machine, ms)?;
        pair.split = requests(machine, ms, RingFormat::Split)?;
        pair.packed = requests(machine, ms, RingFormat::Packed)?;
    }
    mark(Mark::End);
    console::print(&Report { options, clock: machine.clock, costs, pair: &pair });
    Ok(())
}

/// Ticks of one call, without what taking the time costs.
fn each(mut call: impl FnMut()) -> f64 {
    let start = ticks();
    (0..ROUNDS_ALONE).for_each(|_| call());
    (ticks() - start) as f64 / ROUNDS_ALONE as f64
}

/// Round trips of a word between two processors.
fn ping_pong(machine: &Machine, ms: u64) -> Result<Histogram, JobError> {
    let line = machine.memory.area(heap::take(64, 64), 64, 64)?;
    let trips = Spin::new(Histogram::default());
    machine.processors.run(2, &|processor| {
        let mut patience = patience(machine, ms);
        if processor == 1 {
            return echo(line.u64(0), &mut patience);
        }
        let (word, mut trips) = (line.u64(0), trips.lock());
        let end = machine.clock.deadline_ms(ms);
        let mut ball = 0;
        let mut now = ticks();
        while now < end && !service::asked_to_end() {
            ball += 2;
            word.store(ball, Ordering::Release);
            meet(patience.spin_until(|| word.load(Ordering::Acquire) == ball + 1));
            let before = core::mem::replace(&mut now, ticks());
            trips.record(now - before);
        }
        word.store(u64::MAX, Ordering::Release);
    })?;
    Ok(trips.into_inner())
}

/// Answers even numbers with the next one, until the last.
fn echo(word: &AtomicU64, patience: &mut Patience) {
    let answered_last = || match word.load(Ordering::Acquire) {
        u64::MAX => true,
        ball if ball % 2 == 0 && ball > 0 => {
            word.store(ball + 1, Ordering::Release);
            false
        }
        _ => false,
    };
    meet(patience.spin_until(answered_last));
}

/// How long two processors wait for each other in a part of so many milliseconds.
fn patience(machine: &Machine, ms: u64) -> Patience {
    Patience::of_ms(machine.clock, ms + PROCESSOR_SECONDS * 1000)
}

/// Ends the machine if the other processor did not come.
fn meet(came: bool) {
    if !came {
        machine::fail(&SmpError::Away(PROCESSOR_SECONDS));
    }
}

/// Round trips of a request of one descriptor through a ring between two processors.
fn requests(machine: &Machine, ms: u64, format: RingFormat) -> Result<Histogram, JobError> {
    let memory = Arc::new(machine.memory.clone());
    let [desc, driver, device] = DriverRing::layout(format, RING_SIZE).map(|bytes| heap::take(bytes, 4096));
    let (event_idx, indirect, in_order) = (true, false, false);
    let config = RingConfig { format, size: RING_SIZE, desc, driver, device, event_idx, indirect, in_order };
    let front = Spin::new((DriverRing::new(&config, &memory)?, Histogram::default(), Ok(())));
    let back = Spin::new((DeviceRing::new(&config, &memory, None)?, Chains::new(&config, memory), Ok(())));
    let over = AtomicBool::new(false);
    machine.processors.run(2, &|processor| {
        let mut patience = patience(machine, ms);
        if processor == 1 {
            let (ring, chains, outcome) = &mut *back.lock();
            *outcome = serve(ring, chains, &over, &mut patience);
        } else {
            let (ring, trips, outcome) = &mut *front.lock();
            *outcome = drive(ring, trips, &over, machine.clock.deadline_ms(ms), &mut patience);
        }
        over.store(true, Ordering::Release);
    })?;
    let (_, trips, outcome) = front.into_inner();
    outcome.and(back.into_inner().2)?;
    Ok(trips)
}

fn drive(
    ring: &mut DriverRing,
    trips: &mut Histogram,
    over: &AtomicBool,
    end: u64,
    patience: &mut Patience,
) -> Result<(), RingError> {
    let buffer = Buffer { addr: heap::take(64, 64), len: 64, writable: true };
    ring.disarm_calls();
    let mut now = ticks();
    while now < end && !service::asked_to_end() {
        ring.add(&[buffer]);
        ring.publish();
        ring.needs_kick();
        let mut done = ring.reap();
        meet(patience.spin_until(|| {
            let wait = matches!(done, Ok(None)) && !over.load(Ordering::Relaxed);
            if wait {
                done = ring.reap();
            }
            !wait
        }));
        if done?.is_none() {
            return Ok(());
        }
        let before = core::mem::replace(&mut now, ticks());
        trips.record(now - before);
    }
    Ok(())
}

fn serve(
    ring: &mut DeviceRing,
    chains: &mut Chains,
    over: &AtomicBool,
    patience: &mut Patience,
) -> Result<(), RingError> {
    let mut taken = Vec::with_capacity(1);
    ring.disarm();
    loop {
        let mut popped = Ok(());
        meet(patience.spin_until(|| {
            popped = ring.pop(1, chains, &mut taken);
            popped.is_err() || !taken.is_empty() || over.load(Ordering::Relaxed)
        }));
        popped?;
        if taken.is_empty() {
            return Ok(());
        }
        ring.push_used(chains, taken.drain(..).map(|token| Used { token, written: 64 }));
        ring.publish();
        ring.needs_call();
    }
}

/// Ticks of what one processor does alone.
struct Costs {
    clock: f64,
    service: f64,
    exit: f64,
}

/// Round trips between two; empty where there is one.
#[derive(Default)]
struct Pair {
    line: Histogram,
    split: Histogram,
    packed: Histogram,
}

struct Report<'a> {
    options: &'a Options,
    clock: Clock,
    costs: Costs,
    pair: &'a Pair,
}

impl Display for Report<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut object = Object::new(f, "result")?;
        object.text("job", "ring")?.text("id", &self.options.id)?.number("clock_hz", self.clock.hz())?;
        object.decimal("clock_us", self.clock.us(self.costs.clock))?;
        object.decimal("service_us", self.clock.us(self.costs.service))?;
        object.decimal("exit_us", self.clock.us(self.costs.exit))?;
        let Pair { line, split, packed } = self.pair;
        for (names, trips) in [(LINE, line), (SPLIT, split), (PACKED, packed)] {
            object.number(names[0], trips.total())?;
            object.decimal(names[1], self.clock.us(trips.quantile(500)))?;
            object.decimal(names[2], self.clock.us(trips.quantile(990)))?;
        }
        cut_short(&mut object)?;
        object.end()
    }
}

const LINE: [&str; 3] = ["line_rounds", "line_p50_us", "line_p99_us"];
const SPLIT: [&str; 3] = ["split_rounds", "split_p50_us", "split_p99_us"];
const PACKED: [&str; 3] = ["packed_rounds", "packed_p50_us", "packed_p99_us"];

//! Round trips of single requests: from the kick to the interrupt that says it is done, on a processor that sleeps
//! meanwhile and on one that runs.

use core::fmt::{self, Display, Formatter};

use super::{JobError, blk};
use crate::disk::{DiskError, DiskQueue, Operation};
use crate::histogram::Histogram;
use crate::machine::clock::Clock;
use crate::machine::console::{self, Mark, mark};
use crate::machine::interrupts::Listening;
use crate::machine::patience::Patience;
use crate::machine::service::{self, ticks};
use crate::machine::{Machine, MachineError};
use crate::options::{Options, SECTOR_BYTES};
use crate::pattern::Random;
use crate::pci::Function;
use crate::report::{Object, cut_short};

/// Rounds of a kind before they are counted.
const WARM_UP: u64 = 16;

/// Runs the job and prints its result.
///
/// # Errors
/// See [`JobError`].
pub fn run(machine: &Machine, disks: &[Function], options: &Options) -> Result<(), JobError> {
    let of_disk = |source| JobError::Disk { disk: options.disk, source };
    let disk = blk::open(machine, disks, options.disk)?;
    let asked = Options { interrupts: true, jobs: 1, depth: 1, ..options.clone() };
    let mut queues = disk.open(machine, &asked).map_err(of_disk)?;
    let queue = queues.first_mut().ok_or(JobError::NoOutcome(0))?;
    let _listening = Listening::start().map_err(MachineError::from)?;

    let (random, blocks) = (Random::new(options.seed), disk.blocks(options.block_bytes));
    let mut trips = Trips { queue, random, blocks, clock: machine.clock };
    mark(Mark::Begin);
    let asleep = trips.run(machine.clock.deadline_ms(options.ms / 2), true).map_err(of_disk)?;
    let awake = trips.run(machine.clock.deadline_ms(options.ms / 2), false).map_err(of_disk)?;
    mark(Mark::End);
    let lost = trips.queue.lost_interrupts();
    disk.close().map_err(of_disk)?;
    console::print(&Report { options, clock: machine.clock, asleep: &asleep, awake: &awake, lost });
    Ok(())
}

/// What was measured of one kind of wait.
#[derive(Default)]
struct Times {
    /// The instruction that kicks.
    kick: Histogram,
    /// From before the kick until the interrupt was seen.
    trip: Histogram,
    returned: u64,
    failed: u64,
}

struct Trips<'a> {
    queue: &'a mut DiskQueue,
    random: Random,
    blocks: u64,
    clock: Clock,
}

impl Trips<'_> {
    fn run(&mut self, end: u64, sleep: bool) -> Result<Times, DiskError> {
        let mut times = Times::default();
        let sectors = u64::from(self.queue.block_bytes() / SECTOR_BYTES);
        let mut round = 0;
        while !service::asked_to_end() && (ticks() < end || round <= WARM_UP) {
            self.queue.arm_calls();
            let seen = self.queue.interrupt().map_or(0, |interrupt| interrupt.count());
            let sector = self.random.below(self.blocks) * sectors;
            self.queue.add(0, Operation::Read, sector);
            let before = ticks();
            self.queue.publish();
            let kicked = ticks();
            let announced = if sleep { self.sleep(seen)? } else { self.spin(seen)? };
            let done = ticks();
            let fine = self.reap()?;
            round += 1;
            times.returned += 1;
            times.failed += u64::from(!fine);
            if round > WARM_UP && announced && fine {
                times.kick.record(kicked - before);
                times.trip.record(done - before);
            }
        }
        Ok(times)
    }

    /// Waits for the interrupt; false if it was lost.
    fn sleep(&mut self, seen: u64) -> Result<bool, DiskError> {
        let (mut patience, lost) = (Patience::with_device(self.clock), self.queue.lost_interrupts());
        while !self.queue.wait(seen)? {
            if self.queue.lost_interrupts() != lost {
                return Ok(false);
            }
            if patience.is_over(ticks()) {
                return Err(self.queue.stuck(1));
            }
        }
        Ok(true)
    }

    /// The same without sleep.
    fn spin(&mut self, seen: u64) -> Result<bool, DiskError> {
        let come = || self.queue.interrupt().is_none_or(|interrupt| interrupt.count() != seen);
        if Patience::with_device(self.clock).spin_until(come) { Ok(true) } else { self.sleep(seen) }
    }

    /// The request that came back, which an interrupt may have announced too early.
    fn reap(&mut self) -> Result<bool, DiskError> {
        let mut done = self.queue.reap();
        let mut patience = Patience::with_device(self.clock);
        patience.spin_until(|| {
            if matches!(done, Ok(None)) {
                done = self.queue.reap();
            }
            !matches!(done, Ok(None))
        });
        done?.map(|(_, fine)| fine).ok_or_else(|| self.queue.stuck(1))
    }
}

const ASLEEP: [&str; 4] = ["asleep_rounds", "asleep_p50_us", "asleep_p99_us", "asleep_kick_p50_us"];
const AWAKE: [&str; 4] = ["awake_rounds", "awake_p50_us", "awake_p99_us", "awake_kick_p50_us"];

struct Report<'a> {
    options: &'a Options,
    clock: Clock,
    asleep: &'a Times,
    awake: &'a Times,
    lost: u64,
}

impl Display for Report<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let us = |times: &Histogram, permille| self.clock.us(times.quantile(permille));
        let mut object = Object::new(f, "result")?;
        object.text("job", "events")?.text("id", &self.options.id)?.number("disk", self.options.disk)?;
        for (names, times) in [(ASLEEP, self.asleep), (AWAKE, self.awake)] {
            object.number(names[0], times.trip.total())?;
            object.decimal(names[1], us(&times.trip, 500))?.decimal(names[2], us(&times.trip, 990))?;
            object.decimal(names[3], us(&times.kick, 500))?;
        }
        object.number("lost_interrupts", self.lost)?;
        object.number("returned", self.asleep.returned + self.awake.returned)?;
        object.number("errors", self.asleep.failed + self.awake.failed)?;
        cut_short(&mut object)?;
        object.end()
    }
}

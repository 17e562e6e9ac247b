//! A device that dies between any two of its stores, and a driver that goes on: no request is lost, none is executed after
//! its completion was to be seen, and each keeps its own buffers.
//!
//! The device runs up to the crash point. The driver, which notices nothing, reads what has come back and offers more, as
//! far as the ring allows. Then a second device finds the ring and the record, dies in turn, or serves all there is.

#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio::fake::{FakeDriver, FakeOptions, MEMORY_START};
use virtio::memory::{Area, Mapping, crash_at, gather};
use virtio::ring::{Buffer, RingFormat, Token, Used};
use virtio::{GuestAddr, Inflight, Memory, Queue, Region};

const MEMORY_BYTES: usize = 32 << 10;
const RECORD_BYTES: usize = 1024;

/// How a request lies in the ring: its buffers, and whether they are in a table of their own.
#[derive(Clone, Copy, Debug)]
struct Shape(usize, bool);

impl Shape {
    fn descriptors(self) -> usize {
        if self.1 { 1 } else { self.0 }
    }
}

/// What the driver does while no device runs.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Meanwhile {
    /// It sleeps.
    Nothing,
    /// It takes what came back.
    Reap,
    /// It takes what came back and offers requests as long as there is room.
    GoOn,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    /// The device opens ring and record.
    Start,
    Pop(usize),
    /// The device completes the request it has held for the longest but so many.
    Complete(usize),
    Publish,
    /// The driver offers a request.
    Offer(Shape),
    /// The driver takes what came back, and offers requests as long as there is room.
    GoOn,
}

#[derive(Debug)]
struct Scenario {
    format: RingFormat,
    size: u16,
    /// Requests that came and went before, so that the ring stands elsewhere.
    before: usize,
    steps: Vec<Step>,
}

struct Request {
    number: u64,
    buffers: Vec<Buffer>,
    executed: bool,
}

/// The memory that outlives devices, to be used for one run after the other.
struct Ground {
    memory: Memory,
    record: Arc<Mapping>,
}

impl Ground {
    fn new() -> Self {
        let (guest, _file) = Mapping::anonymous("guest", MEMORY_BYTES as u64).unwrap();
        let region = Region::new(GuestAddr(MEMORY_START), Arc::new(guest)).unwrap();
        let (record, _file) = Mapping::anonymous("inflight", RECORD_BYTES as u64).unwrap();
        Self { memory: Memory::new(vec![region]).unwrap(), record: Arc::new(record) }
    }
}

/// A driver and what it expects.
struct World {
    fake: FakeDriver,
    record: Arc<Mapping>,
    format: RingFormat,
    size: u16,
    /// By the driver's id.
    outstanding: HashMap<u16, Request>,
    offered: u64,
}

struct Service {
    queue: Queue,
    held: Vec<Token>,
}

impl World {
    fn new(ground: &Ground, scenario: &Scenario) -> Self {
        let Scenario { format, size, .. } = *scenario;
        let options =
            FakeOptions { format, size, memory_bytes: MEMORY_BYTES as u64, ..FakeOptions::default() };
        let fake = FakeDriver::in_memory(options, ground.memory.clone());
        fake.write(GuestAddr(MEMORY_START), &[0; MEMORY_BYTES]);
        let record = Area::new(ground.record.clone(), 0, RECORD_BYTES, 8).unwrap();
        (0..RECORD_BYTES).step_by(8).for_each(|at| record.u64(at).store(0, Ordering::Relaxed));
        Self { fake, record: ground.record.clone(), format, size, outstanding: HashMap::new(), offered: 0 }
    }

    fn service(&self) -> Service {
        let mut config = self.fake.queue_config();
        config.inflight = Some(Inflight::new(self.format, self.record.clone(), 0, self.size).unwrap());
        Service { queue: Queue::new(config).unwrap().0, held: Vec::new() }
    }

    /// Offers a request whose first buffer names it.
    fn offer(&mut self, Shape(count, indirect): Shape) {
        self.offered += 1;
        let number = self.offered;
        let mut buffers = vec![self.fake.readable(&number.to_le_bytes())];
        buffers.extend((1..count).map(|i| self.fake.writable(i + number as usize % 5)));
        let id = self.fake.offer(&buffers, indirect);
        let request = Request { number, buffers, executed: false };
        assert!(self.outstanding.insert(id, request).is_none(), "the driver's ids are its own");
    }

    fn reap(&mut self) {
        while let Some(done) = self.fake.ring.reap().expect("what comes back is in flight") {
            let request = self.outstanding.remove(&done.id).expect("what comes back is in flight");
            assert!(request.executed, "request {} came back and was never executed", request.number);
            assert_eq!(u64::from(done.written), request.number, "another's answer");
        }
    }

    fn go_on(&mut self) {
        self.reap();
        for shape in [Shape(2, false), Shape(1, false), Shape(3, true)].into_iter().cycle() {
            match self.fake.ring.free() {
                0 => break,
                free if free >= shape.descriptors() => self.offer(shape),
                _ => self.offer(Shape(1, false)),
            }
        }
    }

    fn meanwhile(&mut self, what: Meanwhile) {
        match what {
            Meanwhile::Nothing => {}
            Meanwhile::Reap => self.reap(),
            Meanwhile::GoOn => self.go_on(),
        }
    }

    /// What the device got is a request that the driver waits for, with that request's buffers.
    fn execute(&mut self, service: &Service, tokens: Range<usize>) {
        for token in &service.held[tokens] {
            let chain = service.queue.chain(token);
            let number = number(service, token);
            let id = service.queue.chains().id(token);
            let request = self
                .outstanding
                .values_mut()
                .find(|request| request.number == number)
                .unwrap_or_else(|| panic!("request {number} is executed after it was completed"));
            let base = self.fake.memory().regions()[0].backing().base().as_ptr().addr();
            let expected =
                request.buffers.iter().map(|b| ((b.addr.0 - MEMORY_START) as usize, b.len as usize));
            let found = chain.readable.iter().chain(chain.writable);
            let found = found.map(|segment| (segment.as_ptr().addr() - base, segment.len()));
            assert!(expected.eq(found), "request {number} (id {id}) has other buffers");
            request.executed = true;
        }
    }

    fn step(&mut self, service: &mut Option<Service>, step: Step) {
        match (step, service) {
            (Step::Offer(shape), _) => self.offer(shape),
            (Step::GoOn, _) => self.go_on(),
            (Step::Start, service) => *service = Some(self.service()),
            (Step::Pop(max), Some(service)) => {
                let before = service.held.len();
                service.queue.pop(max, &mut service.held);
                self.execute(service, before..service.held.len());
            }
            (Step::Complete(at), Some(Service { held, .. })) if held.is_empty() || at >= held.len() => {}
            (Step::Complete(at), Some(service)) => {
                let written = number(service, &service.held[at]) as u32;
                let token = service.held.remove(at);
                service.queue.complete(std::iter::once(Used { token, written }));
            }
            (Step::Publish, Some(service)) => service.queue.publish(),
            (_, None) => unreachable!("a device starts before it does anything"),
        }
    }

    /// Runs steps until one meets the crash point; true if one did.
    fn run(&mut self, service: &mut Option<Service>, steps: &[Step], mut words: u32) -> bool {
        for &step in steps {
            if matches!(step, Step::Offer(_) | Step::GoOn) {
                self.step(service, step);
            } else {
                match crash_at(words, || self.step(service, step)) {
                    Some(touched) => words -= touched,
                    None => return true,
                }
            }
        }
        false
    }

    /// A device serves all there is, and more that comes, out of order.
    fn finish(&mut self) {
        let mut service = self.service();
        for round in 0..3 * self.size + 8 {
            let before = service.held.len();
            service.queue.pop(1 + usize::from(round) % 3, &mut service.held);
            self.execute(&service, before..service.held.len());
            let (at, count) = (usize::from(round) % 2, service.held.len());
            if count > 1 || before == count {
                self.step_some(&mut service, at);
            }
            self.reap();
            if round < self.size {
                self.go_on();
            }
            assert!(!service.queue.is_broken());
        }
        while !service.held.is_empty() || self.offered_more(&mut service) {
            self.step_some(&mut service, 0);
        }
        self.reap();
        let lost: Vec<u64> = self.outstanding.values().map(|request| request.number).collect();
        assert!(lost.is_empty(), "requests {lost:?} are lost");
    }

    fn step_some(&mut self, service: &mut Service, at: usize) {
        if service.held.is_empty() {
            return;
        }
        let at = at.min(service.held.len() - 1);
        let written = number(service, &service.held[at]) as u32;
        let token = service.held.remove(at);
        service.queue.complete(std::iter::once(Used { token, written }));
        service.queue.publish();
    }

    fn offered_more(&mut self, service: &mut Service) -> bool {
        service.queue.pop(4, &mut service.held);
        self.execute(service, 0..service.held.len());
        !service.held.is_empty()
    }
}

fn number(service: &Service, token: &Token) -> u64 {
    let mut number = [0; 8];
    assert_eq!(gather(service.queue.chain(token).readable, 0, &mut number), 8);
    u64::from_le_bytes(number)
}

/// Plays `scenario` with a crash before word `first`, and another before word `second` of what the next device does to
/// begin with. Tells which of them came to pass.
fn play(
    ground: &Ground,
    scenario: &Scenario,
    meanwhile: Meanwhile,
    first: u32,
    second: Option<u32>,
) -> [bool; 2] {
    let mut world = World::new(ground, scenario);
    let mut service = None;
    if scenario.before > 0 {
        world.run(&mut service, &[Step::Start], u32::MAX);
        for _ in 0..scenario.before {
            let steps =
                [Step::Offer(Shape(1, false)), Step::Pop(1), Step::Complete(0), Step::Publish, Step::GoOn];
            world.run(&mut service, &steps[..4], u32::MAX);
            world.reap();
        }
    }
    let skip = usize::from(scenario.before > 0);
    let crashed = world.run(&mut service, &scenario.steps[skip..], first);
    drop(service);
    world.meanwhile(meanwhile);
    let mut crashed_again = false;
    if let Some(second) = second {
        let mut service = None;
        let steps = [Step::Start, Step::Pop(2), Step::Complete(1), Step::Publish];
        crashed_again = world.run(&mut service, &steps, second);
        drop(service);
        world.meanwhile(meanwhile);
    }
    world.finish();
    [crashed, crashed_again]
}

/// All ways to fill a ring of `size` that are looked at.
fn shapes(size: u16) -> Vec<Vec<Shape>> {
    let all = [
        vec![Shape(1, false); size.into()],
        vec![Shape(2, false), Shape(1, false)],
        vec![Shape(1, false), Shape(2, false), Shape(1, false)],
        vec![Shape(2, true), Shape(3, true)],
        vec![Shape(3, false), Shape(2, true), Shape(3, false)],
        vec![Shape(2, false), Shape(2, false)],
    ];
    let fits = |shapes: &Vec<Shape>| shapes.iter().map(|s| s.descriptors()).sum::<usize>() <= size.into();
    all.into_iter().filter(fits).collect()
}

/// Requests are taken, some completed in one batch, the rest in another, in several orders; between the two the driver
/// goes on and the device takes more.
fn scenarios(format: RingFormat, sizes: &[u16]) -> Vec<Scenario> {
    let mut all = Vec::new();
    for &size in sizes {
        for shapes in shapes(size) {
            for (order, batch, between) in (0..3usize).flat_map(|order| {
                [(1, true), (shapes.len(), false), (shapes.len() - 1, false)].map(|(b, g)| (order, b, g))
            }) {
                let complete = |left: usize| match order {
                    0 => Step::Complete(0),
                    1 => Step::Complete(left - 1),
                    _ => Step::Complete(left / 2),
                };
                let mut steps = vec![Step::Start];
                steps.extend(shapes.iter().map(|&shape| Step::Offer(shape)));
                steps.push(Step::Pop(shapes.len()));
                steps.extend((shapes.len() - batch + 1..=shapes.len()).rev().map(complete));
                steps.push(Step::Publish);
                if between {
                    steps.extend([Step::GoOn, Step::Pop(8)]);
                }
                steps.extend((1..=shapes.len() - batch).rev().map(complete));
                steps.extend([Step::Publish, Step::Pop(8)]);
                for before in 0..=usize::from(size) {
                    all.push(Scenario { format, size, before, steps: steps.clone() });
                }
            }
        }
    }
    all
}

fn walk(scenarios: &[Scenario], meanwhile: &[Meanwhile]) {
    let ground = Ground::new();
    for scenario in scenarios {
        for &meanwhile in meanwhile {
            let mut words = 0;
            while named(scenario, meanwhile, words, None, || play(&ground, scenario, meanwhile, words, None))
                [0]
            {
                words += 1;
            }
            assert!(words > 10, "a scenario without crash points shows nothing");
        }
    }
}

/// Says which run it was that failed.
fn named<T>(
    scenario: &Scenario,
    meanwhile: Meanwhile,
    words: u32,
    second: Option<u32>,
    run: impl FnOnce() -> T,
) -> T {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        eprintln!("{scenario:?}, {meanwhile:?}, killed before word {words}, then {second:?}");
        std::panic::resume_unwind(panic)
    })
}

const ALL: [Meanwhile; 3] = [Meanwhile::Nothing, Meanwhile::Reap, Meanwhile::GoOn];

#[test]
fn a_split_ring_survives_a_crash_between_any_two_stores() {
    walk(&scenarios(RingFormat::Split, &[2, 4, 8]), &ALL);
}

#[test]
fn a_packed_ring_survives_a_crash_between_any_two_stores() {
    walk(&scenarios(RingFormat::Packed, &[1, 2, 3, 4, 7]), &ALL);
}

#[test]
fn a_crash_in_the_recovery_from_a_crash_changes_nothing() {
    let ground = Ground::new();
    for format in [RingFormat::Split, RingFormat::Packed] {
        let every_so_many = scenarios(format, &[4]).into_iter().step_by(7);
        for scenario in every_so_many {
            for meanwhile in [Meanwhile::Reap, Meanwhile::GoOn] {
                let mut first = 0;
                loop {
                    let mut second = 0;
                    let crashed = loop {
                        let [crashed, again] = named(&scenario, meanwhile, first, Some(second), || {
                            play(&ground, &scenario, meanwhile, first, Some(second))
                        });
                        if !again {
                            break crashed;
                        }
                        second += 1;
                    };
                    if !crashed {
                        break;
                    }
                    first += 1;
                }
            }
        }
    }
}

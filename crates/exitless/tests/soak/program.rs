//! The same against the program, by a driver that shares no code with it.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use reactor::{Machine, Mode};
use rustix::event::{PollFd, PollFlags, poll};
use virtio::RingFormat;
use virtio_driver::{VhostUser, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags};

use crate::client::{Random, pause};
use crate::hogs::{Hogs, Noise, pin};
use crate::process::{Scratch, Service, output, text};
use crate::state::threads;
use crate::watchdog::watch;
use crate::{DEPTHS, FORMATS, MODES, cpus, is_full};

const ROUNDS: usize = 2;
const ROUNDS_FULL: usize = 40;
const RUN: Duration = Duration::from_millis(4);
const RING_SIZE: u16 = 128;

#[derive(Clone, Copy, Debug)]
struct Case {
    format: RingFormat,
    depth: u16,
    sleeps: bool,
    event_idx: bool,
    client_cpu: u32,
    seed: u64,
}

/// Flushes sent, flushes done, sleeps begun, sleeps ended.
type Progress = Arc<[AtomicU64; 4]>;

/// One connection, from the first message to the last flush.
fn drive(case: &Case, socket: &str, progress: &Progress) {
    pin(case.client_cpu);
    let mut features = VirtioFeatureFlags::VERSION_1;
    features.set(VirtioFeatureFlags::RING_PACKED, case.format == RingFormat::Packed);
    features.set(VirtioFeatureFlags::RING_EVENT_IDX, case.event_idx);
    let mut transport: Box<VirtioBlkTransport> = Box::new(VhostUser::new(socket, features.bits()).unwrap());
    let mut queues = VirtioBlkQueue::<()>::setup_queues(&mut *transport, 1, RING_SIZE).unwrap();
    let (queue, kick, call) =
        (&mut queues[0], transport.get_submission_notifier(0), transport.get_completion_fd(0));
    let count = |index: usize| progress[index].fetch_add(1, Ordering::Relaxed);
    let mut random = Random(case.seed | 1);
    let submit = |queue: &mut VirtioBlkQueue<'_, ()>| {
        queue.flush(()).unwrap();
        count(0);
        // For a split ring without event index the driver leaves this out: it could read the flags of before its own
        // store is seen, and neither side would know of the other.
        fence(Ordering::SeqCst);
        if queue.avail_notif_needed() {
            kick.notify().unwrap();
        }
    };
    queue.set_used_notif_enabled(case.sleeps);
    let over = Instant::now() + RUN;
    (0..case.depth).for_each(|_| submit(queue));
    let mut in_flight = case.depth;
    while in_flight > 0 {
        if let Some(completion) = queue.completions().next() {
            assert_eq!(completion.ret, 0);
            count(1);
            if Instant::now() >= over {
                in_flight -= 1;
            } else {
                if random.chance() {
                    pause(&mut random);
                }
                submit(queue);
            }
        } else if case.sleeps {
            // Asking for a call comes before the last look.
            fence(Ordering::SeqCst);
            if !queue.completions().has_next() {
                count(2);
                poll(&mut [PollFd::from_borrowed_fd(call.as_fd(), PollFlags::IN)], None).unwrap();
                call.read().unwrap();
                count(3);
            }
        } else {
            std::hint::spin_loop();
        }
    }
}

/// The program at work.
struct Served {
    mode: Mode,
    service: Service,
    socket: String,
    control: String,
}

impl Served {
    fn start(mode: Mode, cpu: u32, scratch: &Scratch) -> Self {
        let [socket, control] = ["disk", "control"].map(|name| scratch.path(name));
        let (poll, cpus) = (mode.to_string(), cpu.to_string());
        let options = ["--poll", &poll, "--cpus", &cpus, "--control", &control];
        Self { mode, service: Service::ready(&socket, &options), socket, control }
    }

    fn describe(&self, progress: &Progress) -> String {
        let stats = output(&["ctl", "--control", &self.control, "stats", "--json"]).stdout;
        let process = self.service.child.id().to_string();
        format!("{progress:?}\n{}\n{}{}", text(&stats), threads(&process), threads("self"))
    }

    /// One connection. Panics as [`crate::run::run`] does.
    fn run(&self, case: Case) {
        let progress = Progress::default();
        let (sender, ended) = channel::<()>();
        let thread = {
            let (progress, socket) = (progress.clone(), self.socket.clone());
            thread::spawn(move || {
                let _ended = sender;
                drive(&case, &socket, &progress);
            })
        };
        let what = format!("{}, {case:?}", self.mode);
        let process = self.service.child.id().to_string();
        watch(&ended, &["self", &process], &what, || self.describe(&progress));
        thread.join().unwrap_or_else(|_| panic!("{what} failed: {}", self.describe(&progress)));
    }
}

/// All combinations, with the rest left to chance.
fn round(random: &mut Random, cpus: [u32; 2]) -> Vec<Case> {
    let mut cases = Vec::new();
    for format in FORMATS {
        for depth in DEPTHS {
            for sleeps in [false, true] {
                let (event_idx, seed) = (random.chance(), random.next());
                let client_cpu = cpus[usize::from(random.chance())];
                cases.push(Case { format, depth, sleeps, event_idx, client_cpu, seed });
            }
        }
    }
    cases
}

#[test]
fn every_short_connection_to_the_program_ends() {
    let cpus = cpus(&Machine::read());
    let scratch = Scratch::new();
    let rounds = if is_full() { ROUNDS_FULL } else { ROUNDS };
    let mut random = Random(1);
    for mode in MODES {
        let served = Served::start(mode, cpus[0], &scratch);
        for index in 0..rounds {
            let _hogs = Hogs::start([Noise::None, Noise::Bursts][index % 2], &cpus);
            round(&mut random, cpus).into_iter().for_each(|case| served.run(case));
        }
    }
}

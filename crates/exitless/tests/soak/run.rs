//! One short run: a disk that keeps nothing, its I/O thread, and one or two clients.

use std::fmt::Write;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, RwLock};
use std::thread;

use blk::Blk;
use blk::backends::null::Null;
use reactor::placement::Wish;
use reactor::{Machine, Mode, Pool};
use virtio::QueueSet;

use crate::client::{Client, Progress, Shape};
use crate::hogs::pin;
use crate::state::{Watched, threads};
use crate::watchdog::watch;

const DISK_BYTES: u64 = 1 << 20;

/// What differs between runs.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) seed: u64,
    pub(crate) mode: Mode,
    /// One client for each: one queue each, on the same I/O thread.
    pub(crate) shapes: Vec<Shape>,
    pub(crate) io_cpu: u32,
    pub(crate) client_cpu: u32,
}

struct Run {
    pool: Arc<Pool>,
    queues: RwLock<QueueSet>,
    watched: Vec<Watched>,
    /// What it is at.
    step: Mutex<&'static str>,
}

impl Run {
    fn new(case: &Case, machine: &Machine) -> (Self, Vec<Client>) {
        let wish = Wish { cpus: Some(case.io_cpu.to_string().parse().unwrap()), ..Wish::default() };
        let options = reactor::Options { wish, polls: false, ..reactor::Options::default() };
        let pool = Arc::new(Pool::start_on(machine, options).unwrap());
        let options = blk::Options { queues: case.shapes.len() as u16, ..blk::Options::default() };
        let disk = Arc::new(Blk::new(Arc::new(Null::new(DISK_BYTES)), options).unwrap());
        let queues = RwLock::new(QueueSet::new(disk, pool.clone(), case.mode, "soak"));
        let make = |(index, shape): (u64, &Shape)| {
            let progress = Arc::new(Progress::default());
            let client = Client::new(*shape, progress.clone(), case.seed.wrapping_add(index << 32));
            (Watched::new(&client, progress), client)
        };
        let (watched, clients) = (0..).zip(&case.shapes).map(make).unzip();
        (Self { pool, queues, watched, step: Mutex::new("starting") }, clients)
    }

    fn at(&self, step: &'static str) {
        *self.step.lock().unwrap() = step;
    }

    fn drive(&self, clients: Vec<Client>, cpu: u32) {
        for (index, client) in (0..).zip(&clients) {
            self.queues.write().unwrap().start(client.queue_config(index)).unwrap();
        }
        self.at("in flight");
        thread::scope(|scope| {
            for (index, mut client) in (0..).zip(clients) {
                let drive = move || {
                    pin(cpu);
                    client.drive(|| self.queues.read().unwrap().wake(index));
                };
                thread::Builder::new().name(format!("client-{index}")).spawn_scoped(scope, drive).unwrap();
            }
        });
        self.at("stopping queues");
        self.queues.write().unwrap().stop_all();
        self.at("stopping the I/O thread");
        self.pool.stop().unwrap();
    }

    fn describe(&self) -> String {
        let mut text = format!("{}\n", self.step.lock().unwrap());
        for (index, watched) in (0..).zip(&self.watched) {
            let _ = write!(text, "client {index}: {}", watched.describe());
            // Whoever starts or stops a queue holds the lock.
            let counters = self.queues.try_read().map(|queues| (queues.mode(index), queues.counters(index)));
            let _ = writeln!(text, "  queue: {:?}", counters.ok());
        }
        let _ = writeln!(text, "I/O thread: {:#?}", self.pool.report());
        text + &threads("self")
    }
}

/// One run from start to end.
///
/// # Panics
/// It stalls, or an answer is wrong. The message says how things stand.
pub(crate) fn run(case: &Case, machine: &Machine) {
    let (run, clients) = Run::new(case, machine);
    let run = Arc::new(run);
    let (sender, ended) = channel::<()>();
    let thread = {
        let (run, cpu) = (run.clone(), case.client_cpu);
        thread::spawn(move || {
            let _ended = sender;
            run.drive(clients, cpu);
        })
    };
    watch(&ended, &["self"], &format!("{case:?}"), || run.describe());
    thread.join().unwrap_or_else(|_| panic!("{case:?} failed: {}", run.describe()));
}

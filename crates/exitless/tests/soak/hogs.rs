//! Threads that want all of a CPU, beside those that have work to do there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::thread::{CpuSet, sched_setaffinity};

use crate::client::{Random, pause};

const SLEEP_NS_MAX: u64 = 200_000;

/// Binds the calling thread to a CPU.
pub(crate) fn pin(cpu: u32) {
    let mut set = CpuSet::new();
    set.set(cpu as usize);
    sched_setaffinity(None, &set).unwrap();
}

/// What else runs on the CPUs.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Noise {
    /// Nothing that the test starts.
    None,
    /// A thread on each that comes and goes, and takes the CPU when it comes.
    Bursts,
    /// A thread on each that never goes.
    Steady,
}

/// Threads that make noise until this is dropped.
pub(crate) struct Hogs {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Hogs {
    pub(crate) fn start(noise: Noise, cpus: &[u32]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let hogged = if matches!(noise, Noise::None) { &[] } else { cpus };
        let start = |&cpu: &u32| {
            let stop = stop.clone();
            let hog = move || {
                pin(cpu);
                let mut random = Random(u64::from(cpu) + 1);
                while !stop.load(Ordering::Relaxed) {
                    pause(&mut random);
                    if matches!(noise, Noise::Bursts) && random.chance() {
                        thread::sleep(Duration::from_nanos(random.next() % SLEEP_NS_MAX));
                    }
                }
            };
            thread::Builder::new().name("hog".to_owned()).spawn(hog).unwrap()
        };
        let threads = hogged.iter().map(start).collect();
        Self { stop, threads }
    }
}

impl Drop for Hogs {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|hog| hog.join().unwrap());
    }
}

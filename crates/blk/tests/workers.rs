//! The kernel's threads that wait for storage on behalf of an I/O thread, which has its CPU to itself.
#![allow(clippy::unwrap_used, reason = "tests")]

mod fake;

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use blk::backends::file::{Direct, Engine, File, FileOptions};
use fake::{FLUSH, OK, Rig, Ring, pattern};
use reactor::{Budget, CpuList, Machine, Mode, Options, Poller, Pool, Ticks, Work};

/// Has nothing to do.
struct Idle;

impl Poller for Idle {
    fn poll(&mut self, _: Ticks, _: Budget) -> Work {
        Work::NONE
    }

    fn arm(&mut self) -> bool {
        false
    }

    fn disarm(&mut self) {}

    fn wake_fds(&self) -> Vec<RawFd> {
        Vec::new()
    }

    fn awaits_completion(&self) -> bool {
        false
    }

    fn drain(&mut self, _: Ticks) -> bool {
        true
    }

    fn abandon(&mut self) -> bool {
        true
    }
}

/// The CPUs on which the kernel's threads for io_uring may run that work for the calling thread.
fn cpus_of_workers() -> Vec<CpuList> {
    let name = format!("iou-wrk-{}\n", rustix::thread::gettid().as_raw_nonzero());
    let cpus = |task: std::fs::DirEntry| {
        let read = |file| std::fs::read_to_string(task.path().join(file)).ok();
        let status = read("status").filter(|_| read("comm").as_ref() == Some(&name))?;
        status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?.trim().parse().ok()
    };
    std::fs::read_dir("/proc/self/task").unwrap().flatten().filter_map(cpus).collect()
}

#[test]
fn the_kernels_threads_run_elsewhere_than_the_io_thread() {
    let machine = Machine::read();
    let [first, _, ..] = machine.allowed[..] else { return needs::skip("one CPU") };
    let path =
        PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("exitless-workers-{}", std::process::id()));
    std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let options = FileOptions { direct: Direct::Off, engine: Engine::Uring, ..FileOptions::default() };
    let file = File::open(&path, options);
    std::fs::remove_file(&path).unwrap();
    let file = match file {
        Ok(file) => file,
        Err(error) => return needs::skip(error),
    };
    let cpus: CpuList = first.id.to_string().parse().unwrap();
    let wish = reactor::placement::Wish { cpus: Some(cpus), ..Default::default() };
    let pool = Pool::start(Options { wish, ..Options::default() }).unwrap();
    let (tell, told) = mpsc::channel();
    // On the I/O thread.
    let serve = move || -> Box<dyn Poller> {
        let mut rig = Rig::new(Arc::new(file), Ring::SPLIT);
        let deadline = Instant::now() + Duration::from_secs(120);
        let found = loop {
            rig.write(0, &pattern(65536, 1));
            assert_eq!(rig.status(FLUSH, 0, &[], 0), OK);
            let found = cpus_of_workers();
            if !found.is_empty() || Instant::now() > deadline {
                break found;
            }
        };
        tell.send(found).unwrap();
        Box::new(Idle)
    };
    let _handle = pool.place("disk", Mode::Hybrid).unwrap().add("disk", serve).unwrap();
    let found = told.recv().unwrap();
    assert!(!found.is_empty(), "a flush is for such a thread");
    let others: Vec<u32> = machine.allowed[1..].iter().map(|cpu| cpu.id).collect();
    for cpus in found {
        assert_eq!(cpus.as_slice(), others, "the I/O thread's CPU is {}", first.id);
    }
}

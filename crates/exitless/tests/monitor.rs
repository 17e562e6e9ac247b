//! The embedded guest in our own monitor, under this machine's KVM: it drives a disk in memory, checks what it reads,
//! and what it says is compared with what the monitor counted.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use reactor::{Mode, Options, Pool};
use serde_json::Value;
use vmm::{Config, DoorbellMode, Kernel, Machine, Outcome, PciDevice, Snapshot};

const DISK_BYTES: u64 = 64 << 20;

#[derive(Clone, Default)]
struct Console(Arc<Mutex<Vec<u8>>>);

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Console {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }

    /// The guest's result; it has ended well.
    fn result(&self) -> Value {
        let text = self.text();
        let said = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let result = said.rev().find_map(|line| line.get("result").cloned());
        result.unwrap_or_else(|| panic!("no result:\n{text}"))
    }
}

struct Case {
    cpus: usize,
    queues: u16,
    mode: Mode,
    doorbells: DoorbellMode,
}

impl Default for Case {
    fn default() -> Self {
        Self { cpus: 2, queues: 2, mode: Mode::Hybrid, doorbells: DoorbellMode::Adaptive }
    }
}

impl Case {
    fn machine(&self, options: &str, console: &Console) -> Machine {
        let mut config = Config::new(Kernel::Embedded(exitless::guest::ELF), Box::new(console.clone()));
        config.memory_bytes = 128 << 20;
        config.cpus = self.cpus;
        config.command_line = options.to_owned();
        config.doorbells = self.doorbells;
        let spec = blk::Spec::Memory { bytes: DISK_BYTES, huge: false };
        let options = blk::Options { queues: self.queues, ..blk::Options::default() };
        let disk = Arc::new(blk::Blk::new(spec.open(false).unwrap(), options).unwrap());
        let pool = Arc::new(Pool::start(Options::default()).unwrap());
        Machine::new(config, vec![PciDevice::new(disk, "disk", self.mode)], pool).unwrap()
    }

    /// Runs a job that must go well; what it said and what was counted while it measured.
    #[track_caller]
    fn run(&self, options: &str) -> (Value, Snapshot) {
        let console = Console::default();
        let machine = self.machine(options, &console);
        assert_eq!(machine.run().unwrap(), Outcome::Exit(0), "{options}: {}", console.text());
        let result = console.result();
        assert_eq!(result["errors"], 0, "{options}: {result}");
        (result, machine.measured().expect("the guest marks what it measures"))
    }

    /// The same for `ms`, and for longer until the machine has found time for requests.
    #[track_caller]
    fn run_for(&self, mut ms: u64, options: &str) -> (Value, Snapshot) {
        loop {
            let (result, measured) = self.run(&format!("job=blk ms={ms} {options}"));
            if number(&result, "requests") > 0 {
                return (result, measured);
            }
            ms *= 4;
            assert!(ms < 60_000, "{options}: not one request: {result}");
        }
    }
}

fn number(result: &Value, name: &str) -> u64 {
    result[name].as_u64().unwrap_or_else(|| panic!("no number `{name}` in {result}"))
}

#[test]
fn every_byte_is_right_in_both_formats_and_all_modes() {
    if !needs::kvm() {
        return;
    }
    for mode in [Mode::Notify, Mode::Hybrid, Mode::Poll] {
        for (ring, jobs, irq) in [("split", 1, 0), ("split", 2, 1), ("packed", 2, 0), ("packed", 1, 1)] {
            let case = Case { mode, ..Case::default() };
            let options = format!("verify=1 rw=randread ring={ring} jobs={jobs} irq={irq}");
            let (result, measured) = case.run_for(100, &options);
            assert!(number(&result, "verified_bytes") > 0, "{mode} {options}: {result}");
            let requests = number(&result, "requests");
            assert!(measured.requests() >= requests, "{mode} {options}: {measured:?}");
            assert_eq!(measured.vcpus.len(), 2);
            case.run_for(50, &format!("rw=randwrite ring={ring} jobs={jobs} irq={irq}"));
        }
    }
}

#[test]
fn steady_state_has_no_kicks_interrupts_and_exits_of_ours() {
    if !needs::kvm() {
        return;
    }
    let case = Case { cpus: 1, queues: 1, mode: Mode::Poll, ..Case::default() };
    let (result, measured) = case.run_for(500, "irq=0");
    if measured.threads.iter().all(|thread| thread.sleeps == 0) {
        assert_eq!(number(&result, "kicks"), 0, "{result}");
        assert_eq!(measured.interrupts(), 0);
        // The mark that ends the measurement is one.
        assert!(measured.user_exits() <= 1, "{:?}", measured.vcpus);
    }
}

#[test]
fn a_guest_that_ignores_suppression_rings_for_nothing_once_its_page_is_mapped() {
    if !needs::kvm() {
        return;
    }
    for doorbells in [DoorbellMode::Map, DoorbellMode::Adaptive] {
        let case = Case { cpus: 1, queues: 1, mode: Mode::Poll, doorbells };
        let (result, measured) = case.run_for(500, "irq=0 kick=always");
        assert!(number(&result, "kicks") > 0);
        if measured.threads.iter().all(|thread| thread.sleeps == 0) {
            // As many as it takes to pay for a change, and those that came while it was made.
            assert!(measured.kicks() < 1_000, "{doorbells}: {measured:?}");
        }
    }
    let case = Case { cpus: 1, queues: 1, mode: Mode::Notify, doorbells: DoorbellMode::Trap };
    let (_, measured) = case.run_for(200, "irq=0 kick=always");
    assert!(measured.kicks() > 0 && measured.queues.iter().all(|queue| queue.doorbell.maps == 0));
}

#[test]
fn doorbells_that_come_and_go_lose_nothing() {
    if !needs::kvm() {
        return;
    }
    // Notify sleeps after every burst, so the page is unmapped as often as it is mapped.
    for (mode, ring) in [(Mode::Notify, "split"), (Mode::Hybrid, "packed")] {
        let case = Case { mode, doorbells: DoorbellMode::Map, ..Case::default() };
        let options = format!("job=blk ms=300 jobs=2 qd=2 irq=1 verify=1 ring={ring}");
        let console = Console::default();
        let machine = case.machine(&options, &console);
        assert_eq!(machine.run().unwrap(), Outcome::Exit(0), "{options}: {}", console.text());
        let result = console.result();
        assert_eq!(number(&result, "errors"), 0, "{result}");
        let counted = machine.snapshot();
        assert!(counted.queues.iter().all(|queue| queue.doorbell.maps > 0), "{counted:?}");
    }
}

#[test]
fn a_machine_is_paused_and_resumed_under_load() {
    if !needs::kvm() {
        return;
    }
    // A machine that this thread finds no time to pause before its end is no reason to fail; ten are.
    assert!((0..10).any(|_| pauses_under_load() > 0));
}

/// How often a machine was paused before it had done its job.
fn pauses_under_load() -> u32 {
    let console = Console::default();
    let machine = Case::default().machine("job=blk ms=600 jobs=2 irq=1 verify=1", &console);
    let over = AtomicBool::new(false);
    let pauses = thread::scope(|scope| {
        let running = scope.spawn(|| {
            let outcome = machine.run();
            over.store(true, Ordering::Release);
            outcome
        });
        let mut pauses = 0;
        while !over.load(Ordering::Acquire) {
            thread::sleep(Duration::from_millis(20));
            if machine.pause() {
                let before = machine.snapshot().requests();
                thread::sleep(Duration::from_millis(5));
                assert_eq!(machine.snapshot().requests(), before, "somebody went on");
                machine.resume();
                pauses += 1;
            }
        }
        assert_eq!(running.join().unwrap().unwrap(), Outcome::Exit(0), "{}", console.text());
        pauses
    });
    assert_eq!(console.result()["errors"], 0);
    pauses
}

#[test]
fn a_machine_that_is_stopped_under_load_leaves_nothing_behind() {
    if !needs::kvm() {
        return;
    }
    let console = Console::default();
    let machine = Case::default().machine("job=blk seconds=3600 jobs=2 irq=1", &console);
    thread::scope(|scope| {
        let running = scope.spawn(|| machine.run());
        let deadline = Instant::now() + Duration::from_secs(120);
        while machine.snapshot().requests() < 100 && !running.is_finished() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        // Before anything fails: the scope ends with the machine.
        machine.stop();
        assert_eq!(running.join().unwrap().unwrap(), Outcome::Stopped, "{}", console.text());
        assert!(machine.snapshot().requests() >= 100, "it stands still: {}", console.text());
    });
}

//! The embedded guest on disks that do not do what they should: it ends, and says why.

use std::num::NonZeroU16;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use blk::Blk;
use clap::Parser;
use reactor::{Budget, Poller, Ticks, Work};
use virtio::{Call, Device, NotReady, PollerBuilder, Queue};
use vmm::PciDevice;

use super::machine::{config, disks, open};
use super::*;
use crate::cli::{Cli, Command};

/// What is wrong with a disk.
#[derive(Clone)]
enum Fault {
    /// It takes no request.
    Mute,
    /// Of so many interrupts it loses one; how many it has lost so far.
    Loses(u64, Arc<AtomicU64>),
    /// It does not finish what it has in flight, which a reset waits for, until this is set.
    NeverDrained(Arc<AtomicBool>),
}

struct Faulty {
    disk: Blk,
    fault: Fault,
}

impl Device for Faulty {
    fn device_id(&self) -> u32 {
        self.disk.device_id()
    }

    fn features(&self) -> u64 {
        self.disk.features()
    }

    fn queues(&self) -> u16 {
        self.disk.queues()
    }

    fn config(&self) -> Vec<u8> {
        self.disk.config()
    }

    fn start_queue(&self, mut queue: Queue) -> Result<PollerBuilder, NotReady> {
        if let Fault::Loses(every, lost) = self.fault.clone() {
            queue.wrap_call(|call| Arc::new(Lossy { call, every, calls: AtomicU64::new(0), lost }));
        }
        let (build, fault) = (self.disk.start_queue(queue)?, self.fault.clone());
        Ok(Box::new(move || Box::new(FaultyQueue { queue: build(), fault })))
    }
}

struct Lossy {
    call: Arc<dyn Call>,
    every: u64,
    calls: AtomicU64,
    lost: Arc<AtomicU64>,
}

impl Call for Lossy {
    fn call(&self) -> bool {
        let calls = self.calls.fetch_add(1, Ordering::Relaxed) + 1;
        if calls.is_multiple_of(self.every) {
            self.lost.fetch_add(1, Ordering::Relaxed);
            return true;
        }
        self.call.call()
    }
}

struct FaultyQueue {
    queue: Box<dyn Poller>,
    fault: Fault,
}

impl Poller for FaultyQueue {
    fn poll(&mut self, now: Ticks, budget: Budget) -> Work {
        match self.fault {
            Fault::Mute => Work::NONE,
            _ => self.queue.poll(now, budget),
        }
    }

    fn arm(&mut self) -> bool {
        !matches!(self.fault, Fault::Mute) && self.queue.arm()
    }

    fn disarm(&mut self) {
        self.queue.disarm();
    }

    fn wake_fds(&self) -> Vec<std::os::fd::RawFd> {
        self.queue.wake_fds()
    }

    fn awaits_completion(&self) -> bool {
        self.queue.awaits_completion()
    }

    fn drain(&mut self, now: Ticks) -> bool {
        match &self.fault {
            Fault::NeverDrained(released) if !released.load(Ordering::Acquire) => false,
            _ => self.queue.drain(now),
        }
    }

    fn abandon(&mut self) -> bool {
        self.queue.abandon()
    }
}

/// What came of a job on a disk with a fault, and whether its machine ended. It is given `patience` beyond its time.
fn job(fault: &Fault, arguments: &str, patience: Duration) -> (Report, bool) {
    let line = format!("exitless run --io-pin off --poll notify --disk mem:16M,queues=2 {arguments}");
    let Command::Run(options) = Cli::try_parse_from(line.split_whitespace()).unwrap().command else {
        panic!("another command")
    };
    let pool = Arc::new(Pool::start(reactor::Options { pin: false, ..Default::default() }).unwrap());
    let disk = open(&disks(&options).unwrap()[0], NonZeroU16::MIN).unwrap();
    let disk = PciDevice::new(Arc::new(Faulty { disk, fault: fault.clone() }), "disk", options.poll);
    let (tell, said) = mpsc::channel();
    let machine = Machine::new(config(&options, (tell.clone(), Arc::default())), vec![disk], pool).unwrap();
    let machine = Arc::new(machine);
    let runner = thread::spawn({
        let machine = machine.clone();
        move || {
            let _ = machine.run();
            let _ = tell.send(Said::Ended);
        }
    });
    let length = Duration::from_millis(options.job.seconds.0.get().into());
    let mut report = Report::new(&options, Vec::new());
    let ended = follow(&machine, &said, &options, Some(Silence::new(length, patience)), &mut report);
    if let Fault::NeverDrained(released) = fault {
        assert!(!runner.is_finished(), "nothing held the machine");
        released.store(true, Ordering::Release);
    }
    runner.join().unwrap();
    (report, ended)
}

/// Longer than a guest takes to give up, on a machine with much else to do.
const LONG: Duration = Duration::from_secs(300);

/// One at a time, if there is KVM at all.
fn turn() -> Option<std::sync::MutexGuard<'static, ()>> {
    static TURN: Mutex<()> = Mutex::new(());
    needs::kvm().then(|| TURN.lock().unwrap_or_else(PoisonError::into_inner))
}

#[test]
fn a_disk_that_completes_nothing_is_given_up_however_it_is_waited_for() {
    let Some(_turn) = turn() else { return };
    thread::scope(|scope| {
        for (arguments, in_flight) in [
            ("--guest-job blk", 32),
            ("--guest-job blk --completion interrupt", 32),
            ("--guest-job blk --completion interrupt --ring packed --jobs 2 --qd 3", 3),
            ("--guest-job blk --verify --qd 7", 7),
            ("--guest-job blk --verify --completion interrupt", 32),
            ("--guest-job events", 1),
        ] {
            scope.spawn(move || {
                let (report, ended) = job(&Fault::Mute, &format!("--seconds 0.2 {arguments}"), LONG);
                let expected = format!(
                    "disk 0: queue 0: {in_flight} requests are in flight and none came back for 10 s"
                );
                assert_eq!((report.errors, ended), (vec![expected], true), "{arguments}");
            });
        }
    });
}

#[test]
fn interrupts_that_are_lost_are_counted_and_told_from_a_slow_disk() {
    let Some(_turn) = turn() else { return };
    for ring in ["split", "packed"] {
        let dropped = Arc::new(AtomicU64::new(0));
        let arguments = format!("--guest-job blk --completion interrupt --seconds 1.5 --ring {ring}");
        let (report, ended) = job(&Fault::Loses(20, dropped.clone()), &arguments, LONG);
        assert!(ended && report.errors.is_empty(), "{:?}", report.errors);
        let lost = report.results[0].result.count("lost_interrupts").unwrap();
        let dropped = dropped.load(Ordering::Relaxed);
        assert!((1..=dropped).contains(&lost), "{lost} interrupts are missed, {dropped} were dropped");
        assert!(report.text(false).contains(&format!("interrupts lost: {lost}")));
    }
}

#[test]
fn a_disk_that_loses_every_interrupt_is_given_up() {
    let Some(_turn) = turn() else { return };
    thread::scope(|scope| {
        for arguments in ["blk --completion interrupt --verify", "events --seconds 30"] {
            scope.spawn(move || {
                let fault = Fault::Loses(1, Arc::default());
                let (report, ended) = job(&fault, &format!("--guest-job {arguments}"), LONG);
                let [error] = &report.errors[..] else { panic!("{arguments}: {:?}", report.errors) };
                assert!(ended && error.contains("queue 0: 16 interrupts were lost"), "{arguments}: {error}");
            });
        }
    });
}

#[test]
fn a_guest_that_a_disk_holds_in_its_reset_is_left_behind() {
    let Some(_turn) = turn() else { return };
    let fault = Fault::NeverDrained(Arc::default());
    let (report, ended) = job(&fault, "--guest-job blk --seconds 0.2", Duration::from_secs(1));
    let [error] = &report.errors[..] else { panic!("{:?}", report.errors) };
    assert!(!ended && error.starts_with("it has said nothing and made no request for"), "{error}");
    let verdict = verdict(Outcome::Stopped, &report).unwrap_err();
    assert_eq!(verdict.exit_code(), crate::failure::EXIT_RUNTIME);
    assert!(verdict.to_string().starts_with("the guest failed: it has said nothing"), "{verdict}");
}

//! Machines that run under this host's KVM: kernels of a few instructions that print, end, fail and are stopped.

#![allow(clippy::unwrap_used)]

mod tiny;

use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use reactor::{Options, Pool};
use tiny::{Program, SCRATCH};
use vmm::{Config, Error, Kernel, Machine, Outcome};

/// A console that can be waited for.
#[derive(Clone, Default)]
struct Console(Arc<(Mutex<Vec<u8>>, Condvar)>);

impl Console {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.0.lock().unwrap()).into_owned()
    }

    fn len(&self) -> usize {
        self.0.0.lock().unwrap().len()
    }

    /// Waits until there are `bytes` bytes.
    fn wait_for(&self, bytes: usize) {
        let (text, changed) = &*self.0;
        let deadline = Duration::from_secs(120);
        let (text, late) =
            changed.wait_timeout_while(text.lock().unwrap(), deadline, |text| text.len() < bytes).unwrap();
        assert!(!late.timed_out(), "only {} bytes were printed", text.len());
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.0.lock().unwrap().extend(bytes);
        self.0.1.notify_all();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn config(program: Program, console: &Console) -> Config {
    let mut config = Config::new(Kernel::Embedded(program.elf()), Box::new(console.clone()));
    config.memory_bytes = 64 << 20;
    config
}

fn machine(config: Config) -> Result<Machine, Error> {
    Machine::new(config, Vec::new(), Arc::new(Pool::start(Options::default()).unwrap()))
}

/// Runs a program to its end; what it printed and how it ended.
fn run(program: Program) -> (String, Outcome) {
    let console = Console::default();
    let outcome = machine(config(program, &console)).unwrap().run().unwrap();
    (console.text(), outcome)
}

#[test]
fn a_kernel_prints_and_ends_with_its_status() {
    if needs::kvm() {
        let (text, outcome) = run(Program::new().print("hello from the guest\n").exit(42));
        assert_eq!((text.as_str(), outcome), ("hello from the guest\n", Outcome::Exit(42)));
    }
}

#[test]
fn a_kernel_gets_its_command_line() {
    if needs::kvm() {
        let console = Console::default();
        let mut config = config(Program::new().print_command_line(9).exit(0), &console);
        config.command_line = "job=blk x".to_owned();
        assert_eq!(machine(config).unwrap().run().unwrap(), Outcome::Exit(0));
        assert_eq!(console.text(), "job=blk x");
    }
}

#[test]
fn every_way_to_end_is_told_from_the_others() {
    if needs::kvm() {
        assert_eq!(run(Program::new().out8(0x64, 0xFE).halt()).1, Outcome::Reset, "keyboard controller");
        assert_eq!(run(Program::new().out8(0xCF9, 6).halt()).1, Outcome::Reset, "reset register");
        assert_eq!(run(Program::new().jump(0xF_FFF0)).1, Outcome::Reset, "the BIOS");
        assert_eq!(run(Program::new().triple_fault()).1, Outcome::TripleFault);
        assert_eq!(run(Program::new().out8(0x505, 1).halt()).1, Outcome::Panicked);
        assert_eq!(run(Program::new().out16(0x604, 0x3400).halt()).1, Outcome::PowerOff);
        assert_eq!(run(Program::new().exit(255)).1, Outcome::Exit(255));
    }
}

#[test]
fn a_guest_that_listens_is_asked_to_end() {
    if needs::kvm() {
        const PM1_STATUS: u16 = 0x600;
        const PM1_ENABLE: u16 = 0x602;
        const POWER_BUTTON: u16 = 1 << 8;
        const END_WORD: u16 = 0x508;
        let by_button = Program::new().out16(PM1_ENABLE, POWER_BUTTON).print("x");
        let by_button = by_button.wait_for_port(PM1_STATUS, POWER_BUTTON).out16(0x604, 0x3400).halt();
        let by_word = Program::new().write32(SCRATCH, 0).out32(END_WORD, SCRATCH).print("x");
        let by_word = by_word.wait_for(SCRATCH, 1).exit(3);
        for (program, end) in [(by_button, Outcome::PowerOff), (by_word, Outcome::Exit(3))] {
            let console = Console::default();
            let machine = machine(config(program, &console)).unwrap();
            thread::scope(|scope| {
                let running = scope.spawn(|| machine.run());
                console.wait_for(1);
                assert!(machine.press_power_button());
                assert_eq!(running.join().unwrap().unwrap(), end);
            });
        }
        let console = Console::default();
        let machine = machine(config(Program::new().print("x").halt(), &console)).unwrap();
        thread::scope(|scope| {
            let running = scope.spawn(|| machine.run());
            console.wait_for(1);
            assert!(!machine.press_power_button(), "nobody listens");
            machine.stop();
            assert_eq!(running.join().unwrap().unwrap(), Outcome::Stopped);
        });
    }
}

/// What a loader looks at of a bzImage whose setup code has one sector and whose kernel has 4 KiB.
fn bz_image() -> Vec<u8> {
    let mut image = vec![0; 2 * 512 + 4096];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1F1, &[1]); // setup_sects
    put(0x1F4, &(4096_u32 / 16).to_le_bytes()); // syssize
    put(0x1FE, &0xAA55_u16.to_le_bytes());
    put(0x202, b"HdrS");
    put(0x206, &0x20F_u16.to_le_bytes()); // version
    put(0x211, &[1]); // loadflags: loaded high
    put(0x214, &0x10_0000_u32.to_le_bytes()); // code32_start
    put(0x236, &1_u16.to_le_bytes()); // xloadflags: 64-bit entry
    put(0x22C, &0x7FFF_FFFF_u32.to_le_bytes()); // initrd_addr_max
    image
}

#[test]
fn kernels_that_were_cut_short_are_refused() {
    if needs::kvm() {
        let build = |image: Vec<u8>| {
            let mut config = config(Program::new(), &Console::default());
            config.kernel = Kernel::Embedded(Box::leak(image.into_boxed_slice()));
            machine(config).map(drop)
        };
        let cut = |image: &[u8]| {
            for bytes in (0..image.len()).rev().step_by(7) {
                let error = build(image[..bytes].to_vec()).unwrap_err();
                assert!(matches!(error, Error::Kernel { .. }), "{bytes}: {error}");
            }
        };
        build(bz_image()).unwrap();
        cut(&bz_image());
        let error = build(bz_image()[..2000].to_vec()).unwrap_err().to_string();
        assert!(error.contains("cut short: of 5120 bytes, there are 2000"), "{error}");
        build(Program::new().print("x").exit(0).elf().to_vec()).unwrap();
        cut(Program::new().print("x").exit(0).elf());
    }
}

#[test]
fn a_kernel_that_loops_is_paused_resumed_and_stopped() {
    if needs::kvm() {
        let program = Program::new();
        let start = program.here();
        let console = Console::default();
        let machine = machine(config(program.print(".").jump(start), &console)).unwrap();
        thread::scope(|scope| {
            let running = scope.spawn(|| machine.run());
            for _ in 0..3 {
                console.wait_for(console.len() + 10);
                assert!(machine.pause());
                let printed = console.len();
                thread::sleep(Duration::from_millis(20));
                assert_eq!(console.len(), printed);
                machine.resume();
            }
            console.wait_for(console.len() + 10);
            machine.stop();
            assert_eq!(running.join().unwrap().unwrap(), Outcome::Stopped);
        });
        assert!(matches!(machine.run(), Err(Error::Used)));
        assert!(!machine.pause());
    }
}

#[test]
fn a_machine_can_be_paused_while_it_starts() {
    if needs::kvm() {
        for round in 0..20 {
            let program = Program::new();
            let start = program.here();
            let mut config = config(program.jump(start), &Console::default());
            config.cpus = 8;
            let machine = machine(config).unwrap();
            thread::scope(|scope| {
                let (done, rested) = mpsc::channel();
                let running = scope.spawn(|| machine.run());
                let stopped = &machine;
                let watch = scope.spawn(move || {
                    let late = rested.recv_timeout(Duration::from_secs(120)).is_err();
                    stopped.stop();
                    late
                });
                // At another point of the start each time.
                thread::sleep(Duration::from_micros(25 * round));
                assert!(machine.pause());
                machine.resume();
                done.send(()).unwrap();
                assert!(!watch.join().unwrap(), "it went on");
                assert_eq!(running.join().unwrap().unwrap(), Outcome::Stopped);
            });
        }
    }
}

#[test]
fn a_kernel_that_waits_for_ever_is_stopped() {
    if needs::kvm() {
        let console = Console::default();
        let machine = machine(config(Program::new().print("x").halt(), &console)).unwrap();
        thread::scope(|scope| {
            let running = scope.spawn(|| machine.run());
            console.wait_for(1);
            assert!(machine.pause());
            machine.stop();
            assert_eq!(running.join().unwrap().unwrap(), Outcome::Stopped);
        });
    }
}

#[test]
fn the_first_processor_starts_the_second() {
    if needs::kvm() {
        const TRAMPOLINE: u32 = 0x8000;
        const FLAG: u32 = 0x9000;
        let code = tiny::started_processor(b'2', FLAG as u16);
        let program = Program::new()
            .copy(&code, TRAMPOLINE)
            .write32(FLAG, 0)
            .start_second(TRAMPOLINE)
            .wait_for(FLAG, 1)
            .print("1")
            .exit(0);
        let console = Console::default();
        let mut config = config(program, &console);
        config.cpus = 2;
        let machine = machine(config).unwrap();
        assert_eq!(machine.run().unwrap(), Outcome::Exit(0));
        assert_eq!(console.text(), "21");
        assert_eq!(machine.snapshot().vcpus.len(), 2);
    }
}

#[test]
fn what_is_typed_reaches_the_guest() {
    if needs::kvm() {
        const LINE_STATUS: u16 = 0x3FD;
        let console = Console::default();
        let program =
            Program::new().print("?").wait_for(SCRATCH, 0).print_port(LINE_STATUS).print_port(0x3F8).exit(0);
        let machine = machine(config(program, &console)).unwrap();
        assert_eq!(machine.input(b"!"), 1);
        machine.run().unwrap();
        let text = console.text().into_bytes();
        assert_eq!((text[0], text[1] & 1, text[2]), (b'?', 1, b'!'));
    }
}

#[test]
fn what_the_guest_marks_is_measured_and_exits_are_counted_by_reason() {
    if needs::kvm() {
        let mut program = Program::new().out8(0x80, 0).out8(0x502, 1);
        for _ in 0..100 {
            program = program.out8(0x80, 0);
        }
        let console = Console::default();
        let machine = machine(config(program.out8(0x502, 2).out8(0x80, 0).exit(0), &console)).unwrap();
        assert_eq!(machine.measured(), None);
        machine.run().unwrap();
        let measured = machine.measured().unwrap();
        // The mark that ends it is an exit in between, too.
        assert_eq!(measured.vcpus[0].user_exits.port_writes, 101);
        assert_eq!(machine.snapshot().vcpus[0].user_exits.port_writes, 105);
        assert!(measured.at_ns > 0 && measured.vcpus[0].outside_ns > 0 && measured.vcpus[0].inside_ns > 0);
        if !measured.kvm().is_empty() {
            assert!(measured.exits() >= 100, "{:?}", measured.kvm());
        }
    }
}

#[test]
fn what_cannot_be_booted_is_refused_with_a_reason() {
    if needs::kvm() {
        let console = Console::default();
        let refused = |change: &dyn Fn(&mut Config)| {
            let mut config = config(Program::new().exit(0), &console);
            change(&mut config);
            machine(config).err().unwrap().to_string()
        };
        let no_note = Kernel::Embedded(Program::new().exit(0).elf_without_note());
        assert!(refused(&|config| config.kernel = no_note.clone()).contains("without a PVH entry"));
        let no_kernel = Kernel::Embedded(&[0; 8192]);
        assert!(refused(&|config| config.kernel = no_kernel.clone()).contains("neither ELF nor bzImage"));
        assert!(refused(&|config| config.kernel = Kernel::Embedded(b"")).contains("cannot boot"));
        let missing = Kernel::Path("/nonexistent/vmlinux".into());
        assert!(refused(&|config| config.kernel = missing.clone()).contains("/nonexistent/vmlinux"));
        assert!(refused(&|config| config.initrd = Some("/nonexistent/initrd".into())).contains("initrd"));
        assert!(refused(&|config| config.initrd = Some("/dev/null".into())).contains("do not fit"));
        assert!(refused(&|config| config.command_line = "x".repeat(2048)).contains("at most 2047"));
        assert!(refused(&|config| config.cpus = 0).contains("between 1 and"));
        assert!(refused(&|config| config.cpus = vmm::VCPUS_MAX + 1).contains("between 1 and"));
        assert!(refused(&|config| config.pin = vec![0, 1]).contains("one for each"));
        assert!(refused(&|config| config.pin = vec![u32::MAX]).contains("4294967295"));
        assert!(refused(&|config| config.memory_bytes = 12345).contains("multiple of 4096"));
    }
}

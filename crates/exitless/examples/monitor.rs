//! The monitor alone: boots a kernel with disks, shows its console, and says at the end what was counted.
//!
//! `cargo run -p exitless --example monitor -- --kernel vmlinuz --initrd initrd --append 'console=ttyS0' --disk mem:64M`

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use clap::Parser;
use reactor::{Mode, Options, Pool};
use vmm::{Config, DoorbellMode, Kernel, Machine, Outcome, PciDevice};

#[derive(Parser)]
struct Arguments {
    #[arg(long)]
    kernel: PathBuf,
    #[arg(long)]
    initrd: Option<PathBuf>,
    #[arg(long, default_value = "")]
    append: String,
    #[arg(long, default_value_t = 1)]
    cpus: usize,
    /// In MiB.
    #[arg(long, default_value_t = 256)]
    memory: u64,
    #[arg(long)]
    huge: bool,
    /// Host CPUs of the virtual ones.
    #[arg(long, value_delimiter = ',')]
    pin: Vec<u32>,
    /// CPUs of the I/O threads.
    #[arg(long)]
    io_cpus: Option<reactor::CpuList>,
    #[arg(long)]
    disk: Vec<blk::Spec>,
    /// Of each disk.
    #[arg(long, default_value_t = 1)]
    queues: u16,
    #[arg(long, default_value = "hybrid")]
    poll: Mode,
    #[arg(long, default_value = "adaptive")]
    doorbells: DoorbellMode,
}

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let arguments = Arguments::parse();
    let mut options = Options::default();
    options.wish.cpus = arguments.io_cpus;
    let pool = Arc::new(Pool::start(options)?);
    let mut config = Config::new(Kernel::Path(arguments.kernel), Box::new(std::io::stdout()));
    config.initrd = arguments.initrd;
    config.command_line = arguments.append;
    config.cpus = arguments.cpus;
    config.memory_bytes = arguments.memory << 20;
    config.huge_pages = arguments.huge;
    config.pin = arguments.pin;
    config.doorbells = arguments.doorbells;
    let disk = |(number, spec): (usize, &blk::Spec)| {
        let options = blk::Options { queues: arguments.queues, ..blk::Options::default() };
        let disk = blk::Blk::new(spec.open(false)?, options).with_context(|| format!("disk {number}"))?;
        anyhow::Ok(PciDevice::new(Arc::new(disk), format!("disk{number}"), arguments.poll))
    };
    let devices = arguments.disk.iter().enumerate().map(disk).collect::<Result<_, _>>()?;
    let machine = Machine::new(config, devices, pool)?;
    let outcome = machine.run()?;
    let counted = machine.measured().unwrap_or_else(|| machine.snapshot());
    eprintln!("{outcome:?} after {} ms, EHT {:.3?} %", counted.at_ns / 1_000_000, counted.eht_percent());
    let (requests, exits) = (counted.requests(), counted.exits());
    eprintln!("{requests} requests, {} kicks, {} interrupts", counted.kicks(), counted.interrupts());
    eprintln!("{exits} exits, {} of them to user space: {:?}", counted.user_exits(), counted.kvm());
    for vcpu in &counted.vcpus {
        eprintln!(
            "{:?}, guest {} ms, host {} ms",
            vcpu.user_exits,
            vcpu.guest_ns / 1_000_000,
            vcpu.host_ns / 1_000_000
        );
    }
    for queue in &counted.queues {
        eprintln!("{queue:?}");
    }
    for thread in &counted.threads {
        eprintln!("{thread:?}");
    }
    match outcome {
        Outcome::Exit(0) | Outcome::PowerOff | Outcome::Reset => Ok(()),
        other => anyhow::bail!("{other:?}"),
    }
}

//! The machine that was asked for.

use std::num::NonZeroU16;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use anyhow::{Context, anyhow};
use blk::Blk;
use reactor::{Mode, Pool};
use rng::Rng;
use vmm::{Config, Kernel, Machine, PciDevice};

use super::console;
use super::console_tail::ConsoleTail;
use super::disk::DiskOption;
use super::follow::Said;
use super::options::RunOptions;
use crate::failure::Failure;

/// Who listens to the guest's console: to the embedded guest's lines, and to a kernel's last words.
pub(super) type Ears = (Sender<Said>, Arc<ConsoleTail>);

/// The machine with its devices, ready to run: its disks, which are returned too, and a source of entropy.
pub(super) fn build(
    options: &RunOptions,
    disks: &[DiskOption],
    pool: &Arc<Pool>,
    ears: Ears,
) -> Result<(Machine, Vec<Arc<Blk>>), Failure> {
    let vcpus = NonZeroU16::new(options.vcpus()).unwrap_or(NonZeroU16::MIN);
    let (mut devices, mut opened) = (Vec::new(), Vec::new());
    for (index, disk) in disks.iter().enumerate() {
        let disk = Arc::new(open(disk, vcpus).map_err(Failure::Usage)?);
        opened.push(disk.clone());
        devices.push(PciDevice::new(disk, format!("disk{index}"), options.poll));
    }
    // Guests ask for entropy now and then: no thread polls for that all the time.
    let poll = if options.poll == Mode::Poll { Mode::Hybrid } else { options.poll };
    devices.push(PciDevice::new(Arc::new(Rng::new(None)), "rng", poll));
    let machine = Machine::new(config(options, ears), devices, pool.clone());
    let machine = machine.context("cannot build the machine").map_err(Failure::Usage)?;
    Ok((machine, opened))
}

/// What is told to the monitor, and to the guest.
pub(super) fn config(options: &RunOptions, (tell, tail): Ears) -> Config {
    let mut config = match &options.kernel {
        Some(kernel) => {
            Config::new(Kernel::Path(kernel.clone()), tail.behind(console::stream(options.json).sink()))
        }
        None => Config::new(Kernel::Embedded(crate::guest::ELF), Box::new(console::Lines::new(tell))),
    };
    config.initrd.clone_from(&options.initrd);
    config.command_line = match &options.kernel {
        Some(_) => options.append.clone().unwrap_or_default(),
        None => options.job.command_line(),
    };
    config.memory_bytes = options.mem.0.get();
    config.huge_pages = options.huge;
    config.cpus = options.vcpus().into();
    let pins = options.vcpu_cpus.as_ref().map_or(&[][..], |cpus| cpus.as_slice());
    config.pin = pins.iter().copied().cycle().take(config.cpus).collect();
    config.doorbells = options.doorbell;
    config
}

/// The disks asked for; for the embedded guest, those that need no file if there are none.
pub(super) fn disks(options: &RunOptions) -> Result<Vec<DiskOption>, Failure> {
    const TOUR: [&str; 2] = ["null:8G", "mem:64M"];
    if !options.disk.is_empty() || options.kernel.is_some() {
        return Ok(options.disk.clone());
    }
    let parsed = TOUR.map(str::parse).into_iter().collect::<Result<_, String>>();
    parsed.map_err(|error| Failure::Runtime(anyhow!(error)))
}

/// One of them.
pub(super) fn open(disk: &DiskOption, queues: NonZeroU16) -> anyhow::Result<Blk> {
    let backend = disk.backend.open(disk.read_only)?;
    let presented = blk::Options {
        queues: disk.queues.unwrap_or(queues).get(),
        serial: disk.serial.clone(),
        read_only: disk.read_only,
        ..blk::Options::default()
    };
    Ok(Blk::new(backend, presented)?)
}

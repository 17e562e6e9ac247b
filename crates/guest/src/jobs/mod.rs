//! What the guest does, one job a file. A new one, for another device say, is a function like [`blk::run`], a name in
//! [`Job`], and a line in [`run`].

pub mod blk;
pub mod entropy;
pub mod events;
mod load;
pub mod ring;
pub mod tour;
mod verify;

use virtio::RingError;
use virtio::memory::MemoryError;

use crate::disk::{self, DiskError};
use crate::entropy::{self as source, EntropyError};
use crate::machine::smp::SmpError;
use crate::machine::{Machine, MachineError, console, service};
use crate::options::{Job, Options, OptionsError};
use crate::report::Ready;

/// Why a job ended without a result.
#[derive(Clone, Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are the values named in each message")]
pub enum JobError {
    /// The machine is not usable.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The command line is wrong.
    #[error("command line: {0}")]
    Options(#[from] OptionsError),
    /// There are fewer disks.
    #[error("disk {wanted} is asked for, this machine has {have} disks")]
    NoDisk { wanted: usize, have: usize },
    /// A disk does not work.
    #[error("disk {disk}: {source}")]
    Disk { disk: usize, source: DiskError },
    /// The disk did not keep what was written.
    #[error("disk {disk}: sector {sector} is not as it was written, from byte {byte} on")]
    Different { disk: usize, sector: u64, byte: usize },
    /// Requests fail where none may.
    #[error("disk {disk}: {operation} of sector {sector} failed")]
    Failed { disk: usize, operation: &'static str, sector: u64 },
    /// There is no entropy device.
    #[error("this machine has no entropy device")]
    NoEntropy,
    /// The entropy device does not work.
    #[error("entropy: {0}")]
    Entropy(EntropyError),
    /// Processors cannot be used.
    #[error(transparent)]
    Smp(#[from] SmpError),
    /// A ring between processors broke.
    #[error("ring between processors: {0}")]
    Ring(#[from] RingError),
    /// Not mapped.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// It was told to end.
    #[error("it was told to end before it had measured anything")]
    CutShort,
    /// A processor ended without saying how.
    #[error("processor {0} left no result")]
    NoOutcome(usize),
}

/// Reads the command line, says that the machine is ready, and does the job.
///
/// # Errors
/// See [`JobError`].
pub fn run(machine: &Machine) -> Result<(), JobError> {
    let options: Options = machine.command_line.parse()?;
    let disks = disk::find();
    console::print(&Ready { cpus: machine.processors.count(), disks: disks.len() });
    match options.job {
        Job::Blk => blk::run(machine, &disks, &options),
        Job::Rng => entropy::run(machine, &source::find(), &options),
        Job::Tour => tour::run(machine, &disks, &source::find(), &options),
        Job::Ring => ring::run(machine, &options),
        Job::Events => events::run(machine, &disks, &options),
        Job::Fault => service::fault(),
    }
}

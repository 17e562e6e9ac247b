//! A short load on every disk, over rings in every format it has, polled and by interrupt; then on what has entropy.

use virtio::RingFormat;

use super::{JobError, blk, entropy};
use crate::machine::{Machine, service};
use crate::options::Options;
use crate::pci::Function;

/// How long each load runs, in milliseconds.
const MS: u64 = 200;

/// Runs the loads and prints a result for each.
///
/// # Errors
/// See [`JobError`].
pub fn run(
    machine: &Machine,
    disks: &[Function],
    sources: &[Function],
    options: &Options,
) -> Result<(), JobError> {
    for index in 0..disks.len() {
        let disk = blk::open(machine, disks, index)?;
        for format in [RingFormat::Split, RingFormat::Packed].into_iter().filter(|&format| disk.can(format)) {
            for interrupts in [false, true] {
                let options = Options {
                    disk: index,
                    format,
                    interrupts,
                    ms: options.ms.min(MS),
                    jobs: options.jobs.min(disk.queues()),
                    ..options.clone()
                };
                if service::asked_to_end() {
                    return Ok(());
                }
                blk::load(machine, &disk, &options, "tour")?;
            }
        }
    }
    let options = Options { ms: options.ms.min(MS), ..options.clone() };
    sources
        .iter()
        .take_while(|_| !service::asked_to_end())
        .try_for_each(|&source| entropy::one(machine, source, &options, "tour"))
        .map_err(JobError::Entropy)
}

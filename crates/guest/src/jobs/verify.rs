//! Whether a disk keeps what is written to it: a pattern of the seed, in scattered blocks and requests of varying
//! pieces, flushed, and read back.

use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use super::JobError;
use crate::disk::{DiskError, DiskQueue, Operation};
use crate::machine::clock::Clock;
use crate::machine::patience::Patience;
use crate::machine::service::{self, ticks};
use crate::options::{Options, SECTOR_BYTES};
use crate::pattern::{fill, scattered};

/// Bytes for each job, at most.
const BYTES_MAX: u64 = 16 << 20;

/// The pass of one job over a part of the disk that is its own.
pub(super) struct Verify<'a> {
    pub(super) queue: &'a mut DiskQueue,
    pub(super) options: &'a Options,
    /// Of the disk.
    pub(super) blocks: u64,
    pub(super) job: usize,
    pub(super) clock: Clock,
    /// Counts on with each request that comes back: others wait for this job.
    pub(super) pulse: &'a AtomicU64,
}

impl Verify<'_> {
    /// Writes, flushes, reads and compares; returns how many bytes were the same.
    pub(super) fn run(mut self) -> Result<u64, JobError> {
        let share = self.blocks / u64::from(self.options.jobs);
        let first = share * self.job as u64;
        let count = share.min(BYTES_MAX / u64::from(self.options.block_bytes));
        let seed = self.options.seed;
        let order = move || scattered(share, seed).take(count as usize).map(move |block| first + block);
        self.pass(Operation::Write, order())?;
        if self.queue.flushes() {
            self.pass(Operation::Flush, core::iter::once(0))?;
        }
        self.pass(Operation::Read, order())?;
        Ok(count * u64::from(self.options.block_bytes))
    }

    fn pass(&mut self, operation: Operation, mut blocks: impl Iterator<Item = u64>) -> Result<(), JobError> {
        let bytes = self.options.block_bytes as usize;
        let sectors = u64::from(self.options.block_bytes / SECTOR_BYTES);
        let depth = self.queue.depth();
        let (mut given, mut wanted) = (vec![0; bytes], vec![0; bytes]);
        let mut free: Vec<u16> = (0..depth).collect();
        let mut in_flight = vec![0; depth.into()];
        let mut next = blocks.next();
        let mut patience = Patience::with_device(self.clock);
        while next.is_some() || free.len() < depth.into() {
            if service::asked_to_end() {
                return Err(JobError::CutShort);
            }
            let mut any = false;
            while let (Some(block), Some(&request)) = (next, free.last()) {
                let (sector, pieces) = (block * sectors, self.pieces(block));
                if operation == Operation::Write {
                    fill(self.options.seed, sector, &mut wanted);
                    self.queue.write_data(request, pieces, &wanted)?;
                }
                let added = match operation {
                    Operation::Flush => self.queue.add(request, operation, 0),
                    _ => self.queue.add_in_pieces(request, operation, sector, pieces),
                };
                if !added {
                    break;
                }
                free.pop();
                in_flight[usize::from(request)] = block;
                next = blocks.next();
                any = true;
            }
            if any {
                self.queue.publish();
            }
            let Some((request, fine)) = self.queue.reap().map_err(|error| self.of_disk(error))? else {
                self.queue.idle().map_err(|error| self.of_disk(error))?;
                if patience.is_over(ticks()) {
                    return Err(self.of_disk(self.queue.stuck(usize::from(depth) - free.len())));
                }
                continue;
            };
            patience.renew(ticks());
            self.pulse.fetch_add(1, Ordering::Relaxed);
            free.push(request);
            let block = in_flight[usize::from(request)];
            if !fine {
                return Err(self.failed(operation, block * sectors));
            }
            if operation == Operation::Read {
                self.queue.read_data(request, self.pieces(block), &mut given)?;
                fill(self.options.seed, block * sectors, &mut wanted);
                self.compare(block * sectors, &given, &wanted)?;
            }
        }
        Ok(())
    }

    /// Every count of pieces in turn.
    fn pieces(&self, block: u64) -> usize {
        1 + (block % self.queue.pieces_max() as u64) as usize
    }

    fn compare(&self, first: u64, given: &[u8], wanted: &[u8]) -> Result<(), JobError> {
        let Some(at) = given.iter().zip(wanted).position(|(a, b)| a != b) else { return Ok(()) };
        let sector_bytes = SECTOR_BYTES as usize;
        let sector = first + (at / sector_bytes) as u64;
        Err(JobError::Different { disk: self.options.disk, sector, byte: at % sector_bytes })
    }

    fn failed(&self, operation: Operation, sector: u64) -> JobError {
        let operation = match operation {
            Operation::Read => "a read",
            Operation::Write => "a write",
            Operation::Flush => "a flush",
        };
        JobError::Failed { disk: self.options.disk, operation, sector }
    }

    fn of_disk(&self, source: DiskError) -> JobError {
        JobError::Disk { disk: self.options.disk, source }
    }
}

//! Requests on one queue, as many in flight as it has, for some time.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::disk::{DiskError, DiskQueue, Operation};
use crate::histogram::Histogram;
use crate::machine::clock::Clock;
use crate::machine::patience::Patience;
use crate::machine::service::{self, ticks};
use crate::options::{Options, SECTOR_BYTES};
use crate::pattern::Random;

/// Where the next request goes.
pub(super) struct Target {
    first: u64,
    blocks: u64,
    random: Option<Random>,
    next: u64,
}

impl Target {
    /// For job `job` of `options.jobs`: anywhere on a disk of so many blocks, or through a part of its own.
    pub(super) fn new(options: &Options, blocks: u64, job: usize) -> Self {
        let seed = options.seed ^ (job as u64) << 32;
        if options.access.random {
            return Self { first: 0, blocks, random: Some(Random::new(seed)), next: 0 };
        }
        let blocks = blocks / u64::from(options.jobs);
        Self { first: blocks * job as u64, blocks, random: None, next: 0 }
    }

    #[inline(always)]
    fn next(&mut self) -> u64 {
        match &mut self.random {
            Some(random) => random.below(self.blocks),
            None => {
                let block = self.first + self.next;
                self.next = if self.next + 1 == self.blocks { 0 } else { self.next + 1 };
                block
            }
        }
    }
}

/// The load on one queue.
pub(super) struct Load<'a> {
    pub(super) queue: &'a mut DiskQueue,
    clock: Clock,
    operation: Operation,
    target: Target,
    free: Vec<u16>,
    submitted: Box<[u64]>,
    /// Of requests that were done in time, from submission to the burst they came back in.
    pub(super) latency: Histogram,
    /// Requests that came back since the load was made, in time or not.
    pub(super) returned: u64,
    /// Of those, requests that failed.
    pub(super) failed: u64,
}

impl<'a> Load<'a> {
    pub(super) fn new(queue: &'a mut DiskQueue, clock: Clock, options: &Options, target: Target) -> Self {
        let depth = queue.depth();
        Self {
            queue,
            clock,
            operation: if options.access.write { Operation::Write } else { Operation::Read },
            target,
            free: (0..depth).rev().collect(),
            submitted: (0..depth).map(|_| 0).collect(),
            latency: Histogram::default(),
            returned: 0,
            failed: 0,
        }
    }

    /// Keeps all requests in flight until tick `end`, or until the machine is asked to end, then waits for the last of
    /// them, with a `pulse` for those who wait for this job. Returns when it ended.
    pub(super) fn run(&mut self, mut end: u64, pulse: &AtomicU64) -> Result<u64, DiskError> {
        let sectors = u64::from(self.queue.block_bytes() / SECTOR_BYTES);
        let mut patience = Patience::with_device(self.clock);
        let mut now = ticks();
        loop {
            if service::asked_to_end() {
                end = end.min(now);
            }
            if now < end {
                self.submit(sectors, now);
            } else if self.free.len() == self.submitted.len() {
                return Ok(end);
            } else {
                pulse.fetch_add(1, Ordering::Relaxed);
            }
            if self.reap(end)? {
                now = ticks();
                patience.renew(now);
                continue;
            }
            self.queue.idle()?;
            now = ticks();
            if patience.is_over(now) {
                return Err(self.queue.stuck(self.submitted.len() - self.free.len()));
            }
        }
    }

    #[inline(always)]
    fn submit(&mut self, sectors: u64, now: u64) {
        let mut any = false;
        while let Some(&request) = self.free.last() {
            if !self.queue.add(request, self.operation, self.target.next() * sectors) {
                break;
            }
            self.free.pop();
            self.submitted[usize::from(request)] = now;
            any = true;
        }
        if any {
            self.queue.publish();
        }
    }

    /// Takes all that came back; whether there was anything.
    #[inline(always)]
    fn reap(&mut self, end: u64) -> Result<bool, DiskError> {
        let before = self.free.len();
        // First all of them, then how they went: their cache lines travel at the same time.
        while let Some(request) = self.queue.take()? {
            self.free.push(request);
        }
        let done = &self.free[before..];
        if done.is_empty() {
            return Ok(false);
        }
        let now = ticks();
        self.returned += done.len() as u64;
        for &request in done {
            if !self.queue.is_fine(request) {
                self.failed += 1;
            } else if now <= end {
                self.latency.record(now.saturating_sub(self.submitted[usize::from(request)]));
            }
        }
        Ok(true)
    }
}

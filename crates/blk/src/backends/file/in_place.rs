//! Transfers in place, for files that are read and written by one system call after the other.
//!
//! Short transfers are over when they are begun. Of long ones, and of many, each turn does a part.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use virtio::ring::Chains;

use super::hold::Hold;
use super::inline::Inline;
use super::transfer::{Carrier, Ended, Transfer};
use crate::backend::{BackendError, Status};
use crate::backends::stepwise::{CALL_BYTES_MAX, STEP_BYTES_MIN};

/// A transfer that one step was not enough for.
struct Long {
    id: usize,
    transfer: Transfer,
    own: Vec<u8>,
    progress: u64,
}

/// A thread's way to some files, in place.
pub(crate) struct InPlace {
    files: Box<[Inline]>,
    long: VecDeque<Long>,
    /// Bytes that were worked on since the last look for what is over.
    bytes: u64,
    event: Arc<OwnedFd>,
}

impl InPlace {
    /// A way to the files that are held, of each of which `owns` has an open file of the thread's own.
    pub(crate) fn new(holds: Vec<Arc<Hold>>, owns: Vec<OwnedFd>) -> Result<Self, BackendError> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| BackendError(format!("making an eventfd: {error}")))?;
        let files = holds.into_iter().zip(owns).map(|(hold, own)| Inline::new(hold, own)).collect();
        Ok(Self { files, long: VecDeque::new(), bytes: 0, event: Arc::new(event) })
    }

    /// Does a step.
    #[inline(always)]
    fn advance(&mut self, mut long: Long, chains: &Chains, ended: &mut Vec<Ended>) {
        let Long { id, transfer, own, progress } = &mut long;
        let inline = &mut self.files[usize::from(transfer.file)];
        let status = match inline.step(transfer, own, *progress, chains) {
            Ok(now) => {
                self.bytes += (now - *progress).max(STEP_BYTES_MIN);
                *progress = now;
                if now < transfer.len {
                    return self.long.push_back(long);
                }
                Status::Ok
            }
            Err(status) => status,
        };
        ended.push(Ended { id: *id, status, own: std::mem::take(own) });
    }
}

impl Carrier for InPlace {
    #[inline(always)]
    fn start(
        &mut self,
        id: usize,
        transfer: Transfer,
        own: Vec<u8>,
        chains: &Chains,
        ended: &mut Vec<Ended>,
    ) {
        let long = Long { id, transfer, own, progress: 0 };
        if self.bytes < CALL_BYTES_MAX {
            self.advance(long, chains, ended);
        } else {
            self.long.push_back(long);
        }
    }

    fn submit(&mut self) {}

    fn reap(&mut self, chains: &Chains, ended: &mut Vec<Ended>) {
        self.bytes = 0;
        while self.bytes < CALL_BYTES_MAX
            && let Some(long) = self.long.pop_front()
        {
            self.advance(long, chains, ended);
        }
    }

    fn in_flight(&self) -> usize {
        self.long.len()
    }

    fn event(&self) -> &Arc<OwnedFd> {
        &self.event
    }

    fn arm(&mut self) -> bool {
        !self.long.is_empty()
    }

    fn disarm(&mut self) {}

    fn abandons(&mut self) -> bool {
        false
    }
}

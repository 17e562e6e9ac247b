//! A queue's way to a raw file through io_uring: each request is one transfer, numbered by its slot.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use virtio::ring::{Chains, Token};

use super::Opened;
use super::ring::Parts;
use super::transfer::{Carrier, Ended, Transfer};
use super::uring::Uring;
use crate::backend::{BackendError, Channel, Done, Op, OpKind, Status};

/// A queue's way to a raw file.
pub(super) struct Raw {
    uring: Uring,
    tokens: Box<[Option<Token>]>,
}

impl Raw {
    pub(super) fn new(parts: Parts, file: Arc<Opened>, depth: u16) -> Result<Self, BackendError> {
        let uring = Uring::new(parts, &[file], depth.into())?;
        Ok(Self { uring, tokens: (0..depth).map(|_| None).collect() })
    }
}

impl Channel for Raw {
    fn submit(&mut self, ops: &mut Vec<Op>, chains: &Chains, done: &mut Vec<Done>) {
        for op in ops.drain(..) {
            if op.kind == OpKind::SecureErase {
                done.push(Done { token: op.token, status: Status::Unsupported });
                continue;
            }
            let (slot, transfer) = (op.token.slot(), Transfer::of_op(&op));
            self.tokens[slot] = Some(op.token);
            self.uring.begin(slot, transfer, chains);
        }
        self.uring.submit();
        self.reap(chains, done);
    }

    fn reap(&mut self, chains: &Chains, done: &mut Vec<Done>) {
        let tokens = &mut self.tokens;
        self.uring.collect(chains, |Ended { id, status, .. }| {
            done.extend(tokens[id].take().map(|token| Done { token, status }));
        });
    }

    fn in_flight(&self) -> usize {
        self.uring.in_flight()
    }

    fn writes_durably(&self) -> bool {
        true
    }

    fn completion_fd(&self) -> Option<RawFd> {
        Some(self.uring.event().as_raw_fd())
    }

    fn arm(&mut self) -> bool {
        self.uring.arm()
    }

    fn disarm(&mut self) {
        self.uring.disarm();
    }
}

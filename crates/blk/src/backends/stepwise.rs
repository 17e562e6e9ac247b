//! A channel for storage that does its work in place, when it is asked to.
//!
//! Short operations are over when they are submitted. Of long ones, and of many, each turn does a part, so that queues
//! that share the thread do not wait for megabytes to be copied or given back.

use std::collections::VecDeque;

use virtio::ring::Chains;

use crate::backend::{Channel, Done, Op, Status};

/// Bytes that one call works on; the step that crosses the line is still done.
pub(crate) const CALL_BYTES_MAX: u64 = 512 << 10;
/// What a step counts for at least, in bytes.
pub(crate) const STEP_BYTES_MIN: u64 = 4096;

/// Storage that does its work in place.
pub(crate) trait Steps {
    /// Does the next part of `op`, behind the first `progress` bytes, and returns how many are done then: `op.len` if
    /// it is over.
    ///
    /// # Errors
    /// The status to answer with.
    fn step(&mut self, op: &Op, progress: u64, chains: &Chains) -> Result<u64, Status>;

    /// Whether it heeds [`Op::durable`].
    fn writes_durably(&self) -> bool {
        false
    }

    /// What comes after the operation that is about to begin. Nothing needs to be done about it.
    #[inline(always)]
    fn next(&mut self, _op: Option<&Op>) {}
}

/// A channel that works in place.
pub(crate) struct Stepwise<S> {
    steps: S,
    /// Operations that one call was not enough for, and how much of each is done.
    long: VecDeque<(Op, u64)>,
}

impl<S: Steps> Stepwise<S> {
    pub(crate) fn new(steps: S, depth: u16) -> Self {
        Self { steps, long: VecDeque::with_capacity(depth.into()) }
    }

    /// Does a step of `op`, and returns how many bytes it counts for.
    #[inline(always)]
    fn advance(&mut self, op: Op, progress: u64, chains: &Chains, done: &mut Vec<Done>) -> u64 {
        let (bytes, status) = match self.steps.step(&op, progress, chains) {
            Ok(now) if now < op.len => {
                self.long.push_back((op, now));
                return (now - progress).max(STEP_BYTES_MIN);
            }
            Ok(now) => (now - progress, Status::Ok),
            Err(status) => (0, status),
        };
        done.push(Done { token: op.token, status });
        bytes.max(STEP_BYTES_MIN)
    }
}

impl<S: Steps> Channel for Stepwise<S> {
    fn submit(&mut self, ops: &mut Vec<Op>, chains: &Chains, done: &mut Vec<Done>) {
        let (mut ops, mut bytes) = (ops.drain(..), 0);
        while bytes < CALL_BYTES_MAX
            && let Some(op) = ops.next()
        {
            self.steps.next(ops.as_slice().first());
            bytes += self.advance(op, 0, chains, done);
        }
        self.long.extend(ops.map(|op| (op, 0)));
    }

    fn reap(&mut self, chains: &Chains, done: &mut Vec<Done>) {
        let mut bytes = 0;
        while bytes < CALL_BYTES_MAX
            && let Some((op, progress)) = self.long.pop_front()
        {
            bytes += self.advance(op, progress, chains, done);
        }
    }

    fn in_flight(&self) -> usize {
        self.long.len()
    }

    fn writes_durably(&self) -> bool {
        self.steps.writes_durably()
    }

    fn arm(&mut self) -> bool {
        !self.long.is_empty()
    }
}

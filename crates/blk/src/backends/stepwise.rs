//! A channel for storage that does its work in place, when it is asked to.
//!
//! Short operations are over when they are submitted. Of long ones each turn does a part, so that queues that share the
//! thread do not wait for megabytes to be copied.

use std::collections::VecDeque;

use virtio::ring::Chains;

use crate::backend::{Channel, Done, Op, Status};

/// Storage that does its work in place.
pub(crate) trait Steps {
    /// Does the next part of `op`, behind the first `progress` bytes, and returns how many are done then: `op.len` if
    /// it is over.
    ///
    /// # Errors
    /// The status to answer with.
    fn step(&mut self, op: &Op, progress: u64, chains: &Chains) -> Result<u64, Status>;

    /// What comes after the operation that is about to begin. Nothing needs to be done about it.
    #[inline(always)]
    fn next(&mut self, _op: Option<&Op>) {}
}

/// A channel that works in place.
pub(crate) struct Stepwise<S> {
    steps: S,
    /// Operations too long for one go, and how much of each is done.
    long: VecDeque<(Op, u64)>,
}

impl<S: Steps> Stepwise<S> {
    pub(crate) fn new(steps: S, depth: u16) -> Self {
        Self { steps, long: VecDeque::with_capacity(depth.into()) }
    }

    #[inline(always)]
    fn advance(&mut self, op: Op, progress: u64, chains: &Chains, done: &mut Vec<Done>) {
        let status = match self.steps.step(&op, progress, chains) {
            Ok(progress) if progress < op.len => return self.long.push_back((op, progress)),
            Ok(_) => Status::Ok,
            Err(status) => status,
        };
        done.push(Done { token: op.token, status });
    }
}

impl<S: Steps> Channel for Stepwise<S> {
    fn submit(&mut self, ops: &mut Vec<Op>, chains: &Chains, done: &mut Vec<Done>) {
        let mut ops = ops.drain(..);
        while let Some(op) = ops.next() {
            self.steps.next(ops.as_slice().first());
            self.advance(op, 0, chains, done);
        }
    }

    fn reap(&mut self, chains: &Chains, done: &mut Vec<Done>) {
        if let Some((op, progress)) = self.long.pop_front() {
            self.advance(op, progress, chains, done);
        }
    }

    fn in_flight(&self) -> usize {
        self.long.len()
    }

    fn arm(&mut self) -> bool {
        !self.long.is_empty()
    }
}

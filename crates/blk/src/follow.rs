//! Requests that take more than one operation: several ranges to discard, and writes that are to be durable.
//!
//! They are carried out one operation after the other under the same token; the request is over when the last one is,
//! or when one fails.

use virtio::ring::Token;

use crate::backend::{Done, Op, OpKind, Status};
use crate::request::Range;

/// What follows when the operation in flight is done.
#[derive(Default)]
struct Next {
    /// Further ranges, the next one last.
    ranges: Vec<(OpKind, Range)>,
    /// A flush at the end.
    flush: bool,
}

/// The follow-ups of one queue.
pub(crate) struct FollowUps {
    by_slot: Box<[Next]>,
    /// Requests that have some.
    waiting: usize,
}

impl FollowUps {
    /// For a ring of `size` descriptors.
    pub(crate) fn new(size: u16) -> Self {
        Self { by_slot: (0..size).map(|_| Next::default()).collect(), waiting: 0 }
    }

    /// Whether any request has one.
    #[inline(always)]
    pub(crate) fn any(&self) -> bool {
        self.waiting > 0
    }

    /// Notes that a flush follows the operation about to be started.
    pub(crate) fn add_flush(&mut self, token: &Token) {
        self.by_slot[token.slot()].flush = true;
        self.waiting += 1;
    }

    /// Turns a request on `ranges` into its first operation and keeps the rest. Without any it is over.
    pub(crate) fn begin(
        &mut self,
        token: Token,
        ranges: &mut Vec<(OpKind, Range)>,
        flush: bool,
    ) -> Result<Op, Done> {
        if !ranges.is_empty() {
            let next = &mut self.by_slot[token.slot()];
            next.ranges.extend(ranges.drain(..).rev());
            next.flush = flush;
            self.waiting += 1;
        }
        self.after(Done { token, status: Status::Ok })
    }

    /// The operation that follows the one that is done; or the end of the request.
    pub(crate) fn after(&mut self, done: Done) -> Result<Op, Done> {
        let next = &mut self.by_slot[done.token.slot()];
        if next.ranges.is_empty() && !next.flush {
            // Either it never had a follow-up, or this was the last.
            return Err(done);
        }
        if done.status != Status::Ok {
            next.ranges.clear();
            next.flush = false;
            self.waiting -= 1;
            return Err(done);
        }
        let (kind, Range { offset, len }) = match next.ranges.pop() {
            Some(range) => range,
            None => {
                next.flush = false;
                (OpKind::Flush, Range { offset: 0, len: 0 })
            }
        };
        if next.ranges.is_empty() && !next.flush {
            self.waiting -= 1;
        }
        Ok(Op { token: done.token, kind, offset, len })
    }
}

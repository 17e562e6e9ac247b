//! Requests that take more than one operation: several ranges to discard, and writes that are to be durable.
//!
//! Their operations are carried out one after the other under the same token; the request is over when the last one is,
//! or when one fails. What a request still owes stands in its slot, and with a token in a slot that owes something only
//! the next operation can be started: a request that was answered with work left would leave that work to the next
//! request in its slot.

use std::collections::VecDeque;

use virtio::ring::Token;

use crate::backend::{Done, Op, OpKind, Status};
use crate::request::Range;

/// What an operation counts for at least, in bytes: its own cost is that of moving a few kilobytes.
const OP_BYTES_MIN: u64 = 4096;

/// What a request owes beyond the operation in flight.
#[derive(Default)]
struct Owed {
    /// Further ranges, the next one last.
    ranges: Vec<(OpKind, Range)>,
    /// A flush at the end.
    flush: bool,
    /// A write in this slot was begun without one, now or some time ago.
    volatile: bool,
}

impl Owed {
    fn is_nothing(&self) -> bool {
        self.ranges.is_empty() && !self.flush
    }
}

/// The follow-ups of one queue.
pub(crate) struct FollowUps {
    by_slot: Box<[Owed]>,
    /// Requests that owe something.
    owing: usize,
    /// Those of them with no operation in flight, the one that waited longest first.
    due: VecDeque<Token>,
}

impl FollowUps {
    /// For a ring of `size` descriptors.
    pub(crate) fn new(size: u16) -> Self {
        let by_slot = (0..size).map(|_| Owed::default()).collect();
        Self { by_slot, owing: 0, due: VecDeque::with_capacity(size.into()) }
    }

    /// Whether any request owes anything.
    #[inline(always)]
    pub(crate) fn any(&self) -> bool {
        self.owing > 0
    }

    /// Whether an operation could be started.
    #[inline(always)]
    pub(crate) fn is_due(&self) -> bool {
        !self.due.is_empty()
    }

    /// Whether this request owes anything.
    #[inline(always)]
    pub(crate) fn owes(&self, token: &Token) -> bool {
        !self.by_slot[token.slot()].is_nothing()
    }

    /// Notes that a flush follows the operation about to be started.
    pub(crate) fn add_flush(&mut self, token: &Token) {
        self.by_slot[token.slot()].flush = true;
        self.owing += 1;
    }

    /// Notes that the write about to be started needs a flush if writes are to be durable by the time it is done.
    #[inline(always)]
    pub(crate) fn add_volatile(&mut self, token: &Token) {
        self.by_slot[token.slot()].volatile = true;
    }

    /// Notes a request on `ranges`, with a flush behind them or not. Without any it is over.
    pub(crate) fn begin(
        &mut self,
        token: Token,
        ranges: &mut Vec<(OpKind, Range)>,
        flush: bool,
    ) -> Option<Done> {
        if ranges.is_empty() && !flush {
            return Some(Done { token, status: Status::Ok });
        }
        let owed = &mut self.by_slot[token.slot()];
        owed.ranges.extend(ranges.drain(..).rev());
        owed.flush = flush;
        self.owing += 1;
        self.due.push_back(token);
        None
    }

    /// Takes note of an operation that is done; gives it back if that was the end of its request. `durable` says that
    /// no write may be answered without having been flushed.
    pub(crate) fn settle(&mut self, done: Done, durable: bool) -> Option<Done> {
        let owed = &mut self.by_slot[done.token.slot()];
        if durable && std::mem::take(&mut owed.volatile) {
            self.owing += usize::from(owed.is_nothing());
            owed.flush = true;
        }
        if owed.is_nothing() {
            return Some(done);
        }
        if done.status == Status::Ok {
            self.due.push_back(done.token);
            return None;
        }
        owed.ranges.clear();
        owed.flush = false;
        self.owing -= 1;
        Some(done)
    }

    /// Appends operations that are due to `ops`, until `bytes` are used up. False if there is none.
    pub(crate) fn start(&mut self, bytes: &mut u64, ops: &mut Vec<Op>) -> bool {
        while *bytes > 0
            && let Some(token) = self.due.pop_front()
        {
            let owed = &mut self.by_slot[token.slot()];
            let (kind, Range { offset, len }) = owed.ranges.pop().unwrap_or_else(|| {
                owed.flush = false;
                (OpKind::Flush, Range { offset: 0, len: 0 })
            });
            if owed.is_nothing() {
                self.owing -= 1;
            }
            *bytes = bytes.saturating_sub(len.max(OP_BYTES_MIN));
            ops.push(Op { token, kind, offset, len, durable: false });
        }
        !ops.is_empty()
    }
}

//! Serves one queue, on its I/O thread: a burst of chains in, a burst of operations down, a burst of completions out.

use std::os::fd::RawFd;
use std::sync::Arc;

use reactor::{Budget, LogLimit, Poller, Ticks, Work};
use virtio::memory::{scatter, total_len};
use virtio::ring::{Token, Used};
use virtio::{Queue, RingError};

use crate::backend::{Channel, ChannelBuilder, Done, Op, OpKind, Status, Unreachable};
use crate::config::features;
use crate::device::Shared;
use crate::follow::FollowUps;
use crate::rate::LimitBell;
use crate::request::{self, Range, RangeKind, Request};
use crate::stats::{Counters, Stats};

/// Requests taken in one turn. Driver and device work at the same time only if a part of what is outstanding is shown to
/// the driver while the rest is worked on: at 32 outstanding, bursts of 16 take half the latency of bursts of 32. Shorter
/// ones touch the shared cache lines more often than that gains.
const BURST_MAX: u32 = 16;
/// The same where requests were large lately, so that a turn's bytes stay near its budget.
const LARGE_BURST_MAX: u32 = 4;
/// What is large.
const LARGE_BYTES: u64 = 64 << 10;
/// Bytes that operations which follow others may be about in a turn of a queue that is drained.
const DRAIN_BYTES_MAX: u64 = 512 << 10;

/// When writes that are done must be durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Durable {
    /// Once a flush is done, or never because there is no cache.
    AfterFlush,
    /// At once: the driver knows no flush.
    AtOnce,
    /// As the `writeback` field of the configuration space says at the moment.
    AsConfigured,
}

impl Durable {
    /// Section 5.2.6.2 of virtio 1.2: which writes are stable.
    fn new(offered: u64, negotiated: u64) -> Self {
        let has = |set: u64, feature: u64| set & feature != 0;
        if !has(offered, features::FLUSH) {
            Self::AfterFlush
        } else if has(offered & negotiated, features::CONFIG_WCE) {
            Self::AsConfigured
        } else if has(negotiated, features::FLUSH) {
            Self::AfterFlush
        } else {
            Self::AtOnce
        }
    }
}

/// The poller of one request queue.
pub(crate) struct Worker {
    // Before the queue: storage lets go of guest memory before the queue, which keeps it mapped, is gone.
    channel: Box<dyn Channel>,
    queue: Queue,
    shared: Arc<Shared>,
    limit_bell: LimitBell,
    durable: Durable,
    /// Operations given to the channel and not back yet.
    started: usize,
    /// The last burst's requests were large.
    large: bool,
    /// A rate limit was in force in the last turn.
    throttled: bool,
    follow_ups: FollowUps,
    stats: Arc<Stats>,
    /// What the current turn did.
    turn: Counters,
    tokens: Vec<Token>,
    /// For the channel. What is left in it after a turn could not be taken.
    ops: Vec<Op>,
    /// From the channel, and what was over at once.
    done: Vec<Done>,
    /// Empty but within `follow_up`.
    over: Vec<Done>,
    used: Vec<Used>,
    ranges: Vec<(OpKind, Range)>,
}

impl Worker {
    pub(crate) fn new(
        queue: Queue,
        channel: ChannelBuilder,
        shared: Arc<Shared>,
        limit_bell: LimitBell,
        offered: u64,
        stats: Arc<Stats>,
    ) -> Self {
        let size = queue.size();
        let channel = channel().unwrap_or_else(|error| {
            // A guest can start its queues as often as it likes.
            static LIMIT: LogLimit = LogLimit::new();
            if LIMIT.admits() {
                tracing::error!(queue = queue.index(), %error, "storage cannot be reached: every request will fail");
            }
            Box::new(Unreachable)
        });
        let negotiated = queue.features();
        if negotiated & features::CONFIG_WCE != 0 && negotiated & features::FLUSH == 0 {
            shared.default_to_write_through();
        }
        let room = usize::from(size);
        Self {
            channel,
            durable: Durable::new(offered, negotiated),
            started: 0,
            large: false,
            throttled: false,
            follow_ups: FollowUps::new(size),
            stats,
            turn: Counters::default(),
            tokens: Vec::with_capacity(BURST_MAX as usize),
            ops: Vec::with_capacity(room),
            done: Vec::with_capacity(room),
            over: Vec::with_capacity(room),
            used: Vec::with_capacity(room),
            ranges: Vec::with_capacity(request::RANGES_MAX),
            queue,
            shared,
            limit_bell,
        }
    }

    /// How many requests to take now, and when to ask again if a limit says none.
    #[inline(always)]
    fn quota(&mut self, now: Ticks, budget: Budget) -> Result<u32, Ticks> {
        let burst = if self.large { LARGE_BURST_MAX } else { BURST_MAX };
        let quota = budget.requests.min(burst);
        self.throttled = false;
        if self.shared.limiter.is_on() { self.limited_quota(now, quota) } else { Ok(quota) }
    }

    #[cold]
    fn limited_quota(&mut self, now: Ticks, quota: u32) -> Result<u32, Ticks> {
        let admitted = self.shared.limiter.admit(now);
        if admitted.is_err() {
            self.throttled = true;
            // At once: the next answer, with which the turn's figures go, is what the pause holds back.
            self.stats.add(&Counters { throttled: 1, ..Counters::default() });
        }
        admitted.map(|most| quota.min(most))
    }

    /// Whether the driver has switched to write-through. A write that was begun before and is done now is flushed, too:
    /// the flush of the switch did not cover it, and the driver will send none.
    #[inline(always)]
    fn was_switched(&self) -> bool {
        self.durable == Durable::AsConfigured && !self.shared.writeback()
    }

    /// Takes up to `quota` requests from the ring and sorts them into operations and answers. Returns how many.
    #[inline(always)]
    fn take(&mut self, now: Ticks, quota: u32) -> u32 {
        self.queue.pop(quota as usize, &mut self.tokens);
        if self.tokens.is_empty() {
            return 0;
        }
        let disk = self.shared.disk();
        let may_change = self.durable == Durable::AsConfigured;
        let write_through = self.durable == Durable::AtOnce || self.was_switched();
        // The error of a flush is everybody's, that of a durable write its own.
        let durable_writes = write_through && self.channel.writes_durably();
        let Self { queue, tokens, ops, done, turn, follow_ups, ranges, shared, .. } = self;
        let taken = tokens.len() as u32;
        let mut bytes = 0;
        for token in tokens.drain(..) {
            let chain = queue.chain(&token);
            if let Some(last) = chain.writable.last() {
                last.prefetch_last_for_write();
            }
            match request::parse(&chain, &disk) {
                Request::Op { kind, range: Range { offset, len } } => {
                    bytes += len;
                    let mut durable = false;
                    match kind {
                        OpKind::Read => {
                            turn.reads += 1;
                            turn.read_bytes += len;
                        }
                        OpKind::Write => {
                            turn.writes += 1;
                            turn.written_bytes += len;
                            durable = durable_writes;
                            if write_through && !durable {
                                follow_ups.add_flush(&token);
                            } else if may_change && !write_through {
                                follow_ups.add_volatile(&token);
                            }
                        }
                        _ => turn.others += 1,
                    }
                    ops.push(Op { token, kind, offset, len, durable });
                }
                Request::Over(status) => {
                    turn.others += 1;
                    done.push(Done { token, status });
                }
                Request::GetId => {
                    turn.others += 1;
                    let room = total_len(chain.writable).saturating_sub(1).min(request::SERIAL_BYTES as u64);
                    scatter(chain.writable, 0, &shared.serial[..room as usize]);
                    done.push(Done { token, status: Status::Ok });
                }
                Request::Ranges { kind, count } => {
                    turn.others += 1;
                    let flush = write_through && kind == RangeKind::WriteZeroes;
                    if may_change && kind == RangeKind::WriteZeroes {
                        follow_ups.add_volatile(&token);
                    }
                    match request::ranges(kind, count, &chain, &disk, ranges) {
                        Ok(()) => done.extend(follow_ups.begin(token, ranges, flush)),
                        Err(status) => done.push(Done { token, status }),
                    }
                }
            }
        }
        self.large = bytes > LARGE_BYTES * u64::from(taken);
        if shared.limiter.is_on() {
            shared.limiter.charge(now, taken.into(), bytes);
        }
        taken
    }

    /// Offers the channel what waits for it.
    #[inline(always)]
    fn submit(&mut self) {
        if self.ops.is_empty() {
            return;
        }
        let (ops, done) = (self.ops.len(), self.done.len());
        self.channel.submit(&mut self.ops, self.queue.chains(), &mut self.done);
        self.started = self.started + (ops - self.ops.len()) - (self.done.len() - done);
    }

    /// Collects what the channel has done.
    #[inline(always)]
    fn reap(&mut self) {
        if self.started > 0 || self.channel.has_work() {
            let done = self.done.len();
            self.channel.reap(self.queue.chains(), &mut self.done);
            self.started -= self.done.len() - done;
        }
    }

    /// Starts what follows on operations that are done, up to `bytes` but at least one, as long as the channel takes all.
    /// Leaves in `done` what is the end of its request.
    #[cold]
    fn follow_up(&mut self, bytes: u64) {
        let mut bytes = bytes.max(1);
        loop {
            let durable = self.was_switched();
            let Self { done, over, ops, follow_ups, .. } = self;
            over.extend(done.drain(..).filter_map(|done| follow_ups.settle(done, durable)));
            if !ops.is_empty() || !follow_ups.start(&mut bytes, ops) {
                break;
            }
            self.submit();
        }
        std::mem::swap(&mut self.done, &mut self.over);
    }

    /// Answers what is done and shows it to the driver. Returns how many.
    #[inline(always)]
    fn finish(&mut self, bytes: u64) -> u32 {
        if self.follow_ups.any() || (!self.done.is_empty() && self.was_switched()) {
            self.follow_up(bytes);
        }
        if self.done.is_empty() {
            return 0;
        }
        let Self { queue, done, used, turn, follow_ups, .. } = self;
        if follow_ups.any() {
            // The next request in its slot would have to do the rest of this one.
            let owes = done.iter().any(|done| follow_ups.owes(&done.token));
            assert!(!owes, "a request with work left is not answered");
        }
        used.extend(done.drain(..).map(|Done { token, status }| {
            let writable = queue.chain(&token).writable;
            // All of it counts as written, since the status byte is the last.
            let written = u32::try_from(total_len(writable)).unwrap_or(u32::MAX);
            if let Some(last) = writable.last()
                && !last.is_empty()
            {
                last.write(last.len() - 1, &[status as u8]);
            }
            turn.errors += u64::from(status != Status::Ok);
            Used { token, written }
        }));
        let finished = used.len() as u32;
        queue.complete(used.drain(..));
        queue.publish();
        self.stats.add(&std::mem::take(turn));
        finished
    }

    /// Whether a request waits only for a turn of this thread.
    fn waits_for_turn(&self) -> bool {
        if self.ops.is_empty() { self.follow_ups.is_due() } else { self.started == 0 }
    }
}

impl Poller for Worker {
    fn poll(&mut self, now: Ticks, budget: Budget) -> Work {
        let mut work = Work::NONE;
        self.reap();
        self.submit();
        if self.ops.is_empty() {
            match self.quota(now, budget) {
                Ok(quota) => {
                    work.done = self.take(now, quota);
                    work.more = work.done == quota && quota > 0;
                    self.submit();
                }
                Err(later) => work.wake_at = Some(later),
            }
        }
        work.done += self.finish(budget.bytes);
        work.more |= self.follow_ups.is_due() && self.ops.is_empty();
        work
    }

    fn arm(&mut self) -> bool {
        // Under a rate limit the driver's kicks change nothing: the thread wakes when the pause is over. Nor do they while
        // storage takes no more: it wakes when something there is done.
        let held_back = self.throttled || !self.ops.is_empty();
        let requests = !held_back && self.queue.arm();
        let completions = self.channel.arm();
        requests || completions || self.waits_for_turn()
    }

    fn disarm(&mut self) {
        self.queue.disarm();
        self.channel.disarm();
    }

    fn wake_fds(&self) -> Vec<RawFd> {
        let fds = [self.queue.kick_fd(), self.channel.completion_fd(), Some(self.limit_bell.fd())];
        fds.into_iter().flatten().collect()
    }

    fn awaits_completion(&self) -> bool {
        self.started > 0 || self.channel.has_work()
    }

    fn drain(&mut self, _now: Ticks) -> bool {
        self.channel.retire();
        self.reap();
        self.submit();
        self.finish(DRAIN_BYTES_MAX);
        self.queue.in_flight() == 0 && self.channel.in_flight() == 0
    }

    fn abandon(&mut self) -> bool {
        self.queue.break_ring(RingError::Panicked);
        self.channel.reap(self.queue.chains(), &mut self.done);
        // Not answered: what a panic left of their bookkeeping cannot be told.
        self.done.clear();
        self.channel.in_flight() == 0
    }
}

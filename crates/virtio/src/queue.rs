//! A virtqueue as a device sees it: chains out, completions in.
//!
//! A [`Queue`] belongs to the I/O thread that serves it. It takes chains from the ring in bursts, hands out their
//! buffers, and publishes completions with one store and at most one call per burst. Its other half, the
//! [`QueueHandle`], stays with the transport: it replaces the call while the queue runs, and tells where the ring
//! stands once the queue is gone.
//!
//! A broken ring breaks the queue: it takes no more chains, says why once (handle, the transport's hook), and
//! goes on completing what is in flight. So does a driver that makes a call block.

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::call::Call;
use crate::inflight::Inflight;
use crate::kick::Kick;
use crate::memory::{DirtyLog, Memory};
use crate::ring::{Chain, Chains, DeviceRing, RingConfig, RingError, RingState, Token, Used};
use crate::ring_log::{RingLog, UsedLog};
use crate::stats::{QueueCounters, QueueStats};

/// How often chains are asked for, in vain or not, between two looks at the doorbell: some 10 µs of an idle loop, which
/// makes the look's system call less than a tenth of it.
const POPS_PER_LOOK: u32 = 256;

/// Called when a ring turns out to be broken.
pub type ErrorHook = Box<dyn FnOnce(&RingError) + Send>;

/// All it takes to start a queue.
pub struct QueueConfig {
    /// Which queue of the device this is.
    pub index: u16,
    /// The features that were negotiated, all of them.
    pub features: u64,
    /// The ring.
    pub ring: RingConfig,
    /// Where it stands; None as for [`DeviceRing::new`].
    pub state: Option<RingState>,
    /// The guest's memory.
    pub memory: Arc<Memory>,
    /// How the driver kicks.
    pub kick: Kick,
    /// How completions are announced; None if nobody listens.
    pub call: Option<Arc<dyn Call>>,
    /// The dirty log, while a migration runs.
    pub log: Option<UsedLog>,
    /// The record of requests in flight, if the front end keeps one.
    pub inflight: Option<Inflight>,
    /// Called once, on the I/O thread, if the ring turns out to be broken.
    pub on_error: Option<ErrorHook>,
}

/// What the two halves share.
#[derive(Default)]
struct Shared {
    /// Counts the changes of `call`.
    generation: AtomicU32,
    call: Mutex<Option<Arc<dyn Call>>>,
    stopped_at: OnceLock<RingState>,
    error: OnceLock<RingError>,
    stats: QueueStats,
}

/// The transport's half of a queue.
#[derive(Clone)]
pub struct QueueHandle(Arc<Shared>);

impl QueueHandle {
    /// Replaces the way completions are announced, from the next one on.
    pub fn set_call(&self, call: Option<Arc<dyn Call>>) {
        *self.0.call.lock().unwrap_or_else(PoisonError::into_inner) = call;
        self.0.generation.fetch_add(1, Ordering::Release);
    }

    /// Where the ring stands, once the queue has been dropped.
    #[must_use]
    pub fn stopped_at(&self) -> Option<RingState> {
        self.0.stopped_at.get().copied()
    }

    /// What broke the ring, if something did.
    #[must_use]
    pub fn error(&self) -> Option<RingError> {
        self.0.error.get().copied()
    }

    /// The queue's counters.
    #[must_use]
    pub fn counters(&self) -> QueueCounters {
        self.0.stats.read()
    }
}

/// The device's half of a queue.
pub struct Queue {
    index: u16,
    features: u64,
    size: u16,
    ring: DeviceRing,
    chains: Chains,
    kick: Kick,
    pops: u32,
    call: Option<Arc<dyn Call>>,
    generation: u32,
    shared: Arc<Shared>,
    log: Option<DirtyLog>,
    ring_log: Option<RingLog>,
    inflight: Option<Inflight>,
    in_order: Option<InOrder>,
    on_error: Option<ErrorHook>,
    poison_seen: usize,
    broken: bool,
}

impl Queue {
    /// Opens the queue described by `config`. With an inflight record of a service that died, the requests it had in
    /// flight come first.
    ///
    /// # Errors
    /// The ring is not where `config` says, or cannot be in the state it says.
    pub fn new(config: QueueConfig) -> Result<(Self, QueueHandle), RingError> {
        let QueueConfig { index, features, ring, mut state, memory, kick, call, log, mut inflight, on_error } =
            config;
        let poison_seen = Memory::poisonings();
        let ring_log = log.as_ref().and_then(|log| RingLog::new(log, ring));
        if let Some(record) = &mut inflight {
            let found = record.recover(&DeviceRing::new(&ring, &memory, None)?, state)?;
            if let Some(log) = &ring_log {
                log.recovered(&found);
            }
            state = Some(found);
        }
        let shared = Arc::new(Shared { call: Mutex::new(call.clone()), ..Shared::default() });
        let queue = Self {
            index,
            features,
            size: ring.size,
            chains: Chains::new(&ring, memory.clone()),
            ring: DeviceRing::new(&ring, &memory, state)?,
            kick,
            pops: 0,
            call,
            generation: 0,
            shared: shared.clone(),
            log: log.map(|log| log.log),
            ring_log,
            inflight,
            in_order: ring.in_order.then(|| InOrder::new(ring.size)),
            on_error,
            poison_seen,
            broken: false,
        };
        Ok((queue, QueueHandle(shared)))
    }

    /// Puts something between this queue and its driver, for tests that lose calls.
    #[cfg(feature = "fake")]
    pub fn wrap_call(&mut self, wrap: impl FnOnce(Arc<dyn Call>) -> Arc<dyn Call>) {
        self.call = self.call.take().map(wrap);
    }

    /// Which queue of the device this is.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// The features that were negotiated.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Descriptors in the ring; no more chains than this are ever in flight, and tokens' slots are below it.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The guest's memory.
    #[must_use]
    pub fn memory(&self) -> &Arc<Memory> {
        self.chains.memory()
    }

    /// The chains in flight.
    #[inline(always)]
    #[must_use]
    pub fn chains(&self) -> &Chains {
        &self.chains
    }

    /// The buffers of a chain.
    #[inline(always)]
    #[must_use]
    pub fn chain(&self, token: &Token) -> Chain<'_> {
        self.chains.get(token)
    }

    /// Chains taken and not yet completed.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.chains.in_flight()
    }

    /// Whether the ring turned out to be broken.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// The descriptor that becomes readable when the driver kicks.
    #[must_use]
    pub fn kick_fd(&self) -> Option<RawFd> {
        self.kick.fd()
    }

    /// Takes up to `max` chains and appends their tokens to `out`. A broken queue has none.
    #[inline(always)]
    pub fn pop(&mut self, max: usize, out: &mut Vec<Token>) {
        self.pops = self.pops.wrapping_add(1);
        if self.pops.is_multiple_of(POPS_PER_LOOK) {
            self.kick.awake();
        }
        if self.inflight.is_some() {
            return self.pop_recorded(max, out);
        }
        if self.broken {
            return;
        }
        let before = out.len();
        let result = self.ring.pop(max, &mut self.chains, out);
        self.taken(&out[before..], result);
    }

    /// Takes chains and keeps the record of requests in flight.
    fn pop_recorded(&mut self, max: usize, out: &mut Vec<Token>) {
        // The record tells what was published from what was taken by the order of both.
        self.publish();
        let Some(record) = &mut self.inflight else { return };
        let before = out.len();
        let result = if record.resubmissions() > 0 {
            record.resubmit(&self.ring, max, &mut self.chains, out)
        } else if self.broken {
            return;
        } else {
            record.pop(&mut self.ring, max, &mut self.chains, out)
        };
        self.taken(&out[before..], result);
    }

    /// What is due after chains were taken.
    #[inline(always)]
    fn taken(&mut self, taken: &[Token], result: Result<(), RingError>) {
        if !taken.is_empty() {
            self.shared.stats.count_burst(taken.len() as u64);
            if self.ring.suppression_ends() {
                self.suppress_kicks();
            }
            if let Some(order) = &mut self.in_order {
                order.taken(taken);
            }
            let poisonings = Memory::poisonings();
            if poisonings != self.poison_seen {
                self.look_for_poison(poisonings);
            }
        }
        if let Err(error) = result {
            self.break_ring(error);
        }
    }

    /// Gives chains back. The driver sees them after [`Queue::publish`].
    #[inline(always)]
    pub fn complete(&mut self, burst: impl Iterator<Item = Used>) {
        if self.in_order.is_some() || self.log.is_some() {
            return self.complete_with_care(burst);
        }
        self.ring.push_used(&mut self.chains, burst);
    }

    /// Completion with one of the rarer duties.
    fn complete_with_care(&mut self, burst: impl Iterator<Item = Used>) {
        for used in burst {
            let ready = match &mut self.in_order {
                Some(order) => order.done(used),
                None => Some(used),
            };
            let mut next = ready;
            while let Some(used) = next.take() {
                if let Some(log) = &self.log {
                    for segment in self.chains.get(&used.token).writable {
                        log.mark_segment(self.chains.memory(), segment);
                    }
                }
                let at = self.ring.state().used;
                self.ring.push_used(&mut self.chains, std::iter::once(used));
                if let Some(log) = &mut self.ring_log {
                    log.used(at);
                }
                next = self.in_order.as_mut().and_then(InOrder::next_ready);
            }
        }
    }

    /// Shows the driver what was completed, and calls it if it waits for that. Does nothing if nothing is new.
    #[inline(always)]
    pub fn publish(&mut self) {
        let published = match &mut self.inflight {
            None => self.ring.publish(),
            Some(record) => record.publish(&mut self.ring, &self.chains),
        };
        if !published {
            return;
        }
        if let Some(log) = &mut self.ring_log {
            log.published();
        }
        if self.shared.generation.load(Ordering::Relaxed) != self.generation {
            self.refresh_call();
        }
        let Some(call) = &self.call else {
            return self.ring.skip_call();
        };
        let wanted = self.ring.needs_call();
        let hostile = wanted && !call.call() && call.is_hostile();
        self.shared.stats.count_call(wanted);
        if hostile {
            self.break_ring(RingError::CallBlocked);
        }
    }

    /// Asks for kicks; true if chains are waiting already.
    pub fn arm(&mut self) -> bool {
        self.shared.stats.count_arm();
        // The doorbell first: whatever was written before it listens is in the ring when that is looked at.
        let rang = self.kick.listen();
        if self.is_broken() {
            return false;
        }
        let waiting = self.ring.arm();
        if let Some(log) = &self.ring_log {
            log.armed();
        }
        waiting || rang
    }

    /// Asks for no kicks. One may still come.
    pub fn disarm(&mut self) {
        self.suppress_kicks();
        self.kick.awake();
    }

    fn suppress_kicks(&mut self) {
        self.ring.disarm();
        if let Some(log) = &self.ring_log {
            log.disarmed();
        }
    }

    /// Stops taking chains for good: the ring, or what the device found in it, cannot be trusted.
    #[cold]
    pub fn break_ring(&mut self, error: RingError) {
        self.broken = true;
        if self.shared.error.set(error).is_ok()
            && let Some(hook) = self.on_error.take()
        {
            hook(&error);
        }
    }

    /// Some memory of this process was taken away, `poisonings` times so far.
    #[cold]
    fn look_for_poison(&mut self, poisonings: usize) {
        // The mapping was marked before the number was raised.
        fence(Ordering::Acquire);
        self.poison_seen = poisonings;
        if self.memory().is_poisoned() {
            self.break_ring(RingError::MemoryGone);
        }
    }

    #[cold]
    fn refresh_call(&mut self) {
        self.generation = self.shared.generation.load(Ordering::Acquire);
        self.call = self.shared.call.lock().unwrap_or_else(PoisonError::into_inner).clone();
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        let _ = self.shared.stopped_at.set(self.ring.state());
    }
}

/// Holds completions back until all earlier ones are done (`VIRTIO_F_IN_ORDER`).
struct InOrder {
    /// Slots in the order in which their chains were taken.
    order: VecDeque<usize>,
    /// By slot: the completion that waits.
    done: Box<[Option<Used>]>,
}

impl InOrder {
    fn new(size: u16) -> Self {
        Self { order: VecDeque::with_capacity(size.into()), done: (0..size).map(|_| None).collect() }
    }

    fn taken(&mut self, tokens: &[Token]) {
        self.order.extend(tokens.iter().map(Token::slot));
    }

    fn done(&mut self, used: Used) -> Option<Used> {
        let slot = used.token.slot();
        self.done[slot] = Some(used);
        self.next_ready()
    }

    fn next_ready(&mut self) -> Option<Used> {
        let used = self.done[*self.order.front()?].take()?;
        self.order.pop_front();
        Some(used)
    }
}

//! virtio-rng (virtio 1.2, section 5.4): the guest's driver offers buffers, the device fills them with the host's
//! entropy.
//!
//! The device without a backend, a configuration space or features of its own: whoever wants to write a device can
//! begin with a copy of this one.

#![warn(missing_docs)]

mod entropy;

use std::num::NonZeroU64;
use std::os::fd::RawFd;
use std::sync::Arc;

use reactor::{Budget, Poller, RateAccount, Ticks, Work};
use virtio::memory::{scatter, total_len};
use virtio::ring::Used;
use virtio::{Device, NotReady, PollerBuilder, Queue};

use crate::entropy::Entropy;

/// Entropy device (virtio 1.2, section 5.4.1).
const DEVICE_ID: u32 = 4;
/// The most bytes one request gets; its driver asks again for more.
pub const BYTES_PER_REQUEST_MAX: u64 = 4096;
/// The most bytes a turn hands out: the host's generator takes about 150 µs for them, and the thread may have other
/// queues.
pub const BYTES_PER_TURN_MAX: u64 = 64 << 10;
/// A limited queue rests until it has so many bytes to give: fewer are not worth a wake-up.
const BYTES_PER_GRANT_MIN: u64 = 64;
/// What a limited device may give at once, in milliseconds at its rate.
const BURST_MS: u32 = 100;
/// How long to wait before asking a host again that has no entropy yet, which ends for good during its boot.
const RETRY_NS: u64 = 10_000_000;

/// The device. It has one queue.
#[derive(Debug)]
pub struct Rng {
    /// What may be given, in bytes. It outlives the queue, so restarting that buys nothing.
    account: Arc<RateAccount>,
}

impl Rng {
    /// A device that hands out as many bytes per second, or as fast as the host makes them.
    #[must_use]
    pub fn new(bytes_per_s: Option<NonZeroU64>) -> Self {
        Self { account: Arc::new(RateAccount::new(bytes_per_s, BURST_MS)) }
    }
}

impl Device for Rng {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> u16 {
        1
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn start_queue(&self, queue: Queue) -> Result<PollerBuilder, NotReady> {
        let account = self.account.clone();
        Ok(Box::new(move || {
            let entropy = Entropy::of_host();
            Box::new(Worker { queue, tokens: Vec::new(), entropy, account, rest: None })
        }))
    }
}

/// Serves the queue. Between two polls it holds no chain: what cannot be filled now stays in the ring.
struct Worker {
    queue: Queue,
    tokens: Vec<virtio::ring::Token>,
    entropy: Entropy,
    account: Arc<RateAccount>,
    /// Until when there is nothing to give.
    rest: Option<Ticks>,
}

impl Worker {
    /// How many bytes may be given now, or when to ask again.
    fn grant(&mut self, now: Ticks) -> Result<u64, Ticks> {
        let most = self.account.admit(now, BYTES_PER_GRANT_MIN)?;
        if !self.entropy.refill() {
            return Err(now.plus_ns(RETRY_NS));
        }
        Ok(most.min(BYTES_PER_REQUEST_MAX))
    }

    /// Fills the next chain with at most `most` bytes. None if there is no chain.
    fn fill_one(&mut self, now: Ticks, most: u64) -> Option<u64> {
        self.queue.pop(1, &mut self.tokens);
        let token = self.tokens.pop()?;
        let writable = self.queue.chain(&token).writable;
        let wanted = total_len(writable).min(most);
        let written = self.entropy.take(wanted, |bytes| scatter(writable, 0, bytes));
        self.queue.complete(std::iter::once(Used { token, written: written as u32 }));
        self.account.charge(now, written as u64);
        Some(written as u64)
    }
}

impl Poller for Worker {
    fn poll(&mut self, now: Ticks, budget: Budget) -> Work {
        let mut work = Work::NONE;
        let mut bytes_left = budget.bytes.min(BYTES_PER_TURN_MAX);
        self.rest = None;
        loop {
            if work.done >= budget.requests || bytes_left == 0 {
                work.more = true;
                break;
            }
            let most = match self.grant(now) {
                Ok(most) => most,
                Err(at) => {
                    self.rest = Some(at);
                    break;
                }
            };
            let Some(written) = self.fill_one(now, most) else { break };
            bytes_left = bytes_left.saturating_sub(written);
            work.done += 1;
        }
        self.queue.publish();
        work.wake_at = self.rest;
        work
    }

    fn arm(&mut self) -> bool {
        // A kick could not be answered while the queue rests.
        self.rest.is_none() && self.queue.arm()
    }

    fn disarm(&mut self) {
        self.queue.disarm();
    }

    fn wake_fds(&self) -> Vec<RawFd> {
        self.queue.kick_fd().into_iter().collect()
    }

    fn awaits_completion(&self) -> bool {
        false
    }

    fn drain(&mut self, _now: Ticks) -> bool {
        true
    }

    fn abandon(&mut self) -> bool {
        self.queue.break_ring(virtio::RingError::Panicked);
        true
    }
}

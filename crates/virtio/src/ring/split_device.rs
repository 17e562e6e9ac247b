//! The device end of a split ring (virtio 1.2, section 2.7).

use alloc::vec::Vec;
use core::sync::atomic::{Ordering, fence};

use crate::memory::{Area, Memory};

use super::chain::{
    CHAINS_PER_BURST_MAX, ChainBuilder, Chains, DESCRIPTORS_PER_CHAIN_MAX, Token, Used, Walk,
};
use super::descriptor::{Descriptor, NEXT};
use super::layout::{DESC_BYTES, Descriptors, avail_bytes, used_bytes};
use super::{RING_SIZE_MAX, RingConfig, RingError, RingState, need_event};

/// Available ring flag: the driver does not want calls.
const NO_INTERRUPT: u16 = 1;
/// Used ring flag: the device does not want kicks.
const NO_NOTIFY: u16 = 1;
/// With EVENT_IDX kicks are suppressed by asking for one this far ahead; renewed every quarter of the index range.
const FAR_AHEAD: u16 = 0x8000;
const RENEW_AFTER: u16 = 0x4000;

/// The device end of a split ring. All indices are free-running.
pub struct SplitDevice {
    size: u16,
    desc: Area,
    avail: Area,
    used: Area,
    event_idx: bool,
    /// The next available entry to take.
    avail_next: u16,
    /// The driver's index when last read.
    avail_seen: u16,
    /// The next used entry to write, and the one before which all are published.
    used_next: u16,
    used_published: u16,
    /// Where kicks were last suppressed; None while they are wanted.
    suppressed_at: Option<u16>,
}

impl SplitDevice {
    /// Opens the ring described by `config` at `state`; None takes both positions from the used ring, which is where
    /// a ring stands that has nothing in flight.
    ///
    /// # Errors
    /// The size is not a power of two up to 32768, or an area is unaligned or not in `memory`.
    pub fn new(config: &RingConfig, memory: &Memory, state: Option<RingState>) -> Result<Self, RingError> {
        let size = config.size;
        if !size.is_power_of_two() || size > RING_SIZE_MAX {
            return Err(RingError::BadSize(size));
        }
        let used = memory.area(config.device, used_bytes(size), 4)?;
        let state = state.unwrap_or_else(|| {
            let used = used.u16(2).load(Ordering::Acquire);
            RingState { avail: used, used, ..RingState::NEW }
        });
        Ok(Self {
            size,
            desc: memory.area(config.desc, usize::from(size) * DESC_BYTES, DESC_BYTES)?,
            avail: memory.area(config.driver, avail_bytes(size), 2)?,
            used,
            event_idx: config.event_idx,
            avail_next: state.avail,
            avail_seen: state.avail,
            used_next: state.used,
            used_published: state.used,
            suppressed_at: None,
        })
    }

    /// Where the ring stands.
    #[must_use]
    pub fn state(&self) -> RingState {
        RingState { avail: self.avail_next, used: self.used_next, ..RingState::NEW }
    }

    /// The used index as the driver sees it.
    #[must_use]
    pub fn used_index_in_memory(&self) -> u16 {
        self.used.u16(2).load(Ordering::Acquire)
    }

    /// Takes up to `max` chains; their tokens are appended to `out`.
    ///
    /// # Errors
    /// The ring is broken. Chains taken before the fault are in `out` and can be completed.
    // A function of its own: inlined, it would share the registers with all the device does.
    #[inline(never)]
    pub fn pop(&mut self, max: usize, chains: &mut Chains, out: &mut Vec<Token>) -> Result<(), RingError> {
        let waiting = self.waiting()?;
        if waiting == 0 {
            return Ok(());
        }
        let count = usize::from(waiting).min(max).min(CHAINS_PER_BURST_MAX);
        let mut heads = [0; CHAINS_PER_BURST_MAX];
        let heads = &mut heads[..count];
        let size = self.size;
        let (avail, desc) = (self.avail.entries::<2, 2>(4, size), self.desc.entries(0, size));
        // All descriptors are asked for before the first is needed, so that their cache misses overlap.
        for (i, head) in heads.iter_mut().enumerate() {
            let entry = self.avail_next.wrapping_add(i as u16) & (size - 1);
            *head = avail.u16(entry, 0).load(Ordering::Relaxed);
            desc.prefetch(*head);
        }
        for &head in &*heads {
            let token = take(desc, size, head, chains)?;
            out.push(token);
            self.avail_next = self.avail_next.wrapping_add(1);
        }
        Ok(())
    }

    /// Reads the chain at `head`, whether or not the available ring names it.
    ///
    /// # Errors
    /// The chain is malformed.
    pub fn take(&self, head: u16, chains: &mut Chains) -> Result<Token, RingError> {
        take(self.desc.entries(0, self.size), self.size, head, chains)
    }

    /// Gives chains back. The driver sees them after [`SplitDevice::publish`].
    #[inline(always)]
    pub(crate) fn push_used(&mut self, chains: &mut Chains, burst: impl Iterator<Item = Used>) {
        let (used, mask) = (self.used.entries::<8, 4>(4, self.size), self.size - 1);
        let mut next = self.used_next;
        for Used { token, written } in burst {
            let (id, _) = chains.release(token);
            used.u32(next & mask, 0).store(id.into(), Ordering::Relaxed);
            used.u32(next & mask, 4).store(written, Ordering::Relaxed);
            next = next.wrapping_add(1);
        }
        self.used_next = next;
    }

    /// Shows the driver all used entries, by one store; false if there was none.
    #[inline(always)]
    pub fn publish(&mut self) -> bool {
        if self.used_next == self.used_published {
            return false;
        }
        self.used.u16(2).store(self.used_next, Ordering::Release);
        true
    }

    /// Whether the driver wants a call for what was published since the last time this was asked.
    #[inline(always)]
    pub fn needs_call(&mut self) -> bool {
        let old = core::mem::replace(&mut self.used_published, self.used_next);
        // Our index must be visible before we read what the driver waits for; it does the reverse (2.7.7.2).
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.avail.u16(4 + 2 * usize::from(self.size)).load(Ordering::Relaxed);
            return need_event(event, self.used_next, old);
        }
        self.avail.u16(0).load(Ordering::Relaxed) & NO_INTERRUPT == 0
    }

    /// Counts what was published as announced, where nobody listens for calls.
    #[inline(always)]
    pub fn skip_call(&mut self) {
        self.used_published = self.used_next;
    }

    /// Asks for kicks; true if chains are waiting already.
    pub fn arm(&mut self) -> bool {
        self.suppressed_at = None;
        if self.event_idx {
            self.avail_event().store(self.avail_next, Ordering::Relaxed);
        }
        self.used.u16(0).store(0, Ordering::Relaxed);
        // The request must be visible before we look once more; the driver does the reverse (2.7.10).
        fence(Ordering::SeqCst);
        self.avail.u16(2).load(Ordering::Relaxed) != self.avail_next
    }

    /// Asks for no kicks. One may still come.
    pub fn disarm(&mut self) {
        self.suppressed_at = Some(self.avail_next);
        if self.event_idx {
            self.avail_event().store(self.avail_next.wrapping_add(FAR_AHEAD), Ordering::Relaxed);
        } else {
            self.used.u16(0).store(NO_NOTIFY, Ordering::Relaxed);
        }
    }

    /// Whether the suppression of kicks, which reaches only so far ahead, is to be renewed by another
    /// [`SplitDevice::disarm`].
    #[inline(always)]
    #[must_use]
    pub fn suppression_ends(&self) -> bool {
        self.suppressed_at.is_some_and(|at| self.avail_next.wrapping_sub(at) >= RENEW_AFTER)
    }

    fn avail_event(&self) -> &core::sync::atomic::AtomicU16 {
        self.used.u16(4 + 8 * usize::from(self.size))
    }

    #[inline(always)]
    fn waiting(&mut self) -> Result<u16, RingError> {
        if self.avail_seen == self.avail_next {
            let (from, to) = (self.avail_next, self.avail.u16(2).load(Ordering::Acquire));
            if to.wrapping_sub(from) > self.size {
                return Err(RingError::AvailJump { from, to, size: self.size });
            }
            self.avail_seen = to;
        }
        Ok(self.avail_seen.wrapping_sub(self.avail_next))
    }
}

/// The way along a chain: from `head` on by the descriptors' `next`.
struct SplitWalk<'a> {
    desc: Descriptors<'a>,
    size: u16,
    head: u16,
}

impl Walk for SplitWalk<'_> {
    #[inline(always)]
    fn walk(self, chain: &mut ChainBuilder<'_>) -> Result<(), RingError> {
        let Self { desc, size, head } = self;
        let limit = u32::from(size).min(DESCRIPTORS_PER_CHAIN_MAX);
        let mut index = head;
        for before in 0..limit {
            let descriptor = Descriptor::load(desc, index);
            let flags = descriptor.third;
            chain.push(descriptor, flags, false, before)?;
            if flags & NEXT == 0 {
                return Ok(());
            }
            index = descriptor.fourth;
            if index >= size {
                return Err(RingError::BadNext { head, next: index, size: size.into() });
            }
        }
        Err(RingError::ChainTooLong { head, limit })
    }
}

#[inline(always)]
fn take(desc: Descriptors<'_>, size: u16, head: u16, chains: &mut Chains) -> Result<Token, RingError> {
    if head >= size {
        return Err(RingError::BadHead { head, size });
    }
    chains.take(head, SplitWalk { desc, size, head })
}

//! Doorbells: how a guest's write to a queue's notification page reaches the I/O thread, and how it comes to cost
//! nothing while that thread is awake.
//!
//! A write to the page is an exit, which KVM turns into an event without leaving the kernel (ioeventfd). A driver that
//! honours the ring's suppression of kicks seldom makes one. One that does not pays an exit for every burst, though
//! nobody needs it. So while the thread polls, the page may become **ordinary shared memory** (a memory slot of KVM),
//! where a write is just a write (Wei & Lee's doorbell mapping). Before the thread sleeps the slot goes away, and writes
//! trap again.
//!
//! No kick is lost in between. When KVM has removed a slot, no virtual CPU has a translation of it any more: a write has
//! either landed in the page, or it traps. The page holds a value that is no notification, so what landed there is
//! seen; and the queue looks at its ring after that.
//!
//! Adding and removing a slot waits for every virtual CPU: some 10 to 100 µs, and milliseconds where the host is busy.
//! Afterwards the guest faults the page in anew, and all of its memory where KVM forgets every slot for one. [`policy`]
//! counts both, and decides when that is worth it.

pub mod policy;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::str::FromStr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use reactor::{Clock, LogLimit, Ticks};
use virtio::GuestAddr;
use virtio::memory::{Area, Backing};
use vmm_sys_util::eventfd::EventFd;

use self::policy::{Budget, Cost, worth_mapping};
use crate::memory;
use crate::pci::Bell;
use crate::raw::{self, Slot};

/// What lies in a mapped page until the guest writes: no queue has this index.
const NOT_RUNG: u32 = u32::MAX;

/// When a queue's notification page is mapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DoorbellMode {
    /// Never: every write traps.
    Trap,
    /// While the I/O thread is awake, once the driver has made as many exits that nobody needed as mapping is worth.
    #[default]
    Adaptive,
    /// Whenever the I/O thread is awake, as far as changes take no more than a small share of the time.
    Map,
}

/// A way of mapping doorbells that does not exist.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("doorbell mode `{0}` is none of `trap`, `adaptive`, `map`")]
pub struct DoorbellModeError(String);

impl fmt::Display for DoorbellMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Trap => "trap",
            Self::Adaptive => "adaptive",
            Self::Map => "map",
        })
    }
}

impl FromStr for DoorbellMode {
    type Err = DoorbellModeError;

    fn from_str(text: &str) -> Result<Self, DoorbellModeError> {
        match text {
            "trap" => Ok(Self::Trap),
            "adaptive" => Ok(Self::Adaptive),
            "map" => Ok(Self::Map),
            other => Err(DoorbellModeError(other.to_owned())),
        }
    }
}

/// How many page faults of the guest's KVM has handled so far.
pub(crate) type PageFaults = Arc<dyn Fn() -> u64 + Send + Sync>;

/// What a doorbell counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DoorbellCounters {
    /// Writes that trapped, as of the thread's last look.
    pub kicks: u64,
    /// Times the page was mapped.
    pub maps: u64,
    /// Of those, times the guest had written when it was unmapped.
    pub rung_while_mapped: u64,
    /// Page faults of the guest's from one time to the next that it was mapped.
    pub faults: u64,
}

/// The doorbell of one queue. It rings nowhere until it is placed.
pub struct Doorbell {
    vm: Arc<VmFd>,
    mode: DoorbellMode,
    /// The event that a trapped write signals, in both the types that are needed.
    event: EventFd,
    fd: OwnedFd,
    page: Arc<dyn Backing>,
    /// The word of it that the guest writes.
    word: Area,
    state: Mutex<State>,
    kicks: AtomicU64,
    maps: AtomicU64,
    rung_while_mapped: AtomicU64,
    fault_count: AtomicU64,
    faults: PageFaults,
}

struct State {
    /// Where the page is, if it is anywhere.
    at: Option<GuestAddr>,
    slot: Slot,
    /// Writes that trapped since the thread last slept.
    kicks: u64,
    /// KVM would not map it where it is.
    refused: bool,
    /// How long mapping it took, the last time.
    map_ns: u64,
    /// How many page faults there had been then.
    faults: Option<u64>,
    cost: Cost,
    budget: Budget,
}

impl Doorbell {
    /// A doorbell whose event is `fd`, an eventfd that does not block.
    pub(crate) fn new(
        vm: Arc<VmFd>,
        slot: Slot,
        mode: DoorbellMode,
        faults: PageFaults,
        fd: OwnedFd,
    ) -> io::Result<Self> {
        let event = raw::event_fd(fd.as_fd())?;
        let page = memory::page("doorbell").map_err(io::Error::other)?;
        let word = Area::new(page.clone(), 0, size_of::<u32>(), align_of::<AtomicU32>())
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
        let state = Mutex::new(State {
            at: None,
            slot,
            kicks: 0,
            refused: false,
            map_ns: 0,
            faults: None,
            cost: Cost::default(),
            budget: Budget::new(Clock::get().now()),
        });
        let (kicks, maps, rung_while_mapped, fault_count) = Default::default();
        Ok(Self {
            vm,
            mode,
            event,
            fd,
            page,
            word,
            state,
            kicks,
            maps,
            rung_while_mapped,
            fault_count,
            faults,
        })
    }

    /// What it counted.
    #[must_use]
    pub fn counters(&self) -> DoorbellCounters {
        DoorbellCounters {
            kicks: self.kicks.load(Ordering::Relaxed),
            maps: self.maps.load(Ordering::Relaxed),
            rung_while_mapped: self.rung_while_mapped.load(Ordering::Relaxed),
            faults: self.fault_count.load(Ordering::Relaxed),
        }
    }

    /// Maps it, if it is worth that.
    fn map(&self, state: &mut State) {
        let Some(addr) = state.at else { return };
        if state.refused || !state.slot.is_empty() || !state.is_worth_mapping(self.mode) {
            return;
        }
        let began = Clock::get().now();
        self.count_faults(state, began);
        self.word.u32(0).store(NOT_RUNG, Ordering::Relaxed);
        match state.slot.show(addr, self.page.clone()) {
            Ok(()) => {
                state.map_ns = Clock::get().now().since_ns(began);
                self.maps.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => {
                state.refused = true;
                tracing::debug!(%addr, %error, "cannot map a doorbell; it goes on trapping");
            }
        }
    }

    /// Counts what the change before led to: faults on the page, and on all other memory that was forgotten with it.
    fn count_faults(&self, state: &mut State, now: Ticks) {
        let count = (self.faults)();
        let faults = state.faults.replace(count).map(|before| count.saturating_sub(before));
        self.fault_count.fetch_add(faults.unwrap_or(0), Ordering::Relaxed);
        state.cost.maps(faults, now);
    }

    /// True if the guest wrote while the page was mapped.
    fn unmap(&self, state: &mut State) -> bool {
        if state.slot.is_empty() {
            return false;
        }
        let began = Clock::get().now();
        if let Err(error) = state.slot.hide() {
            // Its writes would go unseen. A ring on every turn keeps the thread awake, and the queue served.
            static LIMIT: LogLimit = LogLimit::new();
            if LIMIT.admits() {
                tracing::error!(%error, "cannot unmap a doorbell; its queue is polled instead");
            }
            return true;
        }
        let ended = Clock::get().now();
        state.cost.unmapped(state.map_ns.saturating_add(ended.since_ns(began)), ended);
        let rang = self.word.u32(0).swap(NOT_RUNG, Ordering::AcqRel) != NOT_RUNG;
        self.rung_while_mapped.fetch_add(rang.into(), Ordering::Relaxed);
        rang
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Decides, and pays if so.
    fn is_worth_mapping(&mut self, mode: DoorbellMode) -> bool {
        let now = Clock::get().now();
        let cost = self.cost.by(now);
        worth_mapping(mode, self.kicks, cost) && self.budget.pay(now, cost)
    }
}

impl virtio::Doorbell for Doorbell {
    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn awake(&self) {
        // The thread that polls is the only reader, and it is awake: no wake-up is taken from it.
        let kicks = self.event.read().unwrap_or(0);
        let mut state = self.lock();
        if kicks > 0 {
            self.kicks.fetch_add(kicks, Ordering::Relaxed);
            state.kicks = state.kicks.saturating_add(kicks);
        }
        self.map(&mut state);
    }

    fn listen(&self) -> bool {
        let mut state = self.lock();
        state.kicks = 0;
        self.unmap(&mut state)
    }
}

impl Bell for Doorbell {
    fn place(&self, addr: GuestAddr) -> io::Result<()> {
        let mut state = self.lock();
        if state.at.is_some() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.vm.register_ioevent(&self.event, &IoEventAddress::Mmio(addr.0), NoDatamatch)?;
        state.at = Some(addr);
        state.refused = false;
        Ok(())
    }

    fn remove(&self) {
        let mut state = self.lock();
        self.unmap(&mut state);
        let Some(addr) = state.at.take() else { return };
        let removed = self.vm.unregister_ioevent(&self.event, &IoEventAddress::Mmio(addr.0), NoDatamatch);
        if let Err(error) = removed {
            tracing::error!(%addr, %error, "cannot take a doorbell away");
        }
    }
}

impl Drop for Doorbell {
    fn drop(&mut self) {
        self.remove();
    }
}

impl fmt::Debug for Doorbell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Doorbell")
            .field("at", &self.lock().at)
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;

//! The loop of an I/O thread.
//!
//! A turn reads the clock once, looks at the mailbox with one load, and calls every poller with its quota. If none
//! had work and the policy agrees, the thread arms all notifications and sleeps. In between there is no lock, no
//! allocation and no system call, and around the pollers' own code a turn costs about as much as the clock read.
//!
//! Time is charged to pollers that did work. On a thread with one poller that is the time until the next turn; with
//! several, the clock is read again after each poll that did something, which is when the read is cheap
//! compared with the work.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;

use super::message::{Build, Message, Refusal};
use super::slot::{Slot, message};
use crate::epoll::{Epoll, Watch, Woken};
use crate::fair;
use crate::mailbox::Inbox;
use crate::policy::{self, Mode, Rest};
use crate::record::Record;
use crate::stats::ThreadCounters;
use crate::{Budget, Clock, Ticks, timer};

/// All that an I/O thread owns.
pub(super) struct Turn {
    clock: Clock,
    inbox: Inbox<Message>,
    epoll: Rc<Epoll>,
    budget: Budget,
    counters: Arc<ThreadCounters>,
    slots: Vec<Slot>,
    started: Ticks,
    /// The slot that goes first in a round.
    lead: usize,
    /// When the running turn began, and whether it is owed to the only poller.
    begun: Ticks,
    owed: bool,
    /// The last turn had nothing to do, and the thread did not sleep after it.
    polling: bool,
    /// Some poller drains, or has drained and is to be dropped.
    leaving: bool,
    stopping: bool,
}

impl Turn {
    pub(super) fn new(
        clock: Clock,
        inbox: Inbox<Message>,
        epoll: Epoll,
        budget: Budget,
        counters: Arc<ThreadCounters>,
    ) -> Self {
        let now = clock.now();
        Self {
            clock,
            inbox,
            epoll: Rc::new(epoll),
            budget,
            counters,
            slots: Vec::new(),
            started: now,
            lead: 0,
            begun: now,
            owed: false,
            polling: false,
            leaving: false,
            stopping: false,
        }
    }

    /// Takes turns until told to stop and every poller has drained.
    pub(super) fn run(mut self) {
        loop {
            let now = self.clock.now();
            let preempted = self.polling && policy::was_preempted(now.since_ns(self.begun), self.slots.len());
            self.begin(now);
            if self.inbox.is_rung() {
                self.read_messages(now);
            }
            let worked = self.round(now);
            if self.leaving {
                self.see_off();
                if self.stopping && self.slots.is_empty() {
                    return;
                }
            }
            self.polling = !worked;
            if !worked {
                self.counters.empty_turns.add(1);
                if preempted {
                    self.slots.iter_mut().for_each(|slot| slot.give_way(now));
                }
                if let Rest::Sleep(deadline) = policy::rest(now, self.slots.iter().map(Slot::rest)) {
                    self.sleep(now, deadline);
                    self.polling = false;
                }
            }
        }
    }

    #[inline]
    fn begin(&mut self, now: Ticks) {
        if self.owed {
            self.charge(0, now);
            self.owed = false;
        }
        self.begun = now;
        self.counters.turns.add(1);
        self.counters.total_ns.set(now.since_ns(self.started));
    }

    /// Charges the time since `begun` to a poller.
    #[inline]
    fn charge(&mut self, slot: usize, now: Ticks) {
        let ns = now.since_ns(self.begun);
        self.begun = now;
        self.slots[slot].record().counters.busy_ns.add(ns);
        self.counters.busy_ns.add(ns);
    }

    /// Calls every poller once. True if any had something to do.
    #[inline]
    fn round(&mut self, now: Ticks) -> bool {
        match self.slots.as_mut_slice() {
            [] => false,
            [only] => {
                self.owed = only.poll(now, self.budget);
                self.leaving |= self.owed && only.is_leaving();
                self.owed
            }
            _ => self.round_of_many(now),
        }
    }

    fn round_of_many(&mut self, mut now: Ticks) -> bool {
        let mut worked = false;
        let pollers = self.slots.len();
        let lead = if self.lead < pollers { self.lead } else { 0 };
        for index in (lead..pollers).chain(0..lead) {
            if self.slots[index].poll(now, self.budget) {
                worked = true;
                self.leaving |= self.slots[index].is_leaving();
                now = self.clock.now();
                self.charge(index, now);
            }
        }
        if worked {
            self.lead = fair::next_lead(self.slots.iter().map(Slot::standing), lead, now);
        }
        worked
    }

    /// Arms every poller and sleeps, unless something slips in.
    #[cold]
    fn sleep(&mut self, now: Ticks, deadline: Option<Ticks>) {
        self.counters.arms.add(1);
        let slipped = self.slots.iter_mut().position(|slot| slot.arm(now));
        let armed = slipped.map_or(self.slots.len(), |index| index + 1);
        if slipped.is_some() {
            self.counters.slips.add(1);
        } else if self.inbox.try_sleep() {
            self.wait(deadline);
            self.inbox.awake();
        }
        self.slots.iter_mut().take(armed).for_each(|slot| slot.disarm(now));
        // A panic in `arm` or `disarm` begins a drain.
        self.leaving |= self.slots.iter().any(Slot::is_leaving);
    }

    fn wait(&self, deadline: Option<Ticks>) {
        let asleep = self.clock.now();
        let timeout = deadline.map(|deadline| timer::timeout(asleep, deadline));
        let counters = &self.counters;
        counters.sleeps.add(1);
        match self.epoll.wait(timeout.as_ref()) {
            Woken::Edge { inbox, pollers } => {
                counters.wakes_by_message.add(u64::from(inbox));
                counters.wakes_by_fd.add(u64::from(pollers));
            }
            Woken::Timeout => counters.wakes_by_timer.add(1),
            Woken::Interrupted => {}
        }
        counters.asleep_ns.add(self.clock.now().since_ns(asleep));
    }

    #[cold]
    fn read_messages(&mut self, now: Ticks) {
        self.inbox.answer();
        while let Some(message) = self.inbox.next() {
            match message {
                Message::Add { record, mode, build, reply } => {
                    // Whoever waits for the reply holds the record too; there is nothing to undo if it is gone.
                    let _ = reply.send(self.add(record, mode, build, now));
                }
                Message::Remove(record) => self.begin_drain(now, |slot| Arc::ptr_eq(slot.record(), &record)),
                Message::SetMode(record, mode) => {
                    let ours = self.slots.iter_mut().filter(|slot| Arc::ptr_eq(slot.record(), &record));
                    ours.for_each(|slot| slot.set_mode(mode));
                }
                Message::Stop => {
                    self.stopping = true;
                    self.begin_drain(now, |_| true);
                }
            }
        }
        self.leaving |= self.stopping || self.slots.iter().any(Slot::is_leaving);
    }

    fn begin_drain(&mut self, now: Ticks, which: impl Fn(&Slot) -> bool) {
        self.slots.iter_mut().filter(|slot| which(slot)).for_each(|slot| slot.begin_drain(now));
    }

    fn add(&mut self, record: Arc<Record>, mode: Mode, build: Build, now: Ticks) -> Result<(), Refusal> {
        if self.stopping {
            return Err(Refusal::Stopping);
        }
        let built = catch_unwind(AssertUnwindSafe(|| {
            let poller = build();
            let fds = poller.wake_fds();
            (poller, fds)
        }));
        let (poller, fds) = built.map_err(|panic| {
            let (poller, cause) = (&record.label, message(&*panic));
            tracing::error!(poller, cause, "a poller panicked while it was built");
            Refusal::Panicked
        })?;
        match Watch::all(&self.epoll, &fds) {
            Ok(watches) => {
                self.slots.push(Slot::new(poller, watches, record, mode, now));
                Ok(())
            }
            Err(error) => {
                // A slot, because it knows how to drop a poller that panics.
                Slot::new(poller, Vec::new(), record, mode, now).retire();
                Err(Refusal::Watch(error))
            }
        }
    }

    /// Drops the pollers that have drained.
    #[cold]
    fn see_off(&mut self) {
        self.owed = false;
        self.slots.extract_if(.., |slot| slot.is_drained()).for_each(Slot::retire);
        self.leaving = self.stopping || self.slots.iter().any(Slot::is_leaving);
    }
}

//! Counters that one I/O thread writes and anybody reads.
//!
//! The data path counts on every turn, so counting must not cost an atomic read-modify-write and must not share a
//! cache line with another thread's counters. Each counter has a single writer: a load, an addition and a store.
//! A reader sees each counter's own past value; two counters read together may be a turn apart.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number with one writer. Wraps around after 2^64.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Only the owning thread calls this.
    #[inline]
    pub(crate) fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Only the owning thread calls this.
    #[inline]
    pub(crate) fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Declares the live counters of one owner and the plain values a reader gets.
macro_rules! counters {
    ($live:ident, $sample:ident, $(#[$doc:meta])* { $($(#[$field_doc:meta])* $field:ident,)+ }) => {
        // 128 bytes: the adjacent-line prefetcher of x86 pairs two 64-byte lines.
        #[derive(Debug, Default)]
        #[repr(align(128))]
        pub(crate) struct $live { $(pub(crate) $field: Counter,)+ }

        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $sample { $($(#[$field_doc])* pub $field: u64,)+ }

        impl $live {
            pub(crate) fn sample(&self) -> $sample {
                $sample { $($field: self.$field.get(),)+ }
            }
        }
    };
}

counters!(ThreadCounters, ThreadStats,
    /// What an I/O thread did since it started.
    {
        /// Turns taken: one call of every poller each.
        turns,
        /// Turns in which no poller had anything to do.
        empty_turns,
        /// Times it armed all notifications in order to sleep.
        arms,
        /// Of those, times work had slipped in, so it did not sleep.
        slips,
        /// Times it slept.
        sleeps,
        /// Wake-ups by a poller's descriptor (a kick, a completion).
        wakes_by_fd,
        /// Wake-ups by another thread's message or in-band kick.
        wakes_by_message,
        /// Wake-ups by a deadline.
        wakes_by_timer,
        /// Time in turns that did work, in ns.
        busy_ns,
        /// Time asleep, in ns.
        asleep_ns,
        /// Time since it started, in ns, as of its last turn. What is neither busy nor asleep was polled in vain.
        total_ns,
    }
);

counters!(PollerCounters, PollerStats,
    /// What one poller did since it was added.
    {
        /// Polls that did something.
        busy_polls,
        /// Polls that found nothing to do.
        empty_polls,
        /// Polls whose budget ran out before the work did.
        full_polls,
        /// Requests taken plus completions delivered.
        done,
        /// Times its notifications were switched on.
        arms,
        /// Times work had slipped in before they were on.
        slips,
        /// Time in turns that did work for it, in ns.
        busy_ns,
        /// Times work came while the thread polled for it (hybrid mode only).
        catches,
        /// Times the thread polled in vain until the window was over or something else took its CPU (hybrid mode only).
        vain_windows,
        /// How long it is now polled in vain for requests before the thread sleeps, in ns (hybrid mode only).
        window_ns,
    }
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_two_owners_share_no_cache_line() {
        assert_eq!(align_of::<ThreadCounters>(), 128);
        assert_eq!(size_of::<PollerCounters>() % 128, 0);
    }

    #[test]
    fn a_sample_is_what_was_counted() {
        let live = PollerCounters::default();
        live.done.add(3);
        live.done.add(4);
        live.window_ns.set(9);
        assert_eq!(live.sample(), PollerStats { done: 7, window_ns: 9, ..Default::default() });
    }
}

//! What a machine counts, and one reading of all of it.
//!
//! Exits are counted twice: by the kernel, all of them and by reason ([`VcpuSnapshot::kvm`]), and here, those that came
//! to user space ([`UserExits`]). Time is measured around `KVM_RUN`: what passes outside of it is exit handling of ours.
//! How much of a thread's processor time the guest had can only be sampled, which the host's clock tick does; the rest is
//! exit-handling time, with a bound on the error ([`Snapshot::eht_percent`]).
//!
//! Counters only grow. What happened between two moments is the difference of two snapshots.

pub(crate) mod binary;
pub(crate) mod sampled;
mod snapshot;

use std::ops::Sub;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub use binary::Values;
pub use snapshot::{QueueSnapshot, Snapshot, ThreadSnapshot};

/// Declares the live counters of one virtual CPU's thread and the plain values a reader gets.
macro_rules! user_exits {
    ($($(#[$doc:meta])* $field:ident,)+) => {
        /// What one thread counts; it alone writes.
        #[derive(Default)]
        #[repr(align(128))]
        pub(crate) struct VcpuCounters {
            $(pub(crate) $field: Counter,)+
            pub(crate) inside_ns: Counter,
            pub(crate) outside_ns: Counter,
        }

        /// Exits that came to user space, by reason.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct UserExits { $($(#[$doc])* pub $field: u64,)+ }

        impl UserExits {
            fn read(counters: &VcpuCounters) -> Self {
                Self { $($field: counters.$field.get(),)+ }
            }

            /// By reason.
            #[must_use]
            pub fn by_reason(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($field), self.$field),)+]
            }

            /// All of them.
            #[must_use]
            pub fn total(&self) -> u64 {
                [$(self.$field,)+].iter().sum()
            }
        }

        impl Sub for UserExits {
            type Output = Self;

            fn sub(self, earlier: Self) -> Self {
                Self { $($field: self.$field.saturating_sub(earlier.$field),)+ }
            }
        }
    };
}

user_exits! {
    /// Reads of a port.
    port_reads,
    /// Writes to a port.
    port_writes,
    /// Reads of an address that is not memory.
    mmio_reads,
    /// Writes to one.
    mmio_writes,
    /// Signals: kicks of ours, or anybody's.
    signals,
    /// Anything else.
    others,
}

/// A number with one writer.
#[derive(Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// One virtual CPU, as far as it has come.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct VcpuSnapshot {
    /// Exits that came to user space.
    pub user_exits: UserExits,
    /// The kernel's counters by name: `exits`, `io_exits`, `mmio_exits`, `halt_exits`, `irq_exits` and so on. Empty where
    /// the kernel has none (before Linux 5.14).
    pub kvm: Values,
    /// Time in `KVM_RUN`, in ns: in the guest, asleep for it, or in the kernel's handling of exits.
    pub inside_ns: u64,
    /// Time between two runs, in ns: handling of exits in user space.
    pub outside_ns: u64,
    /// Processor time of the thread, in ns: the scheduler's sum.
    pub run_ns: u64,
    /// Of that, time in the guest, in ns, as sampled by the host's clock tick.
    pub guest_ns: u64,
    /// What was left for the host, user space and kernel, in ns.
    pub host_ns: u64,
}

impl VcpuSnapshot {
    pub(crate) fn read(counters: &VcpuCounters, kvm: Option<Values>, sampled: sampled::CpuTime) -> Self {
        Self {
            user_exits: UserExits::read(counters),
            kvm: kvm.unwrap_or_default(),
            inside_ns: counters.inside_ns.get(),
            outside_ns: counters.outside_ns.get(),
            run_ns: sampled.run_ns,
            guest_ns: sampled.guest_ns,
            host_ns: sampled.host_ns,
        }
    }

    /// All exits: the kernel's count, or those that came to user space where it has none.
    #[must_use]
    pub fn exits(&self) -> u64 {
        self.kvm.get("exits").copied().unwrap_or_else(|| self.user_exits.total())
    }
}

impl Sub<&Self> for VcpuSnapshot {
    type Output = Self;

    fn sub(self, earlier: &Self) -> Self {
        let before = |name: &Arc<str>| earlier.kvm.get(name).copied().unwrap_or(0);
        Self {
            user_exits: self.user_exits - earlier.user_exits,
            inside_ns: self.inside_ns.saturating_sub(earlier.inside_ns),
            outside_ns: self.outside_ns.saturating_sub(earlier.outside_ns),
            run_ns: self.run_ns.saturating_sub(earlier.run_ns),
            guest_ns: self.guest_ns.saturating_sub(earlier.guest_ns),
            host_ns: self.host_ns.saturating_sub(earlier.host_ns),
            kvm: self
                .kvm
                .into_iter()
                .map(|(name, now)| (name.clone(), now.saturating_sub(before(&name))))
                .collect(),
        }
    }
}

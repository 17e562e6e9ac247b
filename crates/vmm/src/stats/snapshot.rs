//! One reading of everything, and the difference of two.

use std::collections::BTreeMap;
use std::ops::Sub;

use reactor::{ThreadReport, Ticks};
use virtio::QueueCounters;

use super::{VcpuSnapshot, sampled};
use crate::doorbell::DoorbellCounters;

/// A queue of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QueueSnapshot {
    /// The device's label.
    pub device: String,
    /// Which of its queues.
    pub queue: u16,
    /// What the queue counts: requests, bursts, calls.
    pub counters: QueueCounters,
    /// What its doorbell counts: kicks.
    pub doorbell: DoorbellCounters,
}

/// An I/O thread.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ThreadSnapshot {
    /// Its name.
    pub name: String,
    /// Its CPU.
    pub cpu: u32,
    /// Time in turns that did work, in ns.
    pub busy_ns: u64,
    /// Time asleep, in ns.
    pub asleep_ns: u64,
    /// Time in all, in ns. What is neither busy nor asleep was polled in vain.
    pub total_ns: u64,
    /// Times it slept.
    pub sleeps: u64,
}

/// A machine at one moment, or what happened between two.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    /// When, in ns of the I/O threads' clock; between two, how long.
    pub at_ns: u64,
    /// By virtual CPU.
    pub vcpus: Vec<VcpuSnapshot>,
    /// By device, in the order they were attached, and queue.
    pub queues: Vec<QueueSnapshot>,
    /// The I/O threads of the pool, which other machines may share.
    pub threads: Vec<ThreadSnapshot>,
}

impl Snapshot {
    pub(crate) fn new(
        at: Ticks,
        vcpus: Vec<VcpuSnapshot>,
        queues: Vec<QueueSnapshot>,
        threads: Vec<ThreadReport>,
    ) -> Self {
        let thread = |report: ThreadReport| ThreadSnapshot {
            name: report.name,
            cpu: report.cpu,
            busy_ns: report.stats.busy_ns,
            asleep_ns: report.stats.asleep_ns,
            total_ns: report.stats.total_ns,
            sleeps: report.stats.sleeps,
        };
        Self { at_ns: at.0, vcpus, queues, threads: threads.into_iter().map(thread).collect() }
    }

    /// Exits of all virtual CPUs.
    #[must_use]
    pub fn exits(&self) -> u64 {
        self.vcpus.iter().map(VcpuSnapshot::exits).sum()
    }

    /// Exits that came to user space.
    #[must_use]
    pub fn user_exits(&self) -> u64 {
        self.vcpus.iter().map(|vcpu| vcpu.user_exits.total()).sum()
    }

    /// The kernel's counters of all virtual CPUs by name, without those that are 0.
    #[must_use]
    pub fn kvm(&self) -> BTreeMap<String, u64> {
        let mut sums = BTreeMap::new();
        for (name, &value) in self.vcpus.iter().flat_map(|vcpu| &vcpu.kvm).filter(|&(_, &value)| value > 0) {
            *sums.entry(name.to_string()).or_default() += value;
        }
        sums
    }

    /// Requests that the devices took.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.queues.iter().map(|queue| queue.counters.requests).sum()
    }

    /// Writes to doorbells that caused an exit, as far as the I/O threads have seen them.
    #[must_use]
    pub fn kicks(&self) -> u64 {
        self.queues.iter().map(|queue| queue.doorbell.kicks).sum()
    }

    /// Interrupts that the devices' queues raised.
    #[must_use]
    pub fn interrupts(&self) -> u64 {
        self.queues.iter().map(|queue| queue.counters.calls).sum()
    }

    /// Exit-handling time as a percentage of the processor time that the virtual CPUs' threads used: what the scheduler
    /// gave them, without what the guest had of it. None below 100 samples, a second of processor time.
    ///
    /// What the guest had is sampled: see [`Snapshot::eht_error_percent`].
    #[must_use]
    pub fn eht_percent(&self) -> Option<f64> {
        let sum = |value: fn(&VcpuSnapshot) -> u64| self.vcpus.iter().map(value).sum::<u64>();
        sampled::host_percent(sum(|vcpu| vcpu.run_ns), sum(|vcpu| vcpu.guest_ns))
    }

    /// By how many percentage points [`Snapshot::eht_percent`] may be wrong, either way, in 19 of 20 cases: 100 by the
    /// square root of the number of samples, at least 100 of which come in a second of processor time.
    #[must_use]
    pub fn eht_error_percent(&self) -> Option<f64> {
        sampled::error_percent(self.vcpus.iter().map(|vcpu| vcpu.run_ns).sum())
    }
}

impl Sub<&Self> for Snapshot {
    type Output = Self;

    /// What happened since `earlier`, a snapshot of the same machine. What is only in this one counts from 0.
    fn sub(self, earlier: &Self) -> Self {
        let none = VcpuSnapshot::default();
        let vcpus = self.vcpus.into_iter().enumerate();
        let vcpus = vcpus.map(|(index, now)| now - earlier.vcpus.get(index).unwrap_or(&none)).collect();
        let queues = self.queues.into_iter().map(|now| {
            let same = |other: &&QueueSnapshot| (&other.device, other.queue) == (&now.device, now.queue);
            let before = earlier.queues.iter().find(same);
            before.map_or_else(|| now.clone(), |before| queue_since(&now, before))
        });
        let threads = self.threads.into_iter().map(|now| {
            let before = earlier.threads.iter().find(|other| other.name == now.name);
            before.map_or_else(|| now.clone(), |before| thread_since(&now, before))
        });
        Self {
            at_ns: self.at_ns.saturating_sub(earlier.at_ns),
            vcpus,
            queues: queues.collect(),
            threads: threads.collect(),
        }
    }
}

fn queue_since(now: &QueueSnapshot, before: &QueueSnapshot) -> QueueSnapshot {
    let (a, b) = (&now.counters, &before.counters);
    let since = u64::saturating_sub;
    QueueSnapshot {
        device: now.device.clone(),
        queue: now.queue,
        counters: QueueCounters {
            requests: since(a.requests, b.requests),
            bursts: since(a.bursts, b.bursts),
            calls: since(a.calls, b.calls),
            calls_suppressed: since(a.calls_suppressed, b.calls_suppressed),
            kicks_enabled: since(a.kicks_enabled, b.kicks_enabled),
        },
        doorbell: DoorbellCounters {
            kicks: since(now.doorbell.kicks, before.doorbell.kicks),
            maps: since(now.doorbell.maps, before.doorbell.maps),
            rung_while_mapped: since(now.doorbell.rung_while_mapped, before.doorbell.rung_while_mapped),
            faults: since(now.doorbell.faults, before.doorbell.faults),
        },
    }
}

fn thread_since(now: &ThreadSnapshot, before: &ThreadSnapshot) -> ThreadSnapshot {
    ThreadSnapshot {
        name: now.name.clone(),
        cpu: now.cpu,
        busy_ns: now.busy_ns.saturating_sub(before.busy_ns),
        asleep_ns: now.asleep_ns.saturating_sub(before.asleep_ns),
        total_ns: now.total_ns.saturating_sub(before.total_ns),
        sleeps: now.sleeps.saturating_sub(before.sleeps),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(device: &str, requests: u64) -> QueueSnapshot {
        let counters = QueueCounters { requests, ..QueueCounters::default() };
        QueueSnapshot { device: device.into(), counters, ..QueueSnapshot::default() }
    }

    #[test]
    fn a_difference_is_what_happened_in_between() {
        let vcpu = |exits, outside_ns| VcpuSnapshot {
            kvm: [("exits".into(), exits)].into(),
            outside_ns,
            inside_ns: 100 * outside_ns,
            run_ns: 1_000_000_000 * outside_ns,
            guest_ns: 900_000_000 * outside_ns,
            ..VcpuSnapshot::default()
        };
        let before = Snapshot {
            at_ns: 10,
            vcpus: vec![vcpu(3, 1)],
            queues: vec![queue("a", 5)],
            ..Snapshot::default()
        };
        let after = Snapshot {
            at_ns: 30,
            vcpus: vec![vcpu(7, 4)],
            queues: vec![queue("a", 9), queue("b", 2)],
            ..Snapshot::default()
        };
        let between = after - &before;
        assert_eq!((between.at_ns, between.exits(), between.requests()), (20, 4, 6));
        assert_eq!(between.kvm(), [("exits".to_owned(), 4)].into());
        assert_eq!(between.eht_percent(), Some(10.0));
        assert!((between.eht_error_percent().unwrap() - 100.0 / f64::sqrt(300.0)).abs() < 1e-9);
    }

    #[test]
    fn what_was_not_counted_has_no_percentage() {
        assert_eq!(Snapshot::default().eht_percent(), None);
        // Time outside of `KVM_RUN` is something else, and never stands in.
        let vcpu = VcpuSnapshot { outside_ns: 1 << 40, inside_ns: 1 << 40, ..VcpuSnapshot::default() };
        let snapshot = Snapshot { vcpus: vec![vcpu], ..Snapshot::default() };
        assert_eq!((snapshot.eht_percent(), snapshot.eht_error_percent()), (None, None));
    }
}

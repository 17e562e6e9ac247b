//! Which CPUs the virtual CPUs and the I/O threads of a row get.
//!
//! A thread that polls is only as good as the CPU under it, so vCPUs and I/O threads get CPUs of their own. Where there
//! are too few, half of the CPUs are for vCPUs and half for I/O threads: a polling I/O thread that takes turns with a
//! polling vCPU makes each wait for the other's time slice.

use std::fs;

use reactor::Machine;

use super::rows::Placement;

/// A CPU and what it shares with others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) cpu: u32,
    /// The first CPU of its core.
    pub(crate) core: u32,
    /// The first CPU of those that share its last-level cache.
    pub(crate) cache: u32,
    /// Whether it takes the interrupts of the disk that the file is on: then it is one for an I/O thread.
    pub(crate) storage: bool,
}

/// The CPUs of a row, in the order of the queues. Empty if nothing is pinned.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seats {
    pub(crate) io: Vec<u32>,
    pub(crate) vcpu: Vec<u32>,
}

/// The CPUs that this process may use; `storage` are those that take the interrupts of the disk.
pub(crate) fn places(machine: &Machine, storage: &[u32]) -> Vec<Place> {
    let place = |cpu: &reactor::Cpu| Place {
        cpu: cpu.id,
        core: cpu.core,
        cache: cache_of(cpu.id),
        storage: storage.contains(&cpu.id),
    };
    machine.allowed.iter().map(place).collect()
}

/// The kernel lists a CPU's caches from the first level on (sysfs-devices-system-cpu, `cache/index*`).
fn cache_of(cpu: u32) -> u32 {
    let first = |index: u32| -> Option<u32> {
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/cache/index{index}/shared_cpu_list");
        let list = fs::read_to_string(path).ok()?.trim().parse::<reactor::CpuList>().ok()?;
        list.as_slice().iter().copied().min()
    };
    // Without caches in sysfs, all CPUs count as sharing one.
    (0..8).rev().find_map(first).unwrap_or(0)
}

/// Seats for `jobs` queues, each with a vCPU and an I/O thread.
pub(crate) fn seats(places: &[Place], placement: Placement, jobs: u16) -> Seats {
    match placement {
        Placement::None => Seats::default(),
        Placement::Apart => apart(places, jobs.into()),
        Placement::Near => near(places, jobs.into()),
    }
}

/// I/O threads on the first CPUs, vCPUs on the next, one CPU of each core before its siblings, and those with the disk's
/// interrupts before the others.
fn apart(places: &[Place], jobs: usize) -> Seats {
    let sibling = |place: &Place| places.iter().filter(|p| p.core == place.core && p.cpu < place.cpu).count();
    let mut order: Vec<_> = places.iter().map(|place| (sibling(place), !place.storage, place.cpu)).collect();
    order.sort_unstable();
    let cpus: Vec<u32> = order.into_iter().map(|(.., cpu)| cpu).collect();
    let io = jobs.min(cpus.len() / 2).max(1);
    let vcpu = jobs.min(cpus.len().saturating_sub(io)).max(1);
    // With a single CPU both are on it.
    let rest = if cpus.len() > io { &cpus[io..] } else { &cpus[..] };
    Seats { io: cpus[..io.min(cpus.len())].to_vec(), vcpu: rest[..vcpu.min(rest.len())].to_vec() }
}

/// Pairs of CPUs with as much in common as can be without sharing a core's execution units.
fn near(places: &[Place], jobs: usize) -> Seats {
    if places.len() < 2 * jobs {
        return apart(places, jobs);
    }
    let mut free = places.to_vec();
    free.sort_unstable_by_key(|place| (!place.storage, place.cache, place.core, place.cpu));
    let mut seats = Seats::default();
    for _ in 0..jobs {
        let io = free.remove(0);
        let distance =
            |place: &Place| (place.cache != io.cache, place.core == io.core, place.storage, place.cpu);
        let Some(nearest) = (0..free.len()).min_by_key(|&at| distance(&free[at])) else { break };
        seats.io.push(io.cpu);
        seats.vcpu.push(free.remove(nearest).cpu);
    }
    seats
}

/// Whether placing threads near each other can make a difference for `jobs` queues on this machine.
pub(crate) fn nearness_matters(places: &[Place], jobs: u16) -> bool {
    let one_cache = places.iter().all(|place| place.cache == places[0].cache);
    let siblings = places.iter().any(|place| place.core != place.cpu);
    let (apart, near) = (apart(places, jobs.into()), near(places, jobs.into()));
    apart != near && (!one_cache || siblings)
}

/// How many threads there are for each CPU, in words; None if each has a CPU.
pub(crate) fn crowding(cpus: usize, seats: &Seats, jobs: u16, io_threads: usize) -> Option<String> {
    let jobs = usize::from(jobs);
    if seats.io.is_empty() {
        let threads = jobs + io_threads;
        return (threads > cpus).then(|| format!("{threads} threads share {cpus} CPUs"));
    }
    let vcpus = (jobs > seats.vcpu.len()).then(|| format!("{jobs} vCPUs share {} CPU", seats.vcpu.len()));
    let io = (jobs > seats.io.len()).then(|| format!("{jobs} queues share {} I/O thread", seats.io.len()));
    let both = seats.io.iter().any(|cpu| seats.vcpu.contains(cpu));
    let both = both.then(|| "I/O threads and vCPUs share a CPU".to_owned());
    let parts: Vec<_> = [vcpus, io, both].into_iter().flatten().collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(places: &[(u32, u32, u32)]) -> Vec<Place> {
        places.iter().map(|&(cpu, core, cache)| Place { cpu, core, cache, storage: false }).collect()
    }

    #[test]
    fn two_cpus_are_one_for_each_side() {
        let two = machine(&[(0, 0, 0), (1, 1, 0)]);
        for placement in [Placement::Apart, Placement::Near] {
            for jobs in [1, 2] {
                assert_eq!(seats(&two, placement, jobs), Seats { io: vec![0], vcpu: vec![1] });
            }
        }
        assert!(!nearness_matters(&two, 1));
        let mut second = two.clone();
        second[1].storage = true;
        for placement in [Placement::Apart, Placement::Near] {
            assert_eq!(seats(&second, placement, 1), Seats { io: vec![1], vcpu: vec![0] });
        }
        assert_eq!(seats(&two, Placement::None, 2), Seats::default());
    }

    #[test]
    fn near_means_the_same_cache_but_another_core() {
        // Two caches, two cores with two threads each at either.
        let eight = machine(&[
            (0, 0, 0),
            (1, 1, 0),
            (2, 2, 2),
            (3, 3, 2),
            (4, 0, 0),
            (5, 1, 0),
            (6, 2, 2),
            (7, 3, 2),
        ]);
        assert_eq!(seats(&eight, Placement::Apart, 2), Seats { io: vec![0, 1], vcpu: vec![2, 3] });
        assert_eq!(seats(&eight, Placement::Near, 2), Seats { io: vec![0, 4], vcpu: vec![1, 5] });
        assert!(nearness_matters(&eight, 2));
    }

    #[test]
    fn one_cpu_is_for_all() {
        let one = machine(&[(3, 3, 3)]);
        let seats = seats(&one, Placement::Apart, 2);
        assert_eq!(seats, Seats { io: vec![3], vcpu: vec![3] });
        assert!(crowding(1, &seats, 2, 1).unwrap().contains("I/O threads and vCPUs share a CPU"));
    }

    #[test]
    fn crowding_is_said() {
        assert_eq!(crowding(2, &Seats::default(), 1, 1), None);
        assert_eq!(crowding(2, &Seats::default(), 2, 2).unwrap(), "4 threads share 2 CPUs");
        let seats = Seats { io: vec![0], vcpu: vec![1] };
        assert_eq!(crowding(2, &seats, 1, 1), None);
        assert_eq!(crowding(2, &seats, 2, 1).unwrap(), "2 vCPUs share 1 CPU, 2 queues share 1 I/O thread");
    }

    #[test]
    fn this_machine_has_places() {
        assert!(!places(&Machine::read(), &[]).is_empty());
    }
}

//! What the machine lets this process have: the CPUs in its affinity mask, how they share cores, and the CPU time
//! that its control groups grant.
//!
//! Reading is here; deciding is in [`placement`](crate::placement).

use std::fs;
use std::path::{Component, Path, PathBuf};

use crate::cpulist::{CPUS_MAX, CpuList};

/// One logical CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// Its number.
    pub id: u32,
    /// The lowest-numbered CPU of the same physical core; `id` itself where there is no hyper-threading.
    pub core: u32,
}

/// CPU time a control group may use per period.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// CPU time, in µs.
    pub quota_us: u64,
    /// Wall-clock time in which it may be used, in µs. Not 0.
    pub period_us: u64,
}

impl Quota {
    /// Whole CPUs' worth of time.
    #[must_use]
    pub fn whole_cpus(&self) -> u64 {
        self.quota_us / self.period_us
    }
}

/// What placement depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// The CPUs this process may run on, ascending.
    pub allowed: Vec<Cpu>,
    /// The tightest limit of its control group and that group's ancestors; `None` if there is none.
    pub quota: Option<Quota>,
}

impl Machine {
    /// Reads the calling thread's affinity mask and the process's control groups. What cannot be read counts as
    /// not limited; if even the mask cannot be read, only CPU 0 is sure.
    #[must_use]
    pub fn read() -> Self {
        let allowed = rustix::thread::sched_getaffinity(None).map_or_else(
            |_| vec![0],
            |mask| (0..CPUS_MAX).filter(|&cpu| mask.is_set(cpu as usize)).collect(),
        );
        let allowed =
            allowed.into_iter().map(|id| Cpu { id, core: core_of(Path::new("/sys"), id) }).collect();
        Self { allowed, quota: quota(Path::new("/proc/self")) }
    }
}

/// The CPUs on which the threads of another process ran last, those threads that use the most time; none if it cannot be
/// told.
///
/// A bound thread is where it is bound. Where the others are changes, so this is a hint.
#[must_use]
pub fn cpus_of_process(pid: u32) -> Vec<u32> {
    /// A process may have any number.
    const THREADS_MAX: usize = 512;
    if pid == 0 || pid == std::process::id() {
        return Vec::new();
    }
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let read = |task: fs::DirEntry| thread_stat(&fs::read_to_string(task.path().join("stat")).ok()?);
    let threads: Vec<_> = tasks.take(THREADS_MAX).flatten().filter_map(read).collect();
    busy_cpus(&threads)
}

/// CPU and clock ticks used of a thread, from its `stat` (proc_pid_stat(5), fields 39, 14 and 15).
fn thread_stat(stat: &str) -> Option<(u32, u64)> {
    // The name in field 2 may hold anything.
    let fields: Vec<_> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    Some((u32::try_from(field(39)?).ok()?, field(14)?.saturating_add(field(15)?)))
}

/// The CPUs of threads that used at least a tenth of what the busiest one did.
fn busy_cpus(threads: &[(u32, u64)]) -> Vec<u32> {
    let most = threads.iter().map(|&(_, ticks)| ticks).max().unwrap_or(0);
    let busy = threads.iter().filter(|&&(_, ticks)| ticks >= most / 10);
    let mut cpus: Vec<_> = busy.map(|&(cpu, _)| cpu).collect();
    cpus.sort_unstable();
    cpus.dedup();
    cpus
}

fn core_of(sys: &Path, cpu: u32) -> u32 {
    let siblings = sys.join(format!("devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"));
    let list = fs::read_to_string(siblings).ok().and_then(|text| text.parse::<CpuList>().ok());
    list.and_then(|list| list.as_slice().iter().copied().min()).unwrap_or(cpu)
}

/// The tightest CPU limit that applies to the process whose directory in `/proc` is `process`.
fn quota(process: &Path) -> Option<Quota> {
    let groups = fs::read_to_string(process.join("cgroup")).ok()?;
    let mounts = fs::read_to_string(process.join("mountinfo")).ok()?;
    let found = directories(&groups, &mounts).into_iter().filter_map(|(version, directory)| {
        let read = |file: &str| fs::read_to_string(directory.join(file)).ok();
        match version {
            Version::V1 => parse_v1(&read("cpu.cfs_quota_us")?, &read("cpu.cfs_period_us")?),
            Version::V2 => parse_v2(&read("cpu.max")?),
        }
    });
    // a/b < c/d without dividing.
    found.min_by(|a, b| {
        let (left, right) = (a.quota_us.saturating_mul(b.period_us), b.quota_us.saturating_mul(a.period_us));
        left.cmp(&right)
    })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// The directories, from the process's group up to the top of what is mounted, whose limits apply to it.
/// `groups` is `/proc/self/cgroup` (cgroups(7)), `mounts` is `/proc/self/mountinfo` (proc_pid_mountinfo(5)).
fn directories(groups: &str, mounts: &str) -> Vec<(Version, PathBuf)> {
    let mut found = Vec::new();
    for line in mounts.lines() {
        let Some(mount) = Mount::parse(line) else { continue };
        let Some(group) = groups.lines().find_map(|line| group_of(line, mount.version)) else { continue };
        // Without a cgroup namespace a container's mount shows only the part of the tree below its own group.
        let Ok(below) = Path::new(group).strip_prefix(mount.root) else { continue };
        if below.components().any(|part| part == Component::ParentDir) {
            continue;
        }
        let top = Path::new(mount.point);
        let leaf = top.join(below);
        let upwards = leaf.ancestors().take_while(|directory| directory.starts_with(top));
        found.extend(upwards.map(|directory| (mount.version, directory.to_owned())));
    }
    found
}

struct Mount<'a> {
    root: &'a str,
    point: &'a str,
    version: Version,
}

impl<'a> Mount<'a> {
    /// A mount that carries CPU limits.
    fn parse(line: &'a str) -> Option<Self> {
        let (place, kind) = line.split_once(" - ")?;
        let mut place = place.split(' ').skip(3);
        let (root, point) = (place.next()?, place.next()?);
        let mut kind = kind.split(' ');
        let version = match kind.next()? {
            "cgroup2" => Version::V2,
            "cgroup" if kind.nth(1)?.split(',').any(|option| option == "cpu") => Version::V1,
            _ => return None,
        };
        Some(Self { root, point, version })
    }
}

/// The process's group, if `line` of `/proc/self/cgroup` is about the hierarchy that carries CPU limits.
fn group_of(line: &str, version: Version) -> Option<&str> {
    let mut parts = line.splitn(3, ':');
    let (hierarchy, controllers, group) = (parts.next()?, parts.next()?, parts.next()?);
    let ours = match version {
        Version::V1 => controllers.split(',').any(|controller| controller == "cpu"),
        Version::V2 => hierarchy == "0" && controllers.is_empty(),
    };
    ours.then_some(group)
}

/// `cpu.max`: `max 100000` or `150000 100000` (kernel, cgroup-v2.rst). `None` if there is no limit.
fn parse_v2(text: &str) -> Option<Quota> {
    let mut words = text.split_whitespace();
    let (quota, period) = (words.next()?, words.next()?);
    limit(quota.parse().ok()?, period.parse().ok()?)
}

/// `cpu.cfs_quota_us`, -1 for no limit, and `cpu.cfs_period_us` (kernel, sched-bwc.rst).
fn parse_v1(quota: &str, period: &str) -> Option<Quota> {
    limit(quota.trim().parse().ok()?, period.trim().parse().ok()?)
}

fn limit(quota_us: u64, period_us: u64) -> Option<Quota> {
    (period_us > 0).then_some(Quota { quota_us, period_us })
}

#[cfg(test)]
mod tests {
    use super::*;

    const V2_MOUNT: &str = "31 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate";
    const V1_MOUNT: &str =
        "33 31 0:28 / /sys/fs/cgroup/cpu,cpuacct rw shared:15 - cgroup cgroup rw,cpu,cpuacct";

    #[test]
    fn the_cpus_of_a_process_are_those_of_its_busy_threads() {
        let stat = |name: &str, cpu: u32| {
            format!("7 ({name}) R 1 7 7 0 -1 0 0 0 0 0 30 12 0 0 20 0 1 0 5 {} {cpu} 0 0", "0 ".repeat(16))
        };
        assert_eq!(thread_stat(&stat("CPU 0/KVM", 3)), Some((3, 42)));
        assert_eq!(thread_stat(&stat("a) S 1 (b", 3)), Some((3, 42)));
        assert_eq!(thread_stat("7 (short) R"), None);
        assert_eq!(busy_cpus(&[(3, 100), (1, 90), (2, 9), (3, 50)]), [1, 3]);
        assert_eq!(busy_cpus(&[(2, 0), (1, 0)]), [1, 2], "a process that has just begun");
        assert!(busy_cpus(&[]).is_empty() && cpus_of_process(0).is_empty());
    }

    #[test]
    fn limits_are_read_in_both_formats() {
        let quota = |quota_us, period_us| Some(Quota { quota_us, period_us });
        assert_eq!(parse_v2("150000 100000\n"), quota(150_000, 100_000));
        assert_eq!(parse_v2("max 100000\n"), None);
        assert_eq!(parse_v2(""), None);
        assert_eq!(parse_v2("100000 0"), None);
        assert_eq!(parse_v1("50000\n", "100000\n"), quota(50_000, 100_000));
        assert_eq!(parse_v1("-1\n", "100000\n"), None);
    }

    #[test]
    fn a_quota_counts_whole_cpus() {
        let whole = |quota_us| Quota { quota_us, period_us: 100_000 }.whole_cpus();
        assert_eq!((whole(50_000), whole(199_999), whole(400_000)), (0, 1, 4));
    }

    #[test]
    fn every_ancestor_of_the_group_is_looked_at() {
        let found = directories("0::/vm.slice/a.scope\n", V2_MOUNT);
        let paths: Vec<_> = found.iter().map(|(_, path)| path.to_str().unwrap()).collect();
        assert_eq!(paths, ["/sys/fs/cgroup/vm.slice/a.scope", "/sys/fs/cgroup/vm.slice", "/sys/fs/cgroup"]);
    }

    #[test]
    fn the_cpu_controller_is_found_among_version_one_hierarchies() {
        let groups = "9:name=systemd:/\n4:cpu,cpuacct:/box\n3:cpuset:/other\n0::/\n";
        let found = directories(groups, V1_MOUNT);
        assert_eq!(found[0], (Version::V1, PathBuf::from("/sys/fs/cgroup/cpu,cpuacct/box")));
        assert!(
            directories(groups, "3 3 0:1 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset").is_empty()
        );
    }

    #[test]
    fn a_containers_mount_starts_at_its_own_group() {
        let mount = V2_MOUNT.replace(" / ", " /docker/abc ");
        let found = directories("0::/docker/abc/inner\n", &mount);
        assert_eq!(found[0].1, PathBuf::from("/sys/fs/cgroup/inner"));
        assert!(directories("0::/elsewhere\n", &mount).is_empty());
        assert!(directories("0::/../up\n", V2_MOUNT).is_empty(), "a group outside the namespace");
    }

    #[test]
    fn the_tightest_limit_of_a_real_tree_applies() {
        let root = std::env::temp_dir().join(format!("exitless-cpus-{}", std::process::id()));
        let top = root.join("fs");
        fs::create_dir_all(top.join("a/b")).unwrap();
        fs::write(root.join("cgroup"), "0::/a/b\n").unwrap();
        let mount = format!("31 23 0:26 / {} rw - cgroup2 cgroup2 rw", top.display());
        fs::write(root.join("mountinfo"), mount).unwrap();
        fs::write(top.join("a/cpu.max"), "150000 100000").unwrap();
        fs::write(top.join("a/b/cpu.max"), "900000 300000").unwrap();
        let found = quota(&root);
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(found, Some(Quota { quota_us: 150_000, period_us: 100_000 }));
    }

    #[test]
    fn this_machine_allows_at_least_one_cpu() {
        let machine = Machine::read();
        assert!(!machine.allowed.is_empty());
        assert!(machine.allowed.iter().all(|cpu| cpu.core <= cpu.id));
    }
}

//! What this process has open.

/// Counts of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Counts {
    pub(crate) descriptors: usize,
    /// Of shared memory.
    pub(crate) mappings: usize,
    pub(crate) threads: usize,
    pub(crate) resident_kib: usize,
}

impl Counts {
    pub(crate) fn now() -> Self {
        let list = |path| std::fs::read_dir(path).unwrap().count();
        let read = |path| std::fs::read_to_string(path).unwrap();
        let status = read("/proc/self/status");
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        Self {
            descriptors: list("/proc/self/fd"),
            mappings: read("/proc/self/maps").lines().filter(|line| line.contains("memfd:")).count(),
            threads: list("/proc/self/task"),
            resident_kib: resident.split_whitespace().next().unwrap().parse().unwrap(),
        }
    }
}

/// Threads that take messages in, with the one that starts them.
pub(crate) fn intakes() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")));
    names.filter(|name| name.as_ref().is_ok_and(|name| name.trim() == "intake")).count()
}

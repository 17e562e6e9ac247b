//! Which CPUs take the interrupts of the disk that a file is on.
//!
//! An I/O thread on such a CPU has its completions there. Anywhere else, each of them interrupts somebody else first: a
//! virtual CPU, which leaves its guest for it, if there is one.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::cpulist::CpuList;

/// An interrupt with less than this share of its device's is none of those that matter: configuration changes, say.
const SHARE_MIN: f64 = 0.05;

/// The CPUs for the disks that these files are on, in ascending order. None for what cannot be known: a file that is on
/// no disk of its own, or a disk without message-signalled interrupts.
#[must_use]
pub fn cpus_of_disks<'a>(files: impl Iterator<Item = &'a Path>) -> Vec<u32> {
    let mut numbers: Vec<Vec<u32>> = files.filter_map(device_of).map(|device| numbers(&device)).collect();
    numbers.dedup();
    if numbers.is_empty() {
        return Vec::new();
    }
    let counted = fs::read_to_string("/proc/interrupts").unwrap_or_default();
    let mut cpus: Vec<u32> =
        numbers.iter().flat_map(|of_disk| busy(&counted, of_disk)).flat_map(affinity).collect();
    cpus.sort_unstable();
    cpus.dedup();
    cpus
}

/// Where sysfs has the disk: `path` itself, or what its file system is on.
fn device_of(path: &Path) -> Option<PathBuf> {
    let found = fs::metadata(path).ok()?;
    let number = if found.file_type().is_block_device() { found.rdev() } else { found.dev() };
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()
}

/// The interrupts of the nearest device above `device` that has some: a partition's disk's controller.
fn numbers(device: &Path) -> Vec<u32> {
    let listed = device.ancestors().find_map(|above| fs::read_dir(above.join("msi_irqs")).ok());
    let names = listed.into_iter().flatten().flatten().map(|entry| entry.file_name());
    names.filter_map(|name| name.to_str()?.parse().ok()).collect()
}

/// Those of `numbers` that were most of what `/proc/interrupts` counted for all of them: a line for each interrupt, its
/// number, a colon, a count for each CPU, and names.
fn busy(counted: &str, numbers: &[u32]) -> Vec<u32> {
    let line = |line: &str| {
        let (number, rest) = line.split_once(':')?;
        let number: u32 = number.trim().parse().ok()?;
        let counts = rest.split_ascii_whitespace().map_while(|word| word.parse::<u64>().ok());
        numbers.contains(&number).then(|| (number, counts.sum::<u64>()))
    };
    let all: Vec<_> = counted.lines().filter_map(line).collect();
    let total: u64 = all.iter().map(|(_, count)| count).sum();
    let matters = |&&(_, count): &&(u32, u64)| count > 0 && count as f64 >= SHARE_MIN * total as f64;
    all.iter().filter(matters).map(|(number, _)| *number).collect()
}

fn affinity(number: u32) -> Vec<u32> {
    let list = fs::read_to_string(format!("/proc/irq/{number}/effective_affinity_list"));
    let list = list.ok().and_then(|list| list.trim().parse::<CpuList>().ok());
    list.map_or(Vec::new(), |list| list.as_slice().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupts_that_hardly_come_do_not_count() {
        let counted = "           CPU0       CPU1\n 35:          0          1 PCI-MSIX-0000:00:02.0   0-edge      config\n \
                       36:          7    5270766 PCI-MSIX-0000:00:02.0   1-edge      req.0\n 37:   9   9 other\nNMI:  1 2 x\n";
        assert_eq!(busy(counted, &[35, 36]), [36]);
        assert_eq!(busy(counted, &[]), [0; 0]);
        assert_eq!(busy("nonsense\n: 1\n35:\n", &[35]), [0; 0]);
    }

    #[test]
    fn files_without_a_disk_have_none() {
        let files = ["/proc/self/maps", "/nonexistent"].map(Path::new);
        assert!(cpus_of_disks(files.into_iter()).is_empty());
    }
}

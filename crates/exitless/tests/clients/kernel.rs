//! The kernels that guests boot, and the driver modules they need in their initramfs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::needs;

pub(crate) struct Kernel {
    pub(crate) image: PathBuf,
    /// In the order they must be loaded.
    pub(crate) modules: Vec<PathBuf>,
}

/// A kernel of this machine for a PC guest with a virtio disk, preferably Debian's small one for clouds.
pub(crate) fn pc() -> Result<Kernel, String> {
    pc_with(&["virtio_pci", "virtio_blk", "virtio_rng"])
}

/// The same kernel with the modules that hear a power button and tell of panics.
pub(crate) fn pc_of_monitor() -> Result<Kernel, String> {
    pc_with(&["virtio_pci", "virtio_blk", "button", "pvpanic-mmio"])
}

/// The same kernel with the modules that let it run guests of its own, on the AMD processor that QEMU emulates.
pub(crate) fn host() -> Result<Kernel, String> {
    pc_with(&["kvm_amd"])
}

fn pc_with(drivers: &[&str]) -> Result<Kernel, String> {
    let modprobe = needs::program("modprobe").ok_or("no modprobe installed")?;
    let mut versions = children("/boot")
        .filter_map(|path| Some(path.file_name()?.to_str()?.strip_prefix("vmlinuz-")?.to_owned()))
        .filter(|version| Path::new("/lib/modules").join(version).is_dir())
        .filter(|version| fs::File::open(format!("/boot/vmlinuz-{version}")).is_ok())
        .collect::<Vec<_>>();
    versions.sort_by_key(|version| (version.contains("cloud"), version.clone()));
    let version = versions.pop().ok_or("no readable kernel with modules in /boot")?;
    let mut modules = Vec::new();
    for name in drivers {
        let list = Command::new(&modprobe).args(["-S", &version, "--show-depends", name]).output();
        let list = list.ok().filter(|list| list.status.success());
        let list = list.ok_or_else(|| format!("no module {name} for the kernel {version}"))?;
        let list = String::from_utf8_lossy(&list.stdout).into_owned();
        let files = list.lines().filter_map(|line| line.strip_prefix("insmod "));
        for file in files.map(|file| PathBuf::from(file.trim())) {
            if !modules.contains(&file) {
                modules.push(file);
            }
        }
    }
    Ok(Kernel { image: format!("/boot/vmlinuz-{version}").into(), modules })
}

/// User-Mode Linux, which is a program, with virtio itself built in.
pub(crate) fn uml() -> Result<Kernel, String> {
    let image = needs::program("linux.uml").ok_or("no linux.uml installed")?;
    let module = children("/usr/lib/uml/modules")
        .map(|version| version.join("kernel/drivers/block/virtio_blk.ko"))
        .find(|module| module.is_file())
        .ok_or("no virtio_blk.ko in /usr/lib/uml/modules")?;
    Ok(Kernel { image, modules: vec![module] })
}

fn children(dir: &str) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(dir).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()))
}

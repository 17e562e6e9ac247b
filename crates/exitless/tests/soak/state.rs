//! The state of a run that stalled, as text: rings, clients, I/O thread, and what the kernel says about all threads.

use std::fmt::Write;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio::memory::Area;
use virtio::{GuestAddr, Memory, RingConfig, RingFormat};

use crate::client::{Client, Progress, Shape};

/// A client's memory and descriptors, while its thread has the rest.
pub(crate) struct Watched {
    shape: Shape,
    memory: Arc<Memory>,
    ring: RingConfig,
    kick: Arc<OwnedFd>,
    call: Arc<OwnedFd>,
    progress: Arc<Progress>,
}

impl Watched {
    pub(crate) fn new(client: &Client, progress: Arc<Progress>) -> Self {
        Self {
            shape: client.shape(),
            memory: client.driver().memory().clone(),
            ring: client.driver().ring_config(),
            kick: client.kick().clone(),
            call: client.call().clone(),
            progress,
        }
    }

    pub(crate) fn describe(&self) -> String {
        let ring = match self.ring.format {
            RingFormat::Split => self.split(),
            RingFormat::Packed => self.packed(),
        };
        format!(
            "{:?}\n  {:?}\n  kick {}, call {}\n{ring}",
            self.shape,
            self.progress,
            count(&self.kick),
            count(&self.call)
        )
    }

    fn area(&self, addr: GuestAddr, bytes: usize) -> Area {
        self.memory.area(addr, bytes, 1).unwrap()
    }

    fn split(&self) -> String {
        let size = usize::from(self.ring.size);
        let avail = self.area(self.ring.driver, 6 + 2 * size);
        let used = self.area(self.ring.device, 6 + 8 * size);
        let word = |area: &Area, at: usize| area.u16(at).load(Ordering::SeqCst);
        format!(
            "  size {size}\n  avail: flags {}, idx {}, used_event {}\n  used: flags {}, idx {}, avail_event {}\n",
            word(&avail, 0),
            word(&avail, 2),
            word(&avail, 4 + 2 * size),
            word(&used, 0),
            word(&used, 2),
            word(&used, 4 + 8 * size)
        )
    }

    fn packed(&self) -> String {
        let size = usize::from(self.ring.size);
        let event = |addr| self.area(addr, 4).u32(0).load(Ordering::SeqCst);
        let mut text = format!(
            "  size {size}\n  driver event {:#010x}, device event {:#010x}\n  descriptors (id:flags):",
            event(self.ring.driver),
            event(self.ring.device)
        );
        let descriptors = self.area(self.ring.desc, 16 * size);
        let word = |at: usize| descriptors.u16(at).load(Ordering::SeqCst);
        for at in (0..size).map(|index| 16 * index) {
            let _ = write!(text, " {}:{:04x}", word(at + 12), word(at + 14));
        }
        text + "\n"
    }
}

/// What an eventfd has counted, without taking it.
fn count(eventfd: &OwnedFd) -> String {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", eventfd.as_raw_fd())).unwrap_or_default();
    info.lines().find(|line| line.starts_with("eventfd-count")).unwrap_or("gone").to_owned()
}

/// The threads of a process: state, where they wait, and how often they gave up or lost their CPU.
pub(crate) fn threads(process: &str) -> String {
    let mut text = String::new();
    for task in fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten() {
        let read = |file| fs::read_to_string(task.path().join(file)).unwrap_or_default();
        let status = read("status");
        let wanted = ["Name:", "State:", "Cpus_allowed_list:", "voluntary_ctxt", "nonvoluntary_ctxt"];
        let fields = status.lines().filter(|line| wanted.iter().any(|start| line.starts_with(start)));
        let fields: Vec<_> = fields.map(|line| line.replace('\t', " ")).collect();
        let _ = writeln!(text, "  {}; in {}", fields.join("; "), read("wchan"));
    }
    text
}

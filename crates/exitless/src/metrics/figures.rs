//! Which figures there are, and what they are called.

use std::fmt::Display;

use vmm::Snapshot;
use vmm::stats::{ThreadSnapshot, VcpuSnapshot};

use super::text::{Text, seconds};
use crate::control::{DeviceInfo, QueueStats, Stats};

/// Everything that is counted about a machine.
pub(crate) fn of_machine(snapshot: &Snapshot) -> String {
    let mut text = Text::default();
    build(&mut text);
    exits(&mut text, snapshot);
    vcpu_times(&mut text, snapshot);
    let queues: Vec<_> = snapshot
        .queues
        .iter()
        .map(|queue| Queue {
            device: &queue.device,
            index: queue.queue,
            requests: queue.counters.requests,
            bursts: queue.counters.bursts,
            interrupts: queue.counters.calls,
            interrupts_suppressed: queue.counters.calls_suppressed,
            kicks_enabled: queue.counters.kicks_enabled,
        })
        .collect();
    queue_families(&mut text, &queues);
    doorbells(&mut text, snapshot);
    thread_families(&mut text, &snapshot.threads);
    text.into_string()
}

/// Everything that is counted about a service.
pub(crate) fn of_service(devices: &[DeviceInfo], stats: &Stats) -> String {
    let mut text = Text::default();
    build(&mut text);
    let mut connected = text.gauge("exitless_device_connected", "Whether a front end is connected.");
    for device in devices {
        let labels: &[(&str, &dyn Display)] = &[("device", &device.name), ("kind", &device.kind)];
        connected.add(labels, u8::from(device.peer_pid.is_some()));
    }
    disks(&mut text, stats);
    let queue = |device, queue: &QueueStats| Queue {
        device,
        index: queue.index,
        requests: queue.requests,
        bursts: queue.bursts,
        interrupts: queue.calls,
        interrupts_suppressed: queue.calls_suppressed,
        kicks_enabled: queue.kicks_enabled,
    };
    let queues: Vec<_> = stats
        .devices
        .iter()
        .flat_map(|device| device.queues.iter().map(|each| queue(device.name.as_str(), each)))
        .collect();
    queue_families(&mut text, &queues);
    let threads: Vec<_> = stats
        .threads
        .iter()
        .map(|thread| ThreadSnapshot {
            name: thread.name.clone(),
            cpu: thread.cpu,
            busy_ns: thread.busy_ns,
            asleep_ns: thread.asleep_ns,
            total_ns: thread.total_ns,
            sleeps: thread.sleeps,
        })
        .collect();
    thread_families(&mut text, &threads);
    text.into_string()
}

fn build(text: &mut Text) {
    let mut family = text.gauge("exitless_build_info", "The version that runs; always 1.");
    family.add(&[("version", &env!("CARGO_PKG_VERSION"))], 1);
}

fn exits(text: &mut Text, snapshot: &Snapshot) {
    let vcpus = || snapshot.vcpus.iter().enumerate();
    let mut all = text.counter("exitless_vm_vcpu_exits_total", "VM exits, each counted once.");
    for (vcpu, counted) in vcpus() {
        all.add(&[("vcpu", &vcpu)], counted.exits());
    }
    let help = "VM exits by the kernel's reasons; one exit may have two of them.";
    let mut by_reason = text.counter("exitless_vm_exits_total", help);
    for (vcpu, counted) in vcpus() {
        for (name, &count) in &counted.kvm {
            if let Some(reason) = name.strip_suffix("_exits") {
                by_reason.add(&[("vcpu", &vcpu), ("reason", &reason)], count);
            }
        }
    }
    let help = "VM exits that came to user space, by reason.";
    let mut user = text.counter("exitless_vm_user_exits_total", help);
    for (vcpu, counted) in vcpus() {
        for (reason, count) in counted.user_exits.by_reason() {
            user.add(&[("vcpu", &vcpu), ("reason", &reason)], count);
        }
    }
}

fn vcpu_times(text: &mut Text, snapshot: &Snapshot) {
    type Time = (&'static str, &'static str, fn(&VcpuSnapshot) -> u64);
    const TIMES: [Time; 5] = [
        (
            "exitless_vm_inside_seconds_total",
            "Time in KVM_RUN, as of the last return from it: in the guest, asleep for it, or in the kernel's exit handling.",
            |vcpu| vcpu.inside_ns,
        ),
        (
            "exitless_vm_outside_seconds_total",
            "Time between two runs of KVM_RUN: exit handling in user space.",
            |vcpu| vcpu.outside_ns,
        ),
        ("exitless_vm_cpu_seconds_total", "Processor time of virtual CPUs: the scheduler's sum.", |vcpu| {
            vcpu.run_ns
        }),
        (
            "exitless_vm_guest_cpu_seconds_total",
            "Processor time of virtual CPUs in the guest, as sampled by the host's clock tick.",
            |vcpu| vcpu.guest_ns,
        ),
        (
            "exitless_vm_host_cpu_seconds_total",
            "Processor time of virtual CPUs that was left for the host: the scheduler's sum without the guest's.",
            |vcpu| vcpu.host_ns,
        ),
    ];
    for (name, help, time) in TIMES {
        let mut family = text.counter(name, help);
        for (vcpu, counted) in snapshot.vcpus.iter().enumerate() {
            family.add(&[("vcpu", &vcpu)], seconds(time(counted)));
        }
    }
    let help = "Exit-handling time (EHT) as a share of the virtual CPUs' processor time, since the start; none in the \
                first second of that.";
    let mut family = text.gauge("exitless_vm_exit_handling_ratio", help);
    if let Some(percent) = snapshot.eht_percent() {
        family.add(&[], percent / 100.0);
    }
    let help = "By how much that may be wrong, either way: two standard deviations of a sampled share.";
    let mut family = text.gauge("exitless_vm_exit_handling_ratio_error", help);
    if let Some(percent) = snapshot.eht_error_percent() {
        family.add(&[], percent / 100.0);
    }
}

fn doorbells(text: &mut Text, snapshot: &Snapshot) {
    type Count = (&'static str, &'static str, fn(&vmm::stats::QueueSnapshot) -> u64);
    const COUNTS: [Count; 3] = [
        ("exitless_queue_kicks_total", "Kicks that caused an exit.", |queue| queue.doorbell.kicks),
        (
            "exitless_queue_doorbell_maps_total",
            "Times the notification page became ordinary memory.",
            |queue| queue.doorbell.maps,
        ),
        (
            "exitless_queue_doorbell_faults_total",
            "Page faults of the guest from one such time to the next.",
            |queue| queue.doorbell.faults,
        ),
    ];
    for (name, help, count) in COUNTS {
        let mut family = text.counter(name, help);
        for queue in &snapshot.queues {
            family.add(&[("device", &queue.device), ("queue", &queue.queue)], count(queue));
        }
    }
}

fn disks(text: &mut Text, stats: &Stats) {
    let disks = || stats.devices.iter().filter_map(|device| Some((&device.name, device.blk.as_ref()?)));
    let mut requests = text.counter("exitless_disk_requests_total", "Requests of disks by type.");
    for (name, disk) in disks() {
        for (kind, count) in [("read", disk.reads), ("write", disk.writes), ("other", disk.others)] {
            requests.add(&[("device", name), ("type", &kind)], count);
        }
    }
    let mut bytes = text.counter("exitless_disk_bytes_total", "Bytes that requests moved, by type.");
    for (name, disk) in disks() {
        for (kind, count) in [("read", disk.read_bytes), ("write", disk.written_bytes)] {
            bytes.add(&[("device", name), ("type", &kind)], count);
        }
    }
    let mut errors = text.counter("exitless_disk_errors_total", "Requests that failed.");
    disks().for_each(|(name, disk)| errors.add(&[("device", name)], disk.errors));
    let mut throttled = text.counter("exitless_disk_throttled_total", "Times a limit kept requests waiting.");
    disks().for_each(|(name, disk)| throttled.add(&[("device", name)], disk.throttled));
}

/// What all queues count.
struct Queue<'a> {
    device: &'a str,
    index: u16,
    requests: u64,
    bursts: u64,
    interrupts: u64,
    interrupts_suppressed: u64,
    kicks_enabled: u64,
}

fn queue_families(text: &mut Text, queues: &[Queue<'_>]) {
    type Count = (&'static str, &'static str, fn(&Queue<'_>) -> u64);
    const COUNTS: [Count; 5] = [
        ("exitless_queue_requests_total", "Requests taken from the ring.", |queue| queue.requests),
        ("exitless_queue_bursts_total", "Bursts they came in.", |queue| queue.bursts),
        ("exitless_queue_interrupts_total", "Interrupts raised to announce completions.", |queue| {
            queue.interrupts
        }),
        (
            "exitless_queue_interrupts_suppressed_total",
            "Completions published whose driver wanted no interrupt.",
            |queue| queue.interrupts_suppressed,
        ),
        (
            "exitless_queue_kicks_enabled_total",
            "Times kicks were asked for because the I/O thread was about to sleep.",
            |queue| queue.kicks_enabled,
        ),
    ];
    for (name, help, count) in COUNTS {
        let mut family = text.counter(name, help);
        for queue in queues {
            family.add(&[("device", &queue.device), ("queue", &queue.index)], count(queue));
        }
    }
}

fn thread_families(text: &mut Text, threads: &[ThreadSnapshot]) {
    type Time = (&'static str, &'static str, fn(&ThreadSnapshot) -> u64);
    // What is derived from several of them, read one after the other, would not only grow.
    const TIMES: [Time; 3] = [
        (
            "exitless_io_thread_seconds_total",
            "Time that an I/O thread has lived. Without its time asleep, it is its CPU time.",
            |thread| thread.total_ns,
        ),
        ("exitless_io_thread_busy_seconds_total", "Of that, time in turns that did work.", |thread| {
            thread.busy_ns
        }),
        ("exitless_io_thread_asleep_seconds_total", "Of that, time asleep.", |thread| thread.asleep_ns),
    ];
    for (name, help, time) in TIMES {
        let mut family = text.counter(name, help);
        for thread in threads {
            family.add(&[("thread", &thread.name), ("cpu", &thread.cpu)], seconds(time(thread)));
        }
    }
    let mut sleeps = text.counter("exitless_io_thread_sleeps_total", "Times an I/O thread went to sleep.");
    for thread in threads {
        sleeps.add(&[("thread", &thread.name), ("cpu", &thread.cpu)], thread.sleeps);
    }
}

#[cfg(test)]
mod tests;

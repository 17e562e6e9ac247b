//! Which figures there are, and what they are called.

use std::fmt::Display;

use vmm::Snapshot;
use vmm::stats::VcpuSnapshot;

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
    let threads: Vec<_> = snapshot
        .threads
        .iter()
        .map(|thread| Thread {
            name: &thread.name,
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
        .map(|thread| Thread {
            name: &thread.name,
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
    const TIMES: [Time; 4] = [
        (
            "exitless_vm_inside_seconds_total",
            "Time in KVM_RUN: in the guest, asleep for it, or in the kernel's exit handling.",
            |vcpu| vcpu.inside_ns,
        ),
        (
            "exitless_vm_outside_seconds_total",
            "Time between two runs of KVM_RUN: exit handling in user space.",
            |vcpu| vcpu.outside_ns,
        ),
        (
            "exitless_vm_guest_cpu_seconds_total",
            "Processor time of virtual CPUs in the guest, by the host's clock tick.",
            |vcpu| vcpu.guest_ns,
        ),
        (
            "exitless_vm_host_cpu_seconds_total",
            "Processor time of virtual CPUs in the host, by the host's clock tick.",
            |vcpu| vcpu.host_ns,
        ),
    ];
    for (name, help, time) in TIMES {
        let mut family = text.counter(name, help);
        for (vcpu, counted) in snapshot.vcpus.iter().enumerate() {
            family.add(&[("vcpu", &vcpu)], seconds(time(counted)));
        }
    }
    let help = "Exit-handling time (EHT) as a share of the virtual CPUs' processor time, since the start.";
    let mut family = text.gauge("exitless_vm_exit_handling_ratio", help);
    if let Some(percent) = snapshot.eht_percent() {
        family.add(&[], percent / 100.0);
    }
}

fn doorbells(text: &mut Text, snapshot: &Snapshot) {
    type Count = (&'static str, &'static str, fn(&vmm::stats::QueueSnapshot) -> u64);
    const COUNTS: [Count; 2] = [
        ("exitless_queue_kicks_total", "Kicks that caused an exit.", |queue| queue.doorbell.kicks),
        (
            "exitless_queue_doorbell_maps_total",
            "Times the notification page became ordinary memory.",
            |queue| queue.doorbell.maps,
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

/// An I/O thread.
struct Thread<'a> {
    name: &'a str,
    cpu: u32,
    busy_ns: u64,
    asleep_ns: u64,
    total_ns: u64,
    sleeps: u64,
}

fn thread_families(text: &mut Text, threads: &[Thread<'_>]) {
    let help = "Time of I/O threads: busy with requests, polling in vain, asleep. CPU time is the first two.";
    let mut times = text.counter("exitless_io_thread_seconds_total", help);
    for thread in threads {
        // The three are read one after the other, while they grow.
        let polling_ns = thread.total_ns.saturating_sub(thread.busy_ns.saturating_add(thread.asleep_ns));
        let states = [("busy", thread.busy_ns), ("polling", polling_ns), ("asleep", thread.asleep_ns)];
        for (state, ns) in states {
            let labels: &[(&str, &dyn Display)] =
                &[("thread", &thread.name), ("cpu", &thread.cpu), ("state", &state)];
            times.add(labels, seconds(ns));
        }
    }
    let mut sleeps = text.counter("exitless_io_thread_sleeps_total", "Times an I/O thread went to sleep.");
    for thread in threads {
        sleeps.add(&[("thread", &thread.name), ("cpu", &thread.cpu)], thread.sleeps);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use vmm::stats::{QueueSnapshot, ThreadSnapshot};

    use super::*;

    fn snapshot() -> Snapshot {
        let vcpu = VcpuSnapshot {
            kvm: [("exits".into(), 7), ("io_exits".into(), 5), ("halt_exits".into(), 0)].into(),
            inside_ns: 3_000_000_000,
            outside_ns: 1_000_000_000,
            ..VcpuSnapshot::default()
        };
        let queue = |queue| QueueSnapshot { device: "disk0".into(), queue, ..QueueSnapshot::default() };
        let thread = ThreadSnapshot {
            name: "io-2".into(),
            cpu: 2,
            busy_ns: 1_500_000_000,
            asleep_ns: 250_000_000,
            total_ns: 2_000_000_000,
            sleeps: 4,
        };
        Snapshot {
            at_ns: 1,
            vcpus: vec![vcpu.clone(), vcpu],
            queues: vec![queue(0), queue(1)],
            threads: vec![thread],
        }
    }

    #[test]
    fn a_machine_has_its_figures_in_base_units() {
        let page = of_machine(&snapshot());
        for line in [
            "exitless_vm_vcpu_exits_total{vcpu=\"1\"} 7",
            "exitless_vm_exits_total{vcpu=\"0\",reason=\"io\"} 5",
            "exitless_vm_exits_total{vcpu=\"0\",reason=\"halt\"} 0",
            "exitless_vm_user_exits_total{vcpu=\"0\",reason=\"mmio_writes\"} 0",
            "exitless_vm_outside_seconds_total{vcpu=\"0\"} 1",
            "exitless_vm_exit_handling_ratio 0.25",
            "exitless_queue_requests_total{device=\"disk0\",queue=\"1\"} 0",
            "exitless_queue_kicks_total{device=\"disk0\",queue=\"0\"} 0",
            "exitless_io_thread_seconds_total{thread=\"io-2\",cpu=\"2\",state=\"polling\"} 0.25",
            "exitless_io_thread_sleeps_total{thread=\"io-2\",cpu=\"2\"} 4",
        ] {
            assert!(page.lines().any(|found| found == line), "no `{line}` in:\n{page}");
        }
    }

    #[test]
    fn a_service_has_its_figures() {
        let device = |name: &str, peer_pid| DeviceInfo {
            name: name.into(),
            kind: "blk".into(),
            socket: "/a".into(),
            peer_pid,
            queues: 1,
            queues_running: 1,
            poll: "hybrid".into(),
            bytes: None,
            last_error: None,
        };
        let queue = QueueStats {
            index: 0,
            failed: false,
            requests: 9,
            bursts: 1,
            calls: 2,
            calls_suppressed: 0,
            kicks_enabled: 0,
        };
        let blk = crate::control::BlkStats {
            reads: 8,
            read_bytes: 4096,
            writes: 1,
            written_bytes: 512,
            others: 0,
            errors: 0,
            throttled: 3,
        };
        let stats = crate::control::DeviceStats { name: "vm1".into(), queues: vec![queue], blk: Some(blk) };
        let stats = Stats { devices: vec![stats], threads: Vec::new() };
        let page = of_service(&[device("vm1", Some(7)), device("vm2", None)], &stats);
        for line in [
            "exitless_device_connected{device=\"vm1\",kind=\"blk\"} 1",
            "exitless_device_connected{device=\"vm2\",kind=\"blk\"} 0",
            "exitless_disk_requests_total{device=\"vm1\",type=\"read\"} 8",
            "exitless_disk_bytes_total{device=\"vm1\",type=\"write\"} 512",
            "exitless_queue_interrupts_total{device=\"vm1\",queue=\"0\"} 2",
        ] {
            assert!(page.lines().any(|found| found == line), "no `{line}` in:\n{page}");
        }
    }

    #[test]
    fn every_sample_belongs_to_the_family_above_it_and_no_family_comes_twice() {
        let page = of_machine(&snapshot());
        let (mut families, mut samples, mut family) = (BTreeSet::new(), BTreeSet::new(), "");
        for line in page.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert!(families.insert(name), "{name} comes twice");
                assert_eq!(name.ends_with("_total"), kind == "counter", "{name}");
                family = name;
            } else if !line.starts_with("# HELP ") {
                let (sample, value) = line.rsplit_once(' ').unwrap();
                assert_eq!(sample.split('{').next(), Some(family));
                assert!(samples.insert(sample), "{sample} comes twice");
                assert!(value.parse::<f64>().unwrap() >= 0.0, "{line}");
            }
        }
    }
}

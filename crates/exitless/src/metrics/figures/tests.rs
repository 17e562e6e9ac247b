//! Pages as scrapers see them.

use std::collections::BTreeSet;

use vmm::stats::{QueueSnapshot, ThreadSnapshot};

use super::*;

fn snapshot() -> Snapshot {
    let vcpu = VcpuSnapshot {
        kvm: [("exits".into(), 7), ("io_exits".into(), 5), ("halt_exits".into(), 0)].into(),
        inside_ns: 3_000_000_000,
        outside_ns: 1_000_000_000,
        run_ns: 500_000_000,
        guest_ns: 250_000_000,
        host_ns: 250_000_000,
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
        "exitless_vm_cpu_seconds_total{vcpu=\"1\"} 0.5",
        "exitless_vm_exit_handling_ratio 0.5",
        "exitless_vm_exit_handling_ratio_error 0.1",
        "exitless_queue_requests_total{device=\"disk0\",queue=\"1\"} 0",
        "exitless_queue_kicks_total{device=\"disk0\",queue=\"0\"} 0",
        "exitless_io_thread_asleep_seconds_total{thread=\"io-2\",cpu=\"2\"} 0.25",
        "exitless_io_thread_sleeps_total{thread=\"io-2\",cpu=\"2\"} 4",
    ] {
        assert!(page.lines().any(|found| found == line), "no `{line}` in:\n{page}");
    }
}

#[test]
fn exit_handling_is_told_from_a_second_of_processor_time_on() {
    let page = |run_ns| {
        let mut snapshot = snapshot();
        snapshot.vcpus.iter_mut().for_each(|vcpu| vcpu.run_ns = run_ns);
        of_machine(&snapshot)
    };
    let ratio = "\nexitless_vm_exit_handling_ratio ";
    assert!(!page(400_000_000).contains(ratio));
    assert!(page(500_000_000).contains(&format!("{ratio}0.5\n")));
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

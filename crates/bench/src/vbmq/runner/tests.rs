use super::*;
use crate::case::Op;
use crate::vbmq::place::Place;

fn runner<'a>(rows: &'a Rows, stop: &'a AtomicBool, cpus: u32) -> Runner<'a> {
    let places = (0..cpus).map(|cpu| Place { cpu, core: cpu, cache: 0, storage: false }).collect();
    Runner::new(rows, places, Storage::new(None, true), 50, stop)
}

fn condition(qd: u16, jobs: u16) -> Condition {
    Condition { backend: BackendKind::Null, op: Op::RandRead, qd, jobs }
}

/// The arguments of row `name` on a machine of `cpus`, without the program.
fn arguments(name: &str, cpus: u32, condition: &Condition) -> Vec<String> {
    let (rows, stop) = (Rows::embedded().unwrap(), AtomicBool::new(false));
    let runner = runner(&rows, &stop, cpus);
    let row = rows.all.iter().find(|row| row.name == name).unwrap();
    let target = Target { kind: condition.backend, bytes: 8 << 30, path: None };
    let backend = rows.backend(row, condition.backend).unwrap();
    runner.command(row, condition, &target, backend, Some(Path::new("/g.elf")), Path::new("/d"))[1..].to_vec()
}

#[test]
fn the_baseline_has_one_queue_with_all_requests() {
    let line = arguments("a", 2, &condition(32, 2)).join(" ");
    assert!(line.contains("--jobs 1 --qd 64") && line.contains("null:8589934592,queues=1"), "{line}");
    assert!(line.contains("--poll notify") && line.contains("--completion interrupt"), "{line}");
    assert!(line.contains("--io-pin off --io-threads 1") && !line.contains("--verify"), "{line}");
    let line = arguments("c", 2, &condition(32, 2)).join(" ");
    assert!(line.contains("--jobs 2 --qd 32") && line.contains("--io-threads 2"), "{line}");
}

#[test]
fn pinned_rows_name_their_cpus() {
    let line = arguments("h", 4, &condition(1, 2)).join(" ");
    assert!(line.contains("--io-cpus 0,2 --vcpu-cpus 1,3"), "{line}");
    assert!(line.contains("--doorbell map") && line.contains("--completion polled"), "{line}");
    let line = arguments("h", 2, &condition(1, 2)).join(" ");
    assert!(line.contains("--io-cpus 0 --vcpu-cpus 1"), "{line}");
}

#[test]
fn nothing_is_left_to_fill_in() {
    let rows = Rows::embedded().unwrap();
    for row in rows.all.iter().filter(|row| row.kind != RowKind::BareMetal) {
        for word in arguments(&row.name, 2, &condition(1, 2)) {
            let json = word.starts_with('{') || !word.contains('{');
            assert!(json && !word.is_empty() && !word.contains("{b") && !word.contains("{q"), "{word}");
        }
    }
}

#[test]
fn lists_become_words() {
    let line = arguments("qemu-iothreads", 2, &condition(1, 2));
    let at = line.iter().position(|word| word == "iothread,id=io0").unwrap();
    assert_eq!(line[at - 1..at + 3], ["-object", "iothread,id=io0", "-object", "iothread,id=io1"]);
    let mapping = r#""iothread-vq-mapping":[{"iothread":"io0"},{"iothread":"io1"}]"#;
    assert!(line.last().unwrap().contains(mapping), "{line:?}");
}

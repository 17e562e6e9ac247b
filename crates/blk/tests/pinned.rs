//! Guest memory that is pinned for a queue: on the thread that asks for the queue, where nobody waits for it.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::PathBuf;
use std::sync::Arc;

use blk::Backend;
use blk::backends::file::{Direct, Engine, File, FileOptions};
use virtio::memory::Mapping;
use virtio::{GuestAddr, Memory, Region};

const MEMORY_BYTES: u64 = 4 << 20;

/// Kilobytes that this process has pinned (proc_pid_status(5)).
fn pinned_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPin:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn memory_is_pinned_before_the_io_thread_has_the_queue() {
    let path =
        PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("exitless-pin-{}", std::process::id()));
    std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let options = FileOptions {
        direct: Direct::On,
        engine: Engine::Uring,
        fixed_buffers: true,
        ..FileOptions::default()
    };
    let file = File::open(&path, options);
    std::fs::remove_file(&path).unwrap();
    let file = match file {
        Ok(file) => file,
        Err(error) => return needs::skip(error),
    };
    let (mapping, _) = Mapping::anonymous("pinned", MEMORY_BYTES).unwrap();
    let memory =
        Arc::new(Memory::new(vec![Region::new(GuestAddr(0x1000), Arc::new(mapping)).unwrap()]).unwrap());
    let before = pinned_kib();
    let builder = file.channel(&memory, 64).unwrap();
    let prepared = pinned_kib();
    if prepared == before {
        return needs::skip("this system pins nothing, or does not say so");
    }
    assert!(prepared - before >= MEMORY_BYTES / 1024, "from {before} to {prepared} KiB");
    let serve = move || {
        let _channel = builder().unwrap();
        assert_eq!(pinned_kib(), prepared, "nothing is left to pin on the thread that serves");
    };
    std::thread::spawn(serve).join().unwrap();
}

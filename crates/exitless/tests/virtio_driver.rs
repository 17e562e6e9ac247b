//! The `virtio-driver` crate, a user-space driver that shares no code with this project, against the program.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]
#![allow(unsafe_code, reason = "the driver takes buffers as raw memory that it shares with the device")]

use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{Ordering, fence};

use virtio::memory::{Backing, Mapping};
use virtio_driver::{VhostUser, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags};

/// Several queues (virtio 1.2, section 5.2.3).
const VIRTIO_BLK_F_MQ: u64 = 1 << 12;
const QUEUES: usize = 4;
const DEPTH: usize = 16;
const REQUEST_BYTES: usize = 4096;
const ROUNDS: usize = 50;
const DISK_BYTES: usize = 64 << 20;

/// The program, serving a disk in a file. Killed when dropped.
struct Service {
    child: Child,
    socket: String,
}

impl Service {
    fn start(name: &str) -> Self {
        Self::start_after("true", name, "")
    }

    /// The same from a shell that has run `before`; `options` are the backend's.
    fn start_after(before: &str, name: &str, options: &str) -> Self {
        let socket = std::env::temp_dir()
            .join(format!("exitless-vd-{}-{name}", std::process::id()))
            .display()
            .to_string();
        let disk = format!("{socket}.raw");
        std::fs::File::create(&disk).unwrap().set_len(DISK_BYTES as u64).unwrap();
        let mut child = Command::new("sh")
            .args(["-c", &format!("{before}; exec \"$0\" \"$@\""), env!("CARGO_BIN_EXE_exitless")])
            .args([
                "blk",
                "--backend",
                &format!("file:{disk}{options}"),
                "--socket",
                &socket,
                "--queues",
                &QUEUES.to_string(),
            ])
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().starts_with("ready: ")), "the service is ready");
        std::thread::spawn(move || lines.for_each(|line| println!("service: {}", line.unwrap_or_default())));
        Self { child, socket }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
        let _ = std::fs::remove_file(format!("{}.raw", self.socket));
    }
}

/// What request `slot` of a queue writes in a round.
fn pattern(queue: usize, round: usize, slot: usize) -> u8 {
    (queue * 61 + round * 7 + slot * 3 + 1) as u8
}

fn carries_data(name: &str, features: VirtioFeatureFlags) {
    let service = Service::start(name);
    let features = features.bits() | VIRTIO_BLK_F_MQ;
    let mut transport: Box<VirtioBlkTransport> = Box::new(VhostUser::new(&service.socket, features).unwrap());
    assert_eq!(transport.get_features() & features, features, "all that was asked for is offered");
    assert_eq!(transport.max_queues(), Some(QUEUES));
    let mut queues = VirtioBlkQueue::<usize>::setup_queues(&mut *transport, QUEUES, 64).unwrap();

    let bytes = QUEUES * DEPTH * REQUEST_BYTES;
    let (buffers, file) = Mapping::anonymous("buffers", bytes as u64).unwrap();
    let base = buffers.base().as_ptr();
    transport.map_mem_region(base.addr(), bytes, file.as_raw_fd(), 0).unwrap();
    let buffer = |queue: usize, slot: usize| base.wrapping_add((queue * DEPTH + slot) * REQUEST_BYTES);
    let fill = |queue: usize, slot: usize, byte: u8| {
        // SAFETY: the slot lies in the mapping, and no request on it is in flight.
        unsafe { std::ptr::write_bytes(buffer(queue, slot), byte, REQUEST_BYTES) }
    };
    let notifiers: Vec<_> = (0..QUEUES).map(|queue| transport.get_submission_notifier(queue)).collect();
    let offset = |queue: usize, round: usize, slot: usize| {
        (((queue * ROUNDS + round) * DEPTH + slot) * REQUEST_BYTES % DISK_BYTES) as u64
    };
    // Each queue works on its own part of the disk; all have their requests in flight at once.
    let mut run = |request: &dyn Fn(&mut VirtioBlkQueue<'_, usize>, usize, usize)| {
        for (index, queue) in queues.iter_mut().enumerate() {
            for slot in 0..DEPTH {
                request(queue, index, slot);
            }
            // For a split ring without event index the driver leaves this out, and could lose its kick.
            fence(Ordering::SeqCst);
            if queue.avail_notif_needed() {
                notifiers[index].notify().unwrap();
            }
        }
        for (index, queue) in queues.iter_mut().enumerate() {
            let mut seen = [false; DEPTH];
            while seen.contains(&false) {
                for completion in queue.completions() {
                    assert_eq!(completion.ret, 0, "queue {index} request {}", completion.context);
                    assert!(!std::mem::replace(&mut seen[completion.context], true), "completed once");
                }
                std::thread::yield_now();
            }
        }
    };
    for round in 0..ROUNDS {
        for queue in 0..QUEUES {
            (0..DEPTH).for_each(|slot| fill(queue, slot, pattern(queue, round, slot)));
        }
        run(&|queue, index, slot| {
            let at = offset(index, round, slot);
            // SAFETY: the buffer stays mapped and untouched until the completion, which `run` waits for.
            unsafe { queue.write_raw(at, buffer(index, slot), REQUEST_BYTES, slot) }.unwrap();
        });
    }
    run(&|queue, _, slot| queue.flush(slot).unwrap());
    for round in (0..ROUNDS).rev() {
        for queue in 0..QUEUES {
            (0..DEPTH).for_each(|slot| fill(queue, slot, 0));
        }
        run(&|queue, index, slot| {
            let at = offset(index, round, slot);
            // SAFETY: as for the writes.
            unsafe { queue.read_raw(at, buffer(index, slot), REQUEST_BYTES, slot) }.unwrap();
        });
        for queue in 0..QUEUES {
            for slot in 0..DEPTH {
                // SAFETY: the request is over, nobody writes the buffer.
                let data = unsafe { std::slice::from_raw_parts(buffer(queue, slot), REQUEST_BYTES) };
                let expected = pattern(queue, round, slot);
                assert!(data.iter().all(|&byte| byte == expected), "queue {queue} round {round} slot {slot}");
            }
        }
    }
    drop(service);
}

#[test]
fn split_rings_carry_data() {
    carries_data("split", VirtioFeatureFlags::VERSION_1);
}

#[test]
fn split_rings_with_indirect_tables_and_event_index_carry_data() {
    let features = VirtioFeatureFlags::VERSION_1
        | VirtioFeatureFlags::RING_INDIRECT_DESC
        | VirtioFeatureFlags::RING_EVENT_IDX;
    carries_data("event", features);
}

#[test]
fn packed_rings_carry_data() {
    carries_data("packed", VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_PACKED);
}

/// Beyond a limit of file sizes the kernel refuses a write, and sends a signal besides.
#[test]
fn a_write_beyond_the_limit_of_file_sizes_fails_alone() {
    for engine in ["uring", "inline"] {
        // 16 or 32 MiB: shells count in different units.
        let service =
            Service::start_after("ulimit -f 32768", &format!("limit-{engine}"), &format!(",engine={engine}"));
        let features = VirtioFeatureFlags::VERSION_1.bits();
        let mut transport: Box<VirtioBlkTransport> =
            Box::new(VhostUser::new(&service.socket, features).unwrap());
        let mut queues = VirtioBlkQueue::<usize>::setup_queues(&mut *transport, 1, 128).unwrap();
        let (buffer, file) = Mapping::anonymous("buffer", REQUEST_BYTES as u64).unwrap();
        let base = buffer.base().as_ptr();
        transport.map_mem_region(base.addr(), REQUEST_BYTES, file.as_raw_fd(), 0).unwrap();
        let notifier = transport.get_submission_notifier(0);
        let mut write = |at: usize| {
            // SAFETY: the buffer stays mapped and untouched until the completion, which is waited for.
            unsafe { queues[0].write_raw(at as u64, base, REQUEST_BYTES, 0) }.unwrap();
            notifier.notify().unwrap();
            loop {
                if let Some(completion) = queues[0].completions().next() {
                    return completion.ret;
                }
                std::thread::yield_now();
            }
        };
        let results = [0, DISK_BYTES - REQUEST_BYTES, 0].map(&mut write);
        assert!(results[0] == 0 && results[1] != 0 && results[2] == 0, "{engine}: {results:?}");
    }
}

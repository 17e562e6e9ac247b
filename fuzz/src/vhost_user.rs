//! A front end that says anything, with any descriptors, to a real server on a real socket.

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use reactor::{Mode, Pool};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vhost_user::{Options, Server};
use virtio::QueueSet;

use crate::input::Input;

const MEMORY_BYTES: u64 = 1 << 20;

/// Runs one input: messages, well formed or not, with descriptors or without.
///
/// # Panics
/// The server does not end the connection, or takes no further one: a bug.
pub fn run(data: &[u8]) {
    let mut stream = UnixStream::connect(server()).expect("the server accepts connections");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a time-out can be set");
    stream.set_write_timeout(Some(Duration::from_secs(20))).expect("a time-out can be set");
    let mut input = Input::new(data);
    let mut messages = 0;
    while !input.is_empty() && messages < 64 {
        if !send(&stream, &mut input) {
            break;
        }
        messages += 1;
    }
    let _ = stream.shutdown(Shutdown::Write);
    let mut replies = Vec::new();
    if let Err(error) = stream.read_to_end(&mut replies) {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "the server does not hang up");
    }
}

/// A server that lives as long as the process, with a device of one queue.
fn server() -> &'static PathBuf {
    static SOCKET: OnceLock<PathBuf> = OnceLock::new();
    SOCKET.get_or_init(|| {
        // Rust programs ignore it, and the fuzzer's main function is none.
        let seen = Arc::new(AtomicBool::new(false));
        signal_hook::flag::register(signal_hook::consts::SIGPIPE, seen).expect("a signal can be caught");
        let socket = std::env::temp_dir().join(format!("exitless-fuzz-{}", std::process::id()));
        let device = Arc::new(rng::Rng::new(None));
        let pool = Arc::new(Pool::start(reactor::Options::default()).expect("an I/O thread"));
        let queues = QueueSet::new(device, pool, Mode::Hybrid, "fuzz");
        let server = Server::new(queues, &Options::new(&socket)).expect("a socket to serve at");
        let never = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
        std::thread::spawn(move || server.run(never.as_fd()));
        socket
    })
}

/// Sends one message; false if the server has hung up.
fn send(stream: &UnixStream, input: &mut Input<'_>) -> bool {
    let (code, flags, shape) = (input.u8(), input.u8(), input.u8());
    let len = usize::from(input.u8());
    let mut body = input.bytes(len).to_vec();
    if shape & 0x10 != 0 {
        // Bodies are mostly small numbers in 64-bit fields.
        body = body.iter().flat_map(|&byte| u64::from(byte).to_ne_bytes()).collect();
    }
    let claimed = if shape & 0x20 != 0 { u32::from(input.u16()) } else { body.len() as u32 };
    let version = if shape & 0x40 != 0 { u32::from(flags) } else { 1 | u32::from(flags & 8) };
    let mut bytes: Vec<u8> =
        [u32::from(code % 48), version, claimed].iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.extend(body);
    let fds: Vec<OwnedFd> = (0..shape & 3).filter_map(|_| descriptor(input.u8())).collect();
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&fds));
    }
    sendmsg(stream, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL).is_ok()
}

fn descriptor(kind: u8) -> Option<OwnedFd> {
    match kind % 5 {
        0 | 1 => eventfd(0, EventfdFlags::CLOEXEC).ok(),
        2 => {
            let memory = memfd_create("fuzz", MemfdFlags::CLOEXEC).ok()?;
            ftruncate(&memory, MEMORY_BYTES >> (kind >> 4)).ok()?;
            Some(memory)
        }
        3 => rustix::pipe::pipe().ok().map(|(read, _write)| read),
        _ => std::fs::File::open("/dev/null").ok().map(OwnedFd::from),
    }
}

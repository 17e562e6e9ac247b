//! The program's last duties: it leaves nothing of an image in this host's cache, and nothing that a successor needs in
//! the hands of a thread that is stuck.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

#[path = "../../blk/tests/fuse/mod.rs"]
mod fuse;
mod guest;
mod process;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use fuse::Failing;
use guest::{BLOCK, Guest, IN, OUT, eventually, front_end};
use process::{Scratch, Service};
use rustix::process::{Signal, kill_process};
use vhost::VhostBackend;
use vmm_sys_util::eventfd::EventFd;

/// Another host may serve the image next, and knows nothing of this one's cache.
#[test]
fn nothing_of_an_image_is_left_in_the_cache_when_its_service_ends() {
    for engine in ["uring", "inline"] {
        for told_by_front_end in [true, false] {
            let context = format!("{engine}, told by its front end: {told_by_front_end}");
            let Some(storage) = Failing::new(16 * BLOCK) else { return };
            let scratch = Scratch::new();
            let socket = scratch.path("a.sock");
            let image = storage.path_for_others();
            let backend = format!("file:{},direct=off,engine={engine}", image.display());
            let mut service = Service::start(&["blk", "--socket", &socket, "--backend", &backend]);
            service.line("ready: ");
            let mut guest = Guest::new(&socket);
            let data = [7; BLOCK];
            assert_eq!(guest.request(OUT, 3, &data), 0, "{context}");
            assert!(!storage.has(3 * BLOCK, &data), "{context}: what the test is about");
            let before = storage.fsyncs();
            if told_by_front_end {
                guest.frontend.get_vring_base(0).unwrap();
            } else {
                assert_eq!(service.end(Signal::TERM), Some(0), "{context}");
            }
            assert!(storage.fsyncs() > before, "{context}: nobody asked for it to be durable");
            assert!(storage.has(3 * BLOCK, &data), "{context}: the next host would read old data");
            if told_by_front_end {
                assert_eq!(service.end(Signal::TERM), Some(0), "{context}");
            }
        }
    }
}

/// Two disks in one process: the front end of the one leaves a thread stuck, and the other's image, socket and guest are
/// a successor's when the process was told to end, although it cannot go before the thread does.
#[test]
fn a_thread_that_is_stuck_in_a_close_keeps_nothing_from_a_successor() {
    let scratch = Scratch::new();
    let sockets = ["a", "b"].map(|name| scratch.path(&format!("{name}.sock")));
    let mut config = String::new();
    for socket in &sockets {
        let image = format!("{socket}.raw");
        File::create(&image).unwrap().set_len(1 << 20).unwrap();
        config += &format!("[[blk]]\nsocket = '{socket}'\nbackend = 'file:{image}'\n");
    }
    let file = scratch.path("vm.toml");
    std::fs::write(&file, config).unwrap();
    let start = || {
        let service = Service::start(&["serve", "--config", &file]);
        sockets.iter().for_each(|_| drop(service.line("ready: ")));
        service
    };
    let mut service = start();
    // Behind the service: its process is waited for after the file system has let go of it.
    let Some(stuck) = Failing::new(BLOCK) else { return };
    let mut neighbour = Guest::new(&sockets[1]);
    assert_eq!(neighbour.request(OUT, 1, &[9; BLOCK]), 0);

    let hostile = front_end(&sockets[0]);
    let closing = into_eventfd(File::options().write(true).open(stuck.path()).unwrap());
    stuck.hold_one_close();
    let _ = hostile.set_vring_call(0, &closing);
    eventually("a thread is stuck", || stuck.held() == 1);
    drop((closing, hostile));
    assert_eq!(neighbour.request(IN, 1, &[]), 0);
    kill_process(service.pid(), Signal::TERM).unwrap();
    service.line("stopped: ");
    assert!(!sockets.iter().any(|socket| Path::new(socket).exists()));
    let mut successor = start();
    let mut neighbour = Guest::new(&sockets[1]);
    assert_eq!(neighbour.request(IN, 1, &[]), 0);
    assert_eq!(successor.end(Signal::TERM), Some(0));
    stuck.release();
    assert_eq!(service.code(), Some(0));
}

/// The front end's library sends eventfds only.
#[allow(unsafe_code, reason = "a descriptor of another kind is to be sent as an eventfd")]
fn into_eventfd(file: impl Into<OwnedFd>) -> EventFd {
    use std::os::fd::{FromRawFd, IntoRawFd};
    // SAFETY: whatever it is, it is open and ours to give; it is only sent and closed.
    unsafe { EventFd::from_raw_fd(file.into().into_raw_fd()) }
}

//! Descriptors that make whoever closes, polls or writes to them wait: for a network peer, for a program that serves a
//! file system, for a page fault. Their front end may lose its connection; the device serves the next one, and the
//! neighbour on the same I/O thread never hears of it.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use reactor::Pool;
use rustix::event::epoll;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vhost::VhostBackend;
use vhost::vhost_user::message::FrontendReq;
use virtio::RingFormat;

use crate::blocked::neighbours;
use crate::fuse::{FILE_BYTES, Fuse};
use crate::host::{Host, Vm, eventually};
use crate::raw::{NEED_REPLY, Raw, longs};

/// A neighbour that is served, and the device of a front end that is up to no good.
struct Scene {
    neighbour: Vm,
    good: Host,
    bad: Host,
    _pool: Arc<Pool>,
}

impl Scene {
    fn new() -> Self {
        let (pool, good, bad) = neighbours();
        let neighbour = Vm::new(&good, RingFormat::Split, 1);
        Self { neighbour, good, bad, _pool: pool }
    }

    /// The front end that is up to no good, with all negotiated.
    fn hostile(&self) -> Raw {
        eventually("the device is free", || self.bad.handle.status().peer.is_none());
        let mut raw = Raw::connect(&self.bad.path);
        raw.negotiate(0);
        raw
    }

    /// The neighbour is served, and the device serves a decent front end.
    fn check(&mut self) {
        self.check_neighbour();
        eventually("the device is free", || self.bad.handle.status().peer.is_none());
        Vm::new(&self.bad, RingFormat::Split, 1).echo(0, b"sound");
    }

    fn check_neighbour(&mut self) {
        let mark = self.neighbour.guest.mark();
        self.neighbour.echo(0, b"still there");
        self.neighbour.guest.rewind(mark);
    }

    /// Nobody waits for what is still stuck.
    fn stop(mut self) {
        self.bad.stop();
        self.check_neighbour();
        drop(self.neighbour);
        self.good.stop();
    }
}

fn refuses(raw: &mut Raw, request: FrontendReq, fd: BorrowedFd<'_>) {
    raw.send(request, NEED_REPLY, &longs(&[0]), &[fd]);
    assert_eq!(raw.reply_u64(), Some(1), "{request:?}");
}

/// A connection whose last close waits for its peer, which never reads: longer than any test waits.
fn lingering() -> (OwnedFd, TcpListener, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (theirs, _) = listener.accept().unwrap();
    ours.set_nonblocking(true).unwrap();
    while ours.write(&[0; 1 << 16]).is_ok() {}
    rustix::net::sockopt::set_socket_linger(&ours, Some(Duration::from_secs(3600))).unwrap();
    (ours.into(), listener, theirs)
}

#[test]
fn a_socket_that_lingers_is_closed_where_nobody_waits() {
    let mut scene = Scene::new();
    for request in [FrontendReq::SET_VRING_CALL, FrontendReq::SET_VRING_ERR, FrontendReq::SET_VRING_KICK] {
        let mut raw = scene.hostile();
        let (fd, _listener, _theirs) = lingering();
        raw.send(request, NEED_REPLY, &longs(&[0]), &[fd.as_fd()]);
        // The service has the only one.
        drop(fd);
        assert_eq!(raw.reply_u64(), Some(1), "{request:?}");
        scene.check_neighbour();
        drop(raw);
        scene.check();
    }
    scene.stop();
}

#[test]
fn an_epoll_over_a_file_that_a_program_serves_is_not_asked() {
    let Some(fuse) = Fuse::new() else { return };
    let mut scene = Scene::new();
    let file = fuse.open();
    let watch = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    epoll::add(&watch, &file, epoll::EventData::new_u64(0), epoll::EventFlags::IN).unwrap();
    for request in [FrontendReq::SET_VRING_KICK, FrontendReq::SET_VRING_CALL, FrontendReq::SET_BACKEND_REQ_FD]
    {
        let mut raw = scene.hostile();
        refuses(&mut raw, request, watch.as_fd());
        scene.check_neighbour();
    }
    scene.check();
    assert_eq!(fuse.unanswered.polls.load(Ordering::SeqCst), 0, "nobody polls it");
    scene.stop();
    std::mem::forget(file);
}

/// Closing such a file is a request to the program, whatever message it came with.
#[test]
fn a_file_that_a_program_serves_is_closed_where_nobody_waits() {
    let Some(fuse) = Fuse::new() else { return };
    let mut scene = Scene::new();
    let file = fuse.open();
    for (count, request) in (1..).zip([
        FrontendReq::SET_VRING_CALL,
        FrontendReq::SET_BACKEND_REQ_FD,
        FrontendReq::SET_OWNER,
        FrontendReq::SET_LOG_FD,
    ]) {
        let mut raw = scene.hostile();
        raw.send(request, NEED_REPLY, &longs(&[0]), &[file.as_fd()]);
        assert!(raw.reply_u64().is_some(), "{request:?}");
        eventually("it is being closed", || fuse.unanswered.flushes.load(Ordering::SeqCst) == count);
        drop(raw);
        scene.check();
    }
    let mut raw = scene.hostile();
    let region = longs(&[0, 0x10_0000, 4096, 0x7000_0000, 0]);
    raw.send(FrontendReq::ADD_MEM_REG, NEED_REPLY, &region, &[file.as_fd()]);
    assert_eq!(raw.reply_u64(), Some(1));
    drop(raw);
    scene.check();
    scene.stop();
    std::mem::forget(file);
}

/// Of threads that are stuck there is no end but by the front ends of one device.
#[test]
fn a_device_whose_threads_are_all_stuck_serves_again_when_they_are_not() {
    let Some(fuse) = Fuse::new() else { return };
    let mut scene = Scene::new();
    let file = fuse.open();
    for _ in 0..8 {
        let mut raw = scene.hostile();
        refuses(&mut raw, FrontendReq::SET_VRING_CALL, file.as_fd());
    }
    eventually("the last one is gone", || scene.bad.handle.status().peer.is_none());
    let mut waiting = Raw::connect(&scene.bad.path);
    waiting.send(FrontendReq::GET_QUEUE_NUM, 0, &[], &[]);
    for _ in 0..100 {
        scene.check_neighbour();
    }
    assert_eq!(scene.bad.handle.status().sessions, 8, "nobody else is accepted");
    std::mem::forget(file);
    drop(fuse);
    assert_eq!(waiting.reply_u64(), Some(2));
    drop(waiting);
    scene.check();
    scene.stop();
}

/// The reader of a pipe holds its lock while it writes to its memory.
#[allow(unsafe_code, reason = "maps a file for a reader to get stuck in")]
#[test]
fn a_pipe_whose_reader_is_stuck_holds_up_its_front_end_only() {
    let Some(fuse) = Fuse::new() else { return };
    let mut scene = Scene::new();
    let (read, write) = rustix::pipe::pipe().unwrap();
    rustix::io::write(&write, &[0; 8]).unwrap();
    let file = fuse.open();
    let (access, shared) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
    // SAFETY: a new mapping at an address of the kernel's choice, of a file that nobody cuts.
    let map = unsafe { mmap(null_mut(), FILE_BYTES as usize, access, shared, &file, 0) }.unwrap() as usize;
    let reader = std::thread::spawn(move || {
        // SAFETY: the mapping lives until this thread is joined, and only the kernel writes to it.
        let buffer = unsafe { std::slice::from_raw_parts_mut(map as *mut u8, 8) };
        let _ = rustix::io::read(&read, buffer);
    });
    eventually("the reader is stuck", || fuse.unanswered.reads.load(Ordering::SeqCst) > 0);
    for request in [FrontendReq::SET_VRING_CALL, FrontendReq::SET_VRING_ERR, FrontendReq::SET_BACKEND_REQ_FD]
    {
        let raw = scene.hostile();
        raw.send(request, NEED_REPLY, &longs(&[0]), &[write.as_fd()]);
        scene.check_neighbour();
        drop(raw);
        scene.check();
    }
    scene.stop();
    std::mem::forget(file);
    drop(fuse);
    reader.join().unwrap();
    // SAFETY: mapped above, and nobody uses it any more.
    unsafe { munmap(map as *mut _, FILE_BYTES as usize) }.unwrap();
}

/// User-Mode Linux listens on a pipe.
#[test]
fn calls_come_through_a_pipe() {
    let host = Host::new(1);
    let mut vm = Vm::new(&host, RingFormat::Split, 1);
    let (read, write) = rustix::pipe::pipe().unwrap();
    crate::blocked::set_call(&mut vm, write);
    let mut calls = std::fs::File::from(read);
    let mut call = [0; 8];
    calls.read_exact(&mut call).unwrap();
    assert_eq!(u64::from_ne_bytes(call), 1, "a new descriptor is signalled once");
    for i in 0..100u32 {
        let at = vm.offer(0, &i.to_le_bytes());
        loop {
            if vm.lines[0].driver.ring.reap().unwrap().is_some() {
                break;
            }
            if !vm.lines[0].driver.ring.arm_calls() {
                calls.read_exact(&mut call).unwrap();
                assert_eq!(u64::from_ne_bytes(call), 1);
            }
        }
        assert_eq!(vm.guest.read(at, 4), i.to_le_bytes());
    }
    // And through an eventfd again.
    vm.frontend.set_vring_call(0, &vm.lines[0].call).unwrap();
    vm.echo(0, b"data");
}

//! Memory that comes, goes, and is not what it was said to be.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use reactor::{Mode, Pool};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::FrontendReq;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use virtio::RingFormat;

use crate::device::Echo;
use crate::guest::{Driver, Guest, START, USER};
use crate::host::{Host, Vm, eventually, wait_readable};
use crate::raw::{Raw, longs};

#[test]
fn slots_come_and_go_under_running_rings() {
    let host = Host::new(2);
    for format in [RingFormat::Split, RingFormat::Packed] {
        let mut vm = Vm::negotiated(&host, format);
        assert_eq!(vm.frontend.get_max_mem_slots().unwrap(), 509);
        let table = vm.guest.table();
        vm.frontend.add_mem_region(&table[0]).unwrap();
        for index in 0..2 {
            let driver = Driver::new(&mut vm.guest, format, 64, true);
            vm.add(index, driver, 0);
        }
        vm.echo(0, b"one slot");
        vm.frontend.add_mem_region(&table[1]).unwrap();
        vm.echo(1, b"two slots");
        // The rings' own slot is replaced: they stop when it goes, and go on when it is back.
        vm.frontend.remove_mem_region(&table[0]).unwrap();
        let at = vm.offer(0, b"in between");
        vm.frontend.add_mem_region(&table[0]).unwrap();
        vm.wait(0, 1);
        assert_eq!(vm.guest.read(at, 10), b"in between");
        vm.echo(1, b"again");
        drop(vm);
        eventually("the session ends", || host.handle.status().peer.is_none());
    }
}

#[test]
fn a_new_table_replaces_the_old_one_under_running_rings() {
    let host = Host::new(1);
    let mut vm = Vm::new(&host, RingFormat::Split, 1);
    for _ in 0..20 {
        vm.echo(0, b"data");
        vm.frontend.set_mem_table(&vm.guest.table()).unwrap();
    }
}

#[test]
fn a_refused_region_changes_nothing() {
    let host = Host::new(1);
    let mut vm = Vm::new(&host, RingFormat::Split, 1);
    let file = |bytes: u64| {
        let fd = memfd_create("short", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, bytes).unwrap();
        File::from(fd)
    };
    let short = file(4096);
    let directory = File::open("/").unwrap();
    let device = File::open("/dev/null").unwrap();
    let (pipe, _other) = rustix::pipe::pipe().unwrap();
    let pipe = File::from(pipe);
    let region = |file: &File, guest: u64, bytes: u64, offset: u64| VhostUserMemoryRegionInfo {
        guest_phys_addr: guest,
        memory_size: bytes,
        userspace_addr: guest,
        mmap_offset: offset,
        mmap_handle: file.as_raw_fd(),
    };
    let free = 1 << 40;
    // Less than a page is a front end's own affair.
    let small = region(&short, free, 3792, 0);
    vm.frontend.add_mem_region(&small).unwrap();
    vm.frontend.remove_mem_region(&small).unwrap();
    for refused in [
        region(&short, free, 8192, 0),
        region(&short, free, 4096, 4096),
        region(&short, free, 4096, u64::MAX - 4096),
        region(&short, u64::MAX - 4095, 4095, 0),
        region(&short, START, 4096, 0),
        region(&short, free + 512, 512, 0),
        region(&short, free + 4095, 1, 0),
        region(&directory, free, 4096, 0),
        region(&device, free, 4096, 0),
        region(&pipe, free, 4096, 0),
    ] {
        let guest = refused.guest_phys_addr;
        // A range that ends at 2^64 - 1 is sound; only the address space's end is not.
        if guest == u64::MAX - 4095 {
            vm.frontend.add_mem_region(&refused).unwrap();
            vm.frontend.remove_mem_region(&refused).unwrap();
            continue;
        }
        vm.frontend.add_mem_region(&refused).expect_err("refused");
        vm.frontend.set_mem_table(&[refused]).err();
        vm.frontend.set_mem_table(&vm.guest.table()).unwrap();
        vm.echo(0, b"still there");
    }
    let absent = region(&short, free, 4096, 0);
    vm.frontend.remove_mem_region(&absent).expect_err("refused");
    vm.echo(0, b"still there");
}

#[test]
fn more_regions_than_there_are_slots_are_refused() {
    let host = Host::new(1);
    let vm = Vm::negotiated(&host, RingFormat::Split);
    let mut frontend = vm.frontend.clone();
    let file = &vm.guest.files[0];
    let region = |i: u64| VhostUserMemoryRegionInfo {
        guest_phys_addr: i * 8192,
        memory_size: 4096,
        userspace_addr: USER + i * 8192,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    for i in 0..509 {
        frontend.add_mem_region(&region(i)).unwrap();
    }
    frontend.add_mem_region(&region(509)).expect_err("the 510th");
    frontend.remove_mem_region(&region(100)).unwrap();
    frontend.add_mem_region(&region(509)).unwrap();
}

#[test]
fn front_ends_with_all_the_regions_there_may_be_leave_room_for_others() {
    let pool = Arc::new(Pool::start(reactor::Options::default()).unwrap());
    let hosts: Vec<Host> = (0..9)
        .map(|i| Host::on(pool.clone(), &format!("disk{i}"), Echo::new(1), |_| {}, Mode::Hybrid))
        .collect();
    let vms: Vec<Vm> = hosts.iter().map(|host| Vm::negotiated(host, RingFormat::Split)).collect();
    for vm in &vms {
        for i in 0..509 {
            let region = VhostUserMemoryRegionInfo {
                guest_phys_addr: i * 8192,
                memory_size: 4096,
                userspace_addr: USER + i * 8192,
                mmap_offset: 0,
                mmap_handle: vm.guest.files[0].as_raw_fd(),
            };
            vm.frontend.clone().add_mem_region(&region).unwrap();
        }
    }
}

#[test]
fn memory_that_is_taken_away_stops_its_rings_with_a_reason() {
    let host = Host::new(2);
    let mut vm = Vm::negotiated(&host, RingFormat::Split);
    let memfd: OwnedFd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    let bytes = 1 << 20;
    ftruncate(&memfd, bytes).unwrap();
    let second = VhostUserMemoryRegionInfo {
        guest_phys_addr: START - bytes,
        memory_size: bytes,
        userspace_addr: USER + START - bytes,
        mmap_offset: 0,
        mmap_handle: memfd.as_raw_fd(),
    };
    let mut table = vm.guest.table();
    table.push(second);
    vm.frontend.set_mem_table(&table).unwrap();
    let driver = Driver::new(&mut vm.guest, RingFormat::Split, 64, true);
    vm.add(0, driver, 0);
    vm.echo(0, b"whole");
    ftruncate(&memfd, 0).unwrap();
    // A request whose buffer was there.
    let line = &mut vm.lines[0];
    let gone = virtio::ring::Buffer { addr: virtio::GuestAddr(START - bytes), len: 4096, writable: false };
    for _ in 0..3 {
        let taken = host.device.switches.taken.load(Ordering::SeqCst);
        // The first touches the missing page; the next burst finds that it has gone.
        line.driver.ring.add(&[gone]).unwrap();
        line.driver.ring.publish();
        line.kick.write(1).unwrap();
        eventually("the request is taken or the queue stopped", || {
            host.device.switches.taken.load(Ordering::SeqCst) > taken || host.handle.status().queues[0].failed
        });
    }
    wait_readable(&vm.lines[0].err);
    assert!(host.handle.status().queues[0].failed);
    // The connection is as it was.
    assert_eq!(vm.frontend.get_queue_num().unwrap(), 2);
}

#[test]
fn a_region_may_be_removed_with_a_descriptor_in_the_message() {
    use std::os::fd::AsFd;
    let host = Host::new(1);
    let guest = Guest::new(1, 1 << 20);
    let mut raw = Raw::connect(&host.path);
    raw.negotiate(0);
    let region = guest.raw_table()[0];
    let (at, len, user) = (region.guest_phys_addr, region.memory_size, region.user_addr);
    let body = longs(&[0, at, len, user, 0]);
    let fd = guest.files[0].as_fd();
    for request in [FrontendReq::ADD_MEM_REG, FrontendReq::REM_MEM_REG] {
        raw.send(request, crate::raw::NEED_REPLY, &body, &[fd]);
        assert_eq!(raw.reply_u64(), Some(0));
    }
    raw.send(FrontendReq::REM_MEM_REG, crate::raw::NEED_REPLY, &body, &[]);
    assert_eq!(raw.reply_u64(), Some(1), "it is not there any more");
}

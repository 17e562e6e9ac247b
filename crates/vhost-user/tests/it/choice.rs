//! What a driver has written to the configuration space, and for how long it is in force.

use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;

use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserInflight};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use virtio::RingFormat;

use crate::device::WRITABLE_AT;
use crate::guest::Driver;
use crate::host::{Host, Vm, eventually};

const FIELD: VhostUserConfigFlags = VhostUserConfigFlags::WRITABLE;
/// What the field holds unless a driver writes to it.
const DEFAULT: u8 = WRITABLE_AT as u8;

fn write(frontend: &mut Frontend, value: u8) {
    frontend.set_config(WRITABLE_AT, FIELD, &[value]).unwrap();
}

fn read(frontend: &mut Frontend) -> u8 {
    frontend.get_config(WRITABLE_AT, 1, FIELD, &[0]).unwrap().1[0]
}

fn in_force(host: &Host) -> u8 {
    host.device.config.lock().unwrap()[WRITABLE_AT as usize]
}

fn gone(host: &Host) {
    eventually("the session ends", || host.handle.status().peer.is_none());
}

#[test]
fn what_was_written_outlives_the_connection() {
    let host = Host::new(1);
    for format in [RingFormat::Split, RingFormat::Packed] {
        let mut vm = Vm::new(&host, format, 1);
        write(&mut vm.frontend, 99);
        drop(vm);
        gone(&host);
        assert_eq!(in_force(&host), 99);
        // A front end that takes up its connection again says nothing of it and does not ask.
        let mut vm = Vm::new(&host, format, 1);
        vm.echo(0, b"back");
        assert_eq!(in_force(&host), 99);
        // It may be told that the configuration has changed, and read it then.
        assert_eq!(read(&mut vm.frontend), 99);
        assert_eq!(host.device.resets.load(Ordering::SeqCst), 0);
    }
}

#[test]
fn a_front_end_that_begins_by_reading_finds_the_default() {
    let host = Host::new(1);
    let mut vm = Vm::new(&host, RingFormat::Split, 1);
    write(&mut vm.frontend, 99);
    drop(vm);
    gone(&host);
    let mut vm = Vm::negotiated(&host, RingFormat::Split);
    assert_eq!(read(&mut vm.frontend), DEFAULT);
    // What its own driver writes stays, whatever is read later.
    write(&mut vm.frontend, 98);
    assert_eq!(read(&mut vm.frontend), 98);
}

#[test]
fn a_reset_is_in_force_when_its_result_is_read() {
    let host = Host::new(1);
    let mut vm = Vm::new(&host, RingFormat::Split, 1);
    write(&mut vm.frontend, 99);
    // A front end that remembers what it has read shows its driver that, also after a reset.
    vm.frontend.reset_device().unwrap();
    vm.lines.clear();
    let driver = Driver::new(&mut vm.guest, RingFormat::Split, 64, true);
    vm.add(0, driver, 0);
    vm.echo(0, b"data");
    assert_eq!((in_force(&host), read(&mut vm.frontend)), (99, 99));
    // One that reads again shows what it reads.
    vm.frontend.reset_device().unwrap();
    assert_eq!(read(&mut vm.frontend), DEFAULT);
    assert_eq!(host.device.resets.load(Ordering::SeqCst), 1);
}

#[test]
fn a_device_is_told_when_it_takes_over_the_driver_of_another_service() {
    let asked = VhostUserInflight::new(0, 0, 1, 64);
    for format in [RingFormat::Split, RingFormat::Packed] {
        let first = Host::new(1);
        let take_overs = |host: &Host| host.device.take_overs.load(Ordering::SeqCst);
        let mut vm = Vm::negotiated(&first, format);
        vm.frontend.set_mem_table(&vm.guest.table()).unwrap();
        let (info, record) = vm.frontend.get_inflight_fd(&asked).unwrap();
        vm.frontend.set_inflight_fd(&info, record.as_raw_fd()).unwrap();
        let driver = Driver::new(&mut vm.guest, format, 64, true);
        vm.add(0, driver, 0);
        vm.echo(0, b"data");
        vm.frontend.set_inflight_fd(&info, record.as_raw_fd()).unwrap();
        drop(vm);
        gone(&first);
        // The same service knows the record.
        let mut vm = Vm::negotiated(&first, format);
        vm.frontend.set_inflight_fd(&info, record.as_raw_fd()).unwrap();
        assert_eq!(take_overs(&first), 0);
        drop(vm);
        drop(first);

        let second = Host::new(1);
        let mut vm = Vm::negotiated(&second, format);
        vm.frontend.set_inflight_fd(&info, record.as_raw_fd()).unwrap();
        assert_eq!(take_overs(&second), 1);
        vm.frontend.set_inflight_fd(&info, record.as_raw_fd()).unwrap();
        assert_eq!(take_overs(&second), 1, "once is enough");
        // What it assumes then is not undone by reading it.
        read(&mut vm.frontend);
        assert_eq!(second.device.resets.load(Ordering::SeqCst), 0);
        // The record of a driver that begins anew.
        let (info, record) = vm.frontend.get_inflight_fd(&asked).unwrap();
        vm.frontend.set_inflight_fd(&info, record.as_raw_fd()).unwrap();
        assert_eq!(take_overs(&second), 1);
    }
}

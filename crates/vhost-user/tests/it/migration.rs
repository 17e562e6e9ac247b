//! What survives: pages, device state, requests in flight.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::Ordering;

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{
    VhostTransferStateDirection as Direction, VhostTransferStatePhase as Phase, VhostUserInflight,
};
use vhost::{VhostBackend, VhostUserDirtyLogRegion};
use virtio::memory::{Area, Backing, Mapping};
use virtio::{GuestAddr, RingFormat};

use crate::guest::{Driver, START};
use crate::host::{Host, LOG_ALL, Vm, eventually};

/// The pages marked in a log, which is cleared.
fn take_pages(log: &std::sync::Arc<Mapping>) -> Vec<u64> {
    let backing: std::sync::Arc<dyn Backing> = log.clone();
    let area = Area::new(backing, 0, log.len(), 8).unwrap();
    let mut pages = Vec::new();
    for byte in 0..log.len() {
        let bits = area.u8(byte).swap(0, Ordering::SeqCst);
        pages.extend((0..8).filter(|bit| bits & 1 << bit != 0).map(|bit| byte as u64 * 8 + bit));
    }
    pages
}

#[test]
fn writes_are_logged_while_logging_is_on() {
    for format in [RingFormat::Split, RingFormat::Packed] {
        let host = Host::new(1);
        let mut vm = Vm::new(&host, format, 1);
        let end = START + (8 << 20);
        let (log, file) = Mapping::anonymous("log", end / 4096 / 8).unwrap();
        let log = std::sync::Arc::new(log);
        vm.echo(0, b"not logged");
        assert!(take_pages(&log).is_empty());

        // As QEMU does: the log, the features, the addresses.
        let region = VhostUserDirtyLogRegion {
            mmap_size: log.len() as u64,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        };
        vm.frontend.set_log_base(0, Some(region)).unwrap();
        vm.frontend.set_features(vm.features | LOG_ALL).unwrap();
        let mut addresses = vm.lines[0].driver.addresses();
        addresses.flags = 1;
        addresses.log_addr = Some(vm.lines[0].driver.config.device.0);
        vm.frontend.set_vring_addr(0, &addresses).unwrap();

        // The answer in a page of its own.
        let _ = vm.guest.alloc(8192);
        let at = vm.offer(0, b"logged");
        vm.wait(0, 1);
        let pages = take_pages(&log);
        assert!(pages.contains(&(at.0 / 4096)), "{pages:?} has the answer at {at}");
        let config = vm.lines[0].driver.config;
        let used = if format == RingFormat::Split { config.device } else { config.desc };
        assert!(pages.contains(&(used.0 / 4096)), "{pages:?} has what was used in the ring at {used}");

        vm.frontend.set_features(vm.features).unwrap();
        vm.frontend.set_vring_addr(0, &vm.lines[0].driver.addresses()).unwrap();
        let _ = take_pages(&log);
        vm.echo(0, b"not logged");
        assert!(take_pages(&log).is_empty());
    }
}

fn pipe() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap()
}

#[test]
fn device_state_goes_from_one_back_end_to_another() {
    let (source, destination) = (Host::new(1), Host::new(1));
    // More than a pipe holds.
    let state: Vec<u8> = (0..1_000_000u32).map(|i| (i % 251) as u8).collect();
    source.device.state.lock().unwrap().clone_from(&state);
    let from = Vm::negotiated(&source, RingFormat::Split).frontend;
    let to = Vm::negotiated(&destination, RingFormat::Split).frontend;

    let (read, write) = pipe();
    assert!(from.set_device_state_fd(Direction::SAVE, Phase::STOPPED, write).unwrap().is_none());
    let mut saved = Vec::new();
    std::fs::File::from(read).read_to_end(&mut saved).unwrap();
    from.check_device_state().unwrap();
    assert_eq!(saved, state);

    let (read, write) = pipe();
    assert!(to.set_device_state_fd(Direction::LOAD, Phase::STOPPED, read).unwrap().is_none());
    let mut write = std::fs::File::from(write);
    write.write_all(&saved).unwrap();
    drop(write);
    to.check_device_state().unwrap();
    assert_eq!(*destination.device.state.lock().unwrap(), state);
}

#[test]
fn device_state_that_is_bad_incomplete_or_out_of_turn_is_refused() {
    let host = Host::new(1);
    let mut vm = Vm::new(&host, RingFormat::Split, 1);
    let load = |vm: &Vm, data: &[u8]| {
        let (read, write) = pipe();
        vm.frontend.set_device_state_fd(Direction::LOAD, Phase::STOPPED, read)?;
        std::fs::File::from(write.try_clone().unwrap()).write_all(data).unwrap();
        Ok::<_, vhost::Error>(write)
    };
    // A ring is running.
    let (read, _write) = pipe();
    vm.frontend.set_device_state_fd(Direction::LOAD, Phase::STOPPED, read).expect_err("refused");
    vm.frontend.get_vring_base(0).unwrap();
    vm.frontend.check_device_state().expect_err("nothing was transferred");
    // The device does not like it.
    drop(load(&vm, b"bad state").unwrap());
    vm.frontend.check_device_state().expect_err("refused by the device");
    // The front end asks before the end of the data.
    let open = load(&vm, b"good st").unwrap();
    vm.frontend.check_device_state().expect_err("incomplete");
    drop(open);
    assert_eq!(*host.device.state.lock().unwrap(), b"initial");
    // Nobody reads.
    let (read, write) = pipe();
    drop(read);
    vm.frontend.set_device_state_fd(Direction::SAVE, Phase::STOPPED, write).unwrap();
    vm.frontend.check_device_state().expect_err("not saved");
    // An eventfd is no pipe.
    let eventfd = crate::negotiation::new_eventfd();
    vm.frontend.set_device_state_fd(Direction::LOAD, Phase::STOPPED, eventfd).expect_err("refused");
    drop(load(&vm, b"good state").unwrap());
    vm.frontend.check_device_state().unwrap();
    assert_eq!(*host.device.state.lock().unwrap(), b"good state");
    vm.frontend.set_vring_kick(0, &vm.lines[0].kick).unwrap();
    vm.echo(0, b"running again");
}

#[test]
fn device_state_is_not_saved_before_the_data_are() {
    let host = Host::new(1);
    let mut vm = Vm::new(&host, RingFormat::Split, 1);
    vm.echo(0, b"served");
    vm.frontend.set_vring_enable(0, false).unwrap();
    let never_settles = &host.device.switches.never_settles;
    never_settles.store(true, Ordering::SeqCst);
    let save = |vm: &Vm| {
        let (read, write) = pipe();
        vm.frontend.set_device_state_fd(Direction::SAVE, Phase::STOPPED, write).map(|_| read)
    };
    save(&vm).expect_err("refused");
    never_settles.store(false, Ordering::SeqCst);
    let mut saved = Vec::new();
    std::fs::File::from(save(&vm).unwrap()).read_to_end(&mut saved).unwrap();
    vm.frontend.check_device_state().unwrap();
    assert_eq!(saved, b"initial");
    assert_eq!(*host.device.settled.lock().unwrap(), [0, 0]);
}

#[test]
fn requests_in_flight_survive_the_service() {
    for format in [RingFormat::Split, RingFormat::Packed] {
        let first = Host::new(2);
        let mut vm = Vm::negotiated(&first, format);
        vm.frontend.set_mem_table(&vm.guest.table()).unwrap();
        let asked = VhostUserInflight::new(0, 0, 2, 64);
        let (inflight, file) = vm.frontend.get_inflight_fd(&asked).unwrap();
        assert_eq!((inflight.num_queues, inflight.queue_size, inflight.mmap_offset), (2, 64, 0));
        assert_eq!(file.metadata().unwrap().len(), inflight.mmap_size);
        vm.frontend.set_inflight_fd(&inflight, file.as_raw_fd()).unwrap();
        for index in 0..2 {
            let driver = Driver::new(&mut vm.guest, format, 64, true);
            vm.add(index, driver, 0);
        }
        for i in 0..50u32 {
            vm.echo((i % 2) as usize, &i.to_le_bytes());
        }

        // It takes requests and dies.
        let switches = first.device.switches.clone();
        eventually("all are counted", || switches.taken.load(Ordering::SeqCst) == 50);
        switches.hold.store(true, Ordering::SeqCst);
        switches.lose.store(true, Ordering::SeqCst);
        let lost: Vec<(usize, GuestAddr)> =
            (0..6).map(|i| (i % 2, vm.offer(i % 2, format!("lost {i}").as_bytes()))).collect();
        eventually("the requests are taken", || switches.taken.load(Ordering::SeqCst) == 56);
        drop(first);

        let second = Host::new(2);
        let Vm { guest, lines, .. } = vm;
        let mut vm = Vm::negotiated(&second, format);
        vm.guest = guest;
        vm.frontend.set_mem_table(&vm.guest.table()).unwrap();
        vm.frontend.set_inflight_fd(&inflight, file.as_raw_fd()).unwrap();
        for (index, line) in lines.into_iter().enumerate() {
            // 25 requests are done; a packed ring's position is in the record.
            vm.add(index, line.driver, if format == RingFormat::Split { 25 } else { 0 });
            vm.wait(index, 3);
        }
        for (i, (_, at)) in lost.into_iter().enumerate() {
            assert_eq!(vm.guest.read(at, 6), format!("lost {i}").as_bytes());
        }
        for i in 0..50u32 {
            vm.echo((i % 2) as usize, &i.to_le_bytes());
        }
    }
}

#[test]
fn an_inflight_record_that_does_not_fit_is_refused() {
    let host = Host::new(1);
    let mut vm = Vm::negotiated(&host, RingFormat::Split);
    vm.frontend.set_mem_table(&vm.guest.table()).unwrap();
    let (inflight, file) = vm.frontend.get_inflight_fd(&VhostUserInflight::new(0, 0, 1, 64)).unwrap();
    let beyond = VhostUserInflight::new(inflight.mmap_size + 1, 0, 1, 64);
    vm.frontend.set_inflight_fd(&beyond, file.as_raw_fd()).expect_err("longer than the file");
    let small = VhostUserInflight::new(64, 0, 1, 64);
    vm.frontend.set_inflight_fd(&small, file.as_raw_fd()).unwrap();
    // Found out when the ring is started.
    let driver = Driver::new(&mut vm.guest, RingFormat::Split, 64, true);
    vm.frontend.set_vring_num(0, 64).unwrap();
    vm.frontend.set_vring_addr(0, &driver.addresses()).unwrap();
    let kick = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
    vm.frontend.set_vring_kick(0, &kick).unwrap();
    vm.frontend.set_vring_enable(0, true).expect_err("no room in the record");
    vm.frontend.set_inflight_fd(&inflight, file.as_raw_fd()).unwrap();
    vm.add(0, driver, 0);
    vm.echo(0, b"recorded");
}

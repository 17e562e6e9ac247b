//! A server under test, and a front end that has brought up a device.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use reactor::{Mode, Pool};
use rustix::event::{EventfdFlags, eventfd};
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost_user::{Options, Server, ServerHandle};
use virtio::{Device, QueueSet, RingFormat};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::poll::PollContext;

use crate::device::Echo;
use crate::guest::{Driver, Guest};

pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 30;
pub(crate) const LOG_ALL: u64 = 1 << 26;

pub(crate) struct Host {
    pub(crate) path: PathBuf,
    pub(crate) device: Arc<Echo>,
    pub(crate) handle: ServerHandle,
    shutdown: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl Host {
    pub(crate) fn new(queues: u16) -> Self {
        Self::with(Echo::new(queues), |_| {}, Mode::Hybrid)
    }

    pub(crate) fn with(device: Arc<Echo>, change: impl FnOnce(&mut Options), mode: Mode) -> Self {
        let pool = Arc::new(Pool::start(reactor::Options::default()).unwrap());
        Self::on(pool, "test", device, change, mode)
    }

    /// A device whose queues are served by `pool`, in which no other device has this `label`.
    pub(crate) fn on(
        pool: Arc<Pool>,
        label: &str,
        device: Arc<Echo>,
        change: impl FnOnce(&mut Options),
        mode: Mode,
    ) -> Self {
        let mut options = Options::new(new_path());
        change(&mut options);
        let server = Server::new(QueueSet::new(device.clone(), pool, mode, label), &options).unwrap();
        let handle = server.handle();
        let shutdown = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let until = shutdown.try_clone().unwrap();
        let thread = std::thread::spawn(move || server.run(until.as_fd()).unwrap());
        Self { path: options.socket, device, handle, shutdown, thread: Some(thread) }
    }

    pub(crate) fn frontend(&self) -> Frontend {
        Frontend::connect(&self.path, self.device.queues().into()).unwrap()
    }

    /// Ends the server, and fails if its control thread panicked.
    pub(crate) fn stop(&mut self) {
        rustix::io::write(&self.shutdown, &1u64.to_ne_bytes()).unwrap();
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the control thread has not panicked");
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if self.thread.is_some() && !std::thread::panicking() {
            self.stop();
        }
        // A test that has failed leaves nothing behind either.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A socket path nobody else has.
pub(crate) fn new_path() -> PathBuf {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("exitless-vu-{}-{count}", std::process::id()))
}

/// The limit for what must happen at once on a machine with nothing else to do.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// Waits until `condition` holds.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::yield_now();
    }
}

/// One ring with its descriptors.
pub(crate) struct Line {
    pub(crate) driver: Driver,
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    pub(crate) err: EventFd,
}

/// A front end with the device it has brought up.
pub(crate) struct Vm {
    pub(crate) frontend: Frontend,
    pub(crate) guest: Guest,
    pub(crate) lines: Vec<Line>,
    pub(crate) features: u64,
}

impl Vm {
    /// Brings up `queues` rings of `format`, in the order of the front ends there are.
    pub(crate) fn new(host: &Host, format: RingFormat, queues: usize) -> Self {
        let mut vm = Self::negotiated(host, format);
        vm.frontend.set_mem_table(&vm.guest.table()).unwrap();
        for index in 0..queues {
            let driver = Driver::new(&mut vm.guest, format, 64, true);
            vm.add(index, driver, 0);
        }
        vm
    }

    /// A front end that has negotiated features and set up nothing.
    pub(crate) fn negotiated(host: &Host, format: RingFormat) -> Self {
        let mut frontend = host.frontend();
        frontend.set_owner().unwrap();
        let offered = frontend.get_features().unwrap();
        let mut features = offered & !LOG_ALL & !virtio::features::IN_ORDER;
        if format == RingFormat::Split {
            features &= !virtio::features::RING_PACKED;
        }
        // Not in band: this front end has descriptors.
        let protocol =
            frontend.get_protocol_features().unwrap() & !VhostUserProtocolFeatures::INBAND_NOTIFICATIONS;
        frontend.set_protocol_features(protocol).unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_features(features).unwrap();
        assert_eq!(frontend.get_queue_num().unwrap(), u64::from(host.device.queues()));
        Self { frontend, guest: Guest::new(2, 4 << 20), lines: Vec::new(), features }
    }

    /// Sets up and enables a ring.
    pub(crate) fn add(&mut self, index: usize, driver: Driver, base: u16) {
        let eventfd = || EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
        let line = Line { driver, kick: eventfd(), call: eventfd(), err: eventfd() };
        let frontend = &mut self.frontend;
        frontend.set_vring_num(index, line.driver.config.size).unwrap();
        frontend.set_vring_base(index, base).unwrap();
        frontend.set_vring_addr(index, &line.driver.addresses()).unwrap();
        frontend.set_vring_call(index, &line.call).unwrap();
        frontend.set_vring_err(index, &line.err).unwrap();
        frontend.set_vring_kick(index, &line.kick).unwrap();
        frontend.set_vring_enable(index, true).unwrap();
        assert_eq!(line.call.read().unwrap(), 1, "a new call descriptor is signalled once");
        self.lines.push(line);
    }

    /// Sends one request through a ring and checks the answer.
    pub(crate) fn echo(&mut self, index: usize, data: &[u8]) {
        let at = self.offer(index, data);
        self.wait(index, 1);
        assert_eq!(self.guest.read(at, data.len()), data);
    }

    /// Offers a request, and kicks if the device wants that.
    pub(crate) fn offer(&mut self, index: usize, data: &[u8]) -> virtio::GuestAddr {
        let line = &mut self.lines[index];
        let at = line.driver.offer(&mut self.guest, data);
        if line.driver.ring.needs_kick() {
            line.kick.write(1).unwrap();
        }
        at
    }

    /// Waits for `count` answers, by sleeping until the device calls.
    pub(crate) fn wait(&mut self, index: usize, count: usize) {
        let line = &mut self.lines[index];
        let mut left = count;
        while left > 0 {
            while let Some(completion) = line.driver.ring.reap().unwrap() {
                assert!(completion.written > 0);
                left -= 1;
            }
            if left > 0 && !line.driver.ring.arm_calls() {
                wait_readable(&line.call);
                let _ = line.call.read();
            }
        }
    }
}

pub(crate) fn wait_readable(fd: &EventFd) {
    let context = PollContext::<u32>::new().unwrap();
    context.add(fd, 1).unwrap();
    let events = context.wait_timeout(PATIENCE).unwrap();
    assert!(events.iter_readable().next().is_some(), "not signalled within {PATIENCE:?}");
}

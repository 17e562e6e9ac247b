//! Rings: what the front end says about them, and when their queues run.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};

use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
use virtio::features::RING_PACKED;
use virtio::memory::Mapping;
use virtio::{Call, EventFdCall, Kick, QueueConfig, QueueSet, RingError, RingFormat, StartError};

use super::error::NotStarted;
use super::{Applied, F_LOG_ALL, Reply, Session, SessionError, lock};
use crate::backend_channel::{InBandCall, NOTIFIER_BYTES};
use crate::log;
use crate::peer_log::Kind;
use crate::request::RingAddresses;
use crate::vring::{CallTo, PlaceError, Position, Vring, signal};

impl Session {
    pub(super) fn set_vring_num(&mut self, index: u16, size: u16) -> Applied {
        self.check_ring(index)?;
        let max = self.device.queue_size_max();
        if size > max {
            return Err(SessionError::TooLarge { index, size, max });
        }
        // A new size means a new ring. The old one is gone, so nothing may run until the new one is kicked: a front end
        // without protocol features (User-Mode Linux) has no message to say that it stops using a ring.
        if self.stop(index) {
            self.vrings[usize::from(index)].kick = None;
        }
        self.change(index, |vring| vring.size = Some(size))
    }

    pub(super) fn set_vring_addr(&mut self, index: u16, addresses: RingAddresses) -> Applied {
        self.check_ring(index)?;
        if self.vrings[usize::from(index)].addresses == Some(addresses) && self.queues().is_running(index) {
            return Ok(());
        }
        self.change(index, |vring| vring.addresses = Some(addresses))
    }

    pub(super) fn set_vring_enable(&mut self, index: u16, enable: bool) -> Applied {
        self.check_ring(index)?;
        if self.vrings[usize::from(index)].enabled == enable && self.queues().is_running(index) == enable {
            return Ok(());
        }
        self.change(index, |vring| vring.enabled = enable)
    }

    pub(super) fn get_vring_base(&mut self, index: u16) -> Applied<Reply> {
        self.check_ring(index)?;
        if self.stop(index) {
            let device = self.queues().device().clone();
            device.settle();
        }
        let format = self.format();
        let vring = &mut self.vrings[usize::from(index)];
        vring.kick = None;
        let body = [u32::from(index), vring.base(format)];
        Ok(Reply { body: body.iter().flat_map(|word| word.to_ne_bytes()).collect(), fd: None })
    }

    pub(super) fn set_vring_kick(&mut self, index: u16, fd: Option<OwnedFd>) -> Applied {
        let kick = fd.map_or(Kick::Never, Kick::Fd);
        self.change(index, |vring| vring.kick = Some(kick))
    }

    pub(super) fn vring_kick(&mut self, index: u16) -> Applied {
        self.check_ring(index)?;
        if self.vrings[usize::from(index)].kick.is_none() {
            return self.change(index, |vring| vring.kick = Some(Kick::Wake));
        }
        self.queues().wake(index);
        Ok(())
    }

    pub(super) fn set_vring_call(&mut self, index: u16, fd: Option<OwnedFd>) -> Applied {
        self.check_ring(index)?;
        let call = match fd {
            Some(fd) => CallTo::Fd(self.writable("call descriptor", fd)?),
            None => CallTo::Nobody,
        };
        self.vrings[usize::from(index)].call = call;
        let call = self.call_of(index);
        self.queues().set_call(index, call);
        // An interrupt may have been missed: while the front end was away, or just now by the one that is replaced. Only
        // after the switch no more can be.
        if let CallTo::Fd(call) = &self.vrings[usize::from(index)].call {
            call.call();
        }
        Ok(())
    }

    pub(super) fn set_vring_err(&mut self, index: u16, fd: Option<OwnedFd>) -> Applied {
        self.check_ring(index)?;
        let call = fd.map(|fd| self.writable("error descriptor", fd)).transpose()?;
        *self.vrings[usize::from(index)].error.lock().unwrap_or_else(PoisonError::into_inner) = call;
        Ok(())
    }

    pub(super) fn disable_all(&mut self) {
        for index in self.indices() {
            self.stop(index);
            self.vrings[usize::from(index)].enabled = false;
        }
    }

    /// Makes a change to what one ring's queue depends on.
    pub(super) fn change(&mut self, index: u16, change: impl FnOnce(&mut Vring)) -> Applied {
        self.check_ring(index)?;
        self.stop(index);
        change(&mut self.vrings[usize::from(index)]);
        self.start(index).map_err(|error| error.of(index))
    }

    /// Makes a change that all queues depend on.
    ///
    /// A ring that is in no memory region afterwards waits for the next change: front ends replace a region by removing it
    /// and adding another.
    pub(super) fn reconfigure(&mut self, change: impl FnOnce(&mut Self)) -> Applied {
        for index in self.indices() {
            self.stop(index);
        }
        change(self);
        let mut result = Ok(());
        for index in self.indices() {
            match self.start(index) {
                Err(NotStarted::Place(error @ PlaceError::NotMapped(_))) => {
                    if self.log_limits.admits(Kind::Noted) {
                        tracing::info!(ring = index, %error, "ring stopped until it is in memory again");
                    }
                }
                // The others would wait for the same.
                Err(error @ NotStarted::Queue(StartError::NotReady { .. })) => return Err(error.of(index)),
                Err(error) => result = result.and(Err(error.of(index))),
                Ok(()) => {}
            }
        }
        result
    }

    /// Stops a queue; false if it did not run.
    pub(super) fn stop(&mut self, index: u16) -> bool {
        let mut queues = lock(&self.queues);
        if !queues.is_running(index) {
            return false;
        }
        // None: the queue was lost with the poller. The ring is where the front end last said.
        if let Some(state) = queues.stop(index) {
            self.vrings[usize::from(index)].position = Position::Left(state);
        }
        true
    }

    /// Starts a queue if its ring is to be served.
    pub(super) fn start(&mut self, index: u16) -> Result<(), NotStarted> {
        let vring = &self.vrings[usize::from(index)];
        if !vring.is_ready() || self.queues().is_running(index) {
            return Ok(());
        }
        let Some(place) = vring.place(self.features, &self.memory)? else { return Ok(()) };
        let Some(kick) = &vring.kick else { return Ok(()) };
        let kick = kick.try_clone()?;
        let log = match &self.log {
            Some(log) if self.features & F_LOG_ALL != 0 => Some(log::of_queue(log, place.used_log)),
            _ => None,
        };
        let inflight = match &self.inflight {
            Some(records) => records.of_queue(index, place.config.format, place.config.size)?,
            None => None,
        };
        let memory = self.memory.memory();
        let memory = match &self.lease {
            Some(lease) => Arc::new(memory.leased(lease.lease.clone())),
            None => memory.clone(),
        };
        let config = QueueConfig {
            index,
            features: self.features,
            ring: place.config,
            state: place.state,
            memory,
            kick,
            call: self.call_of(index),
            log,
            inflight,
            on_error: Some(self.on_error(index)),
        };
        if let Some(pid) = self.driver_pid.filter(|_| !self.is_running()) {
            let cpus = reactor::cpus_of_process(pid);
            self.queues().set_driver_cpus(cpus);
        }
        self.queues().start(config)?;
        self.config_unread = false;
        tracing::debug!(ring = index, size = place.config.size, format = ?place.config.format, "ring started");
        self.offer_notifier(index);
        Ok(())
    }

    /// What an I/O thread does when it finds the ring broken.
    pub(super) fn on_error(&self, index: u16) -> Box<dyn FnOnce(&virtio::RingError) + Send> {
        let error = self.vrings[usize::from(index)].error.clone();
        let in_band = self.protocol.contains(Protocol::INBAND_NOTIFICATIONS);
        let channel = self.channel.clone().filter(|_| in_band);
        let needs_reset = self.needs_reset.clone();
        let bell = self.bell.clone();
        Box::new(move |reason| {
            needs_reset.store(true, Ordering::Release);
            if *reason == RingError::CallBlocked {
                // The control thread sees the front end off.
                bell.ring();
            }
            if !signal(&error)
                && let Some(channel) = channel
            {
                channel.ring_error(index);
            }
        })
    }

    /// How completions of a ring are announced: a descriptor goes before messages.
    pub(super) fn call_of(&self, index: u16) -> Option<Arc<dyn Call>> {
        match &self.vrings[usize::from(index)].call {
            CallTo::Fd(call) => Some(call.clone()),
            CallTo::Nobody => None,
            CallTo::Unset if self.protocol.contains(Protocol::INBAND_NOTIFICATIONS) => {
                let channel = self.channel.clone()?;
                Some(Arc::new(InBandCall { channel, index }))
            }
            CallTo::Unset => None,
        }
    }

    /// Offers memory to write to instead of kicking, where nobody waits for kicks.
    pub(super) fn offer_notifier(&mut self, index: u16) {
        let needs = Protocol::HOST_NOTIFIER | Protocol::BACKEND_SEND_FD;
        let Some(channel) = self.channel.clone().filter(|_| self.protocol.contains(needs)) else { return };
        if self.queues().mode(index) != Some(reactor::Mode::Poll) {
            return;
        }
        if self.notifier.is_none() {
            match Mapping::anonymous("vhost-user-notifier", NOTIFIER_BYTES) {
                Ok((_, file)) => self.notifier = Some(file.into()),
                Err(error) if self.log_limits.admits(Kind::Noted) => {
                    tracing::warn!(%error, "no host notifier");
                }
                Err(_) => {}
            }
        }
        if let Some(page) = &self.notifier {
            channel.host_notifier(index, Some(page.as_fd()));
        }
    }

    /// An eventfd that announces something by being written to.
    fn writable(&self, what: &'static str, fd: OwnedFd) -> Applied<Arc<dyn Call>> {
        let call = EventFdCall::new(fd, self.trust.clone())
            .map_err(|source| SessionError::System { what, source })?;
        Ok(Arc::new(call))
    }

    pub(super) fn format(&self) -> RingFormat {
        if self.features & RING_PACKED != 0 { RingFormat::Packed } else { RingFormat::Split }
    }

    pub(super) fn check_ring(&self, index: u16) -> Applied {
        let queues = self.vrings.len() as u16;
        if index < queues { Ok(()) } else { Err(SessionError::NoSuchRing { index, queues }) }
    }

    pub(super) fn indices(&self) -> std::ops::Range<u16> {
        0..self.vrings.len() as u16
    }

    pub(super) fn is_running(&self) -> bool {
        let queues = self.queues();
        self.indices().any(|index| queues.is_running(index))
    }

    pub(super) fn queues(&self) -> MutexGuard<'_, QueueSet> {
        lock(&self.queues)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc::channel;
    use std::time::{Duration, Instant};

    use reactor::{Mode, Pool};
    use rustix::event::{EventfdFlags, eventfd};
    use virtio::{Device, NotReady, PollerBuilder, Queue};

    use super::*;
    use crate::bell::Bell;
    use crate::peer_log::PeerLog;
    use crate::session::SessionOptions;

    /// A device that never gets to do anything.
    struct Idle;

    impl Device for Idle {
        fn device_id(&self) -> u32 {
            63
        }

        fn features(&self) -> u64 {
            0
        }

        fn config(&self) -> Vec<u8> {
            Vec::new()
        }

        fn queues(&self) -> u16 {
            1
        }

        fn start_queue(&self, _: Queue) -> Result<PollerBuilder, NotReady> {
            Err(NotReady("it is idle".to_owned()))
        }
    }

    /// Whether a thread of this process waits for `lock`.
    fn waits_for<T>(thread: rustix::thread::Pid, lock: &Arc<Mutex<T>>) -> bool {
        let call = std::fs::read_to_string(format!("/proc/self/task/{thread}/syscall")).unwrap();
        let start = Arc::as_ptr(lock).addr();
        let mut arguments = call.split_whitespace().skip(1).map_while(|word| word.strip_prefix("0x"));
        let first = arguments.next().and_then(|word| usize::from_str_radix(word, 16).ok());
        first.is_some_and(|address| (start..start + size_of::<Mutex<T>>()).contains(&address))
    }

    /// A driver that hears of it earlier can find nothing, go to sleep again, and miss what the old one is told then.
    #[test]
    fn a_new_call_descriptor_is_signalled_after_the_switch_to_it() {
        let pool = Arc::new(Pool::start(reactor::Options::default()).unwrap());
        let queues = Arc::new(Mutex::new(QueueSet::new(Arc::new(Idle), pool, Mode::Notify, "idle")));
        let new = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let signals = || rustix::io::read(&new, &mut [0; 8]).is_ok();
        let (tell, told) = channel();
        let (allow, allowed) = channel();
        std::thread::scope(|scope| {
            let (shared, fd) = (queues.clone(), new.try_clone().unwrap());
            scope.spawn(move || {
                let bell = Arc::new(Bell::new().unwrap());
                let log = Arc::new(PeerLog::new());
                let mut session = Session::new(shared, SessionOptions::default(), bell, log, Arc::default());
                tell.send(rustix::thread::gettid()).unwrap();
                allowed.recv().unwrap();
                session.set_vring_call(0, Some(fd)).unwrap();
            });
            let thread = told.recv().unwrap();
            // The switch cannot be made.
            let held = lock(&queues);
            allow.send(()).unwrap();
            let deadline = Instant::now() + Duration::from_secs(120);
            while !waits_for(thread, &queues) {
                assert!(Instant::now() < deadline, "it does not come to the switch");
                std::thread::yield_now();
            }
            assert!(!signals(), "before the switch");
            drop(held);
        });
        assert!(signals(), "an interrupt may have been missed");
    }
}

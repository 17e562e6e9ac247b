//! What each request does: a state machine without a socket.
//!
//! A [`Session`] is one front end's hold on the device, from its connection to its end. It collects what the front end
//! says about memory and rings and lets a queue run exactly while its ring is *started* (SET_VRING_KICK or VRING_KICK;
//! GET_VRING_BASE ends it), *enabled* (SET_VRING_ENABLE, or for good if the front end does not know protocol features)
//! and described (size and addresses). When the last of these comes, the queue starts at once, without waiting for a
//! kick, as every back end does: a kick that came before the connection was restored would never come again.
//!
//! A ring that is started and disabled is not served; what the driver put there waits for it to be enabled. (The
//! specification would have a network device throw packets away then. Nothing is lost this way, and no front end
//! disables a ring that its driver uses.)
//!
//! When the session ends, its queues stop and the memory is unmapped. What the driver had set in the device stays: it may
//! be the same driver that comes with the next session, behind a front end that does not repeat it (QEMU). It is forgotten
//! when a front end reads the configuration space before any ring runs. Such a front end shows its driver what it has
//! read; all others go on showing what they know from before, after a lost connection as after RESET_DEVICE.

mod error;
mod migration;
mod rings;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vhost::vhost_user::message::{VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures};
use virtio::features::RING_FEATURES;
use virtio::memory::{DirtyLog, Quota};
use virtio::{Device, QueueSet, Trust};

use crate::backend_channel::Channel;
use crate::bell::Bell;
use crate::device_state::Transfer;
use crate::inflight::{RecordId, Records};
use crate::intake::PeerFd;
use crate::lease::RecordLease;
use crate::memory_table::MemoryTable;
use crate::peer_log::{Kind, PeerLog};
use crate::request::Request;
use crate::vring::{Position, Vring};
use crate::wire::Message;

pub use error::SessionError;
use error::has_own_reply;

/// The front end knows protocol features; its rings start disabled.
const F_PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// Writes to guest memory are logged.
const F_LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();
/// Device status bit: the device has met an error it cannot recover from (virtio 1.2, section 2.1).
const STATUS_NEEDS_RESET: u8 = 64;

/// What this back end can always do.
const PROTOCOL_FEATURES: Protocol = Protocol::MQ
    .union(Protocol::LOG_SHMFD)
    .union(Protocol::REPLY_ACK)
    .union(Protocol::BACKEND_REQ)
    .union(Protocol::CONFIG)
    .union(Protocol::BACKEND_SEND_FD)
    .union(Protocol::INFLIGHT_SHMFD)
    .union(Protocol::RESET_DEVICE)
    .union(Protocol::INBAND_NOTIFICATIONS)
    .union(Protocol::CONFIGURE_MEM_SLOTS)
    .union(Protocol::STATUS)
    .union(Protocol::DEVICE_STATE);

type Applied<T = ()> = Result<T, SessionError>;

/// What is sent back.
#[derive(Debug, Default)]
pub(crate) struct Reply {
    pub(crate) body: Vec<u8>,
    pub(crate) fd: Option<OwnedFd>,
}

impl Reply {
    fn u64(value: u64) -> Self {
        Self { body: value.to_ne_bytes().to_vec(), fd: None }
    }
}

/// What a session needs to know beyond the device.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SessionOptions {
    /// Virtio features not to offer.
    pub(crate) without: u64,
    /// Offer the guest memory to write to instead of kicking.
    pub(crate) host_notifier: bool,
}

/// One front end's hold on a device.
pub(crate) struct Session {
    device: Arc<dyn Device>,
    queues: Arc<Mutex<QueueSet>>,
    options: SessionOptions,
    bell: Arc<Bell>,
    /// The front end's process, if known.
    pub(crate) driver_pid: Option<u32>,
    log_limits: Arc<PeerLog>,
    /// In the descriptors that the front end sends to be written to.
    trust: Trust,
    features: u64,
    protocol: Protocol,
    memory: MemoryTable,
    /// The device's share of the memory mappings in this process.
    mappings: Quota,
    vrings: Vec<Vring>,
    log: Option<DirtyLog>,
    inflight: Option<Records>,
    /// The record of the driver that the device knows, in this session and the ones before.
    record: Arc<Mutex<Option<RecordId>>>,
    /// Under which the queues work on guest memory.
    lease: Option<RecordLease>,
    channel: Option<Arc<Channel>>,
    /// What guests write to instead of kicking. Nobody reads it.
    notifier: Option<OwnedFd>,
    status: u8,
    /// A queue was stopped, and what it stored may still be in this host's memory only.
    unsettled: bool,
    /// A ring broke; set by I/O threads.
    needs_reset: Arc<AtomicBool>,
    transfer: Option<Transfer>,
    /// How the last transfer went; None if there was none.
    transferred: Option<bool>,
    /// The front end is to be told that the configuration changed.
    config_pending: bool,
    /// In the life of the driver that is about to begin, the configuration was neither read nor written.
    config_unread: bool,
}

impl Session {
    /// `bell` is rung when [`Session::flush`] should be called; `record` is that of the device in all its sessions.
    pub(crate) fn new(
        queues: Arc<Mutex<QueueSet>>,
        options: SessionOptions,
        bell: Arc<Bell>,
        log_limits: Arc<PeerLog>,
        record: Arc<Mutex<Option<RecordId>>>,
    ) -> Self {
        let (device, mappings) = {
            let queues = lock(&queues);
            (queues.device().clone(), queues.mappings().clone())
        };
        Self {
            driver_pid: None,
            vrings: (0..device.queues()).map(|_| Vring::default()).collect(),
            device,
            queues,
            options,
            bell,
            log_limits,
            trust: Trust::default(),
            features: 0,
            protocol: Protocol::empty(),
            memory: MemoryTable::new(mappings.clone()),
            mappings,
            log: None,
            inflight: None,
            record,
            lease: None,
            channel: None,
            notifier: None,
            status: 0,
            unsettled: false,
            needs_reset: Arc::default(),
            transfer: None,
            transferred: None,
            config_pending: false,
            config_unread: true,
        }
    }

    /// Carries out a message and says what to send back, if anything.
    ///
    /// # Errors
    /// The message was refused and the front end does not wait to be told: its connection must end.
    pub(crate) fn handle(&mut self, message: Message<PeerFd>) -> Applied<Option<Reply>> {
        let (code, need_reply) = (message.request, message.need_reply);
        let result = Request::parse(message).map_err(SessionError::from).and_then(|request| {
            tracing::trace!(?request, "front end");
            self.apply(request)
        });
        // Asked only now: SET_PROTOCOL_FEATURES itself is acknowledged if it has just switched this on.
        let acknowledge = need_reply && self.protocol.contains(Protocol::REPLY_ACK);
        match result {
            Ok(None) if acknowledge => Ok(Some(Reply::u64(0))),
            Err(error) if acknowledge && !error.is_fatal() && !has_own_reply(code) => {
                if self.log_limits.admits(Kind::Refused) {
                    tracing::warn!(%error, "request refused");
                }
                Ok(Some(Reply::u64(1)))
            }
            result => result,
        }
    }

    /// Carries out a request. None: it has no reply of its own.
    pub(crate) fn apply(&mut self, request: Request) -> Applied<Option<Reply>> {
        self.check_negotiated(&request)?;
        match request {
            Request::GetFeatures => return Ok(Some(Reply::u64(self.offered()))),
            Request::GetProtocolFeatures => return Ok(Some(Reply::u64(self.offered_protocol().bits()))),
            Request::GetQueueNum => return Ok(Some(Reply::u64(self.vrings.len() as u64))),
            Request::GetMaxMemSlots => return Ok(Some(Reply::u64(MemoryTable::SLOTS_MAX))),
            Request::GetStatus => return Ok(Some(Reply::u64(self.status().into()))),
            Request::GetConfig { offset, len, flags } => {
                return Ok(Some(self.get_config(offset, len, flags)));
            }
            Request::GetVringBase { index } => return self.get_vring_base(index).map(Some),
            Request::GetInflightFd { info, body_len } => return self.get_inflight(info, body_len).map(Some),
            Request::SetLogBase { len, offset, fd } => return self.set_log_base(len, offset, &fd).map(Some),
            Request::SetDeviceStateFd { direction, fd } => {
                return Ok(Some(self.set_device_state_fd(direction, fd)));
            }
            Request::CheckDeviceState => return Ok(Some(self.check_device_state())),

            // "Used to be sent to request disabling all rings": the session goes on.
            Request::ResetOwner => self.disable_all(),
            Request::SetOwner | Request::SetLogFd => {}
            Request::SetFeatures(features) => self.set_features(features)?,
            Request::SetProtocolFeatures(features) => self.set_protocol_features(features)?,
            Request::SetMemTable(regions) => {
                let table = self.memory.replaced(regions)?;
                self.reconfigure(|session| session.memory = table)?;
            }
            Request::AddMemReg(info, fd) => {
                let table = self.memory.with(info, &fd)?;
                self.reconfigure(|session| session.memory = table)?;
            }
            Request::RemMemReg(info) => {
                let table = self.memory.without(info)?;
                self.reconfigure(|session| session.memory = table)?;
            }
            Request::SetVringNum { index, size } => self.set_vring_num(index, size)?,
            Request::SetVringAddr { index, addresses } => self.set_vring_addr(index, addresses)?,
            Request::SetVringBase { index, base } => {
                self.change(index, |vring| vring.position = Position::Base(base))?;
            }
            Request::SetVringKick { index, fd } => self.set_vring_kick(index, fd)?,
            Request::SetVringCall { index, fd } => self.set_vring_call(index, fd)?,
            Request::SetVringErr { index, fd } => self.set_vring_err(index, fd)?,
            Request::SetVringEnable { index, enable } => self.set_vring_enable(index, enable)?,
            Request::VringKick { index } => self.vring_kick(index)?,
            Request::SetBackendReqFd { fd, takes_fds } => self.set_backend_req_fd(fd, takes_fds)?,
            Request::SetConfig { offset, data, migration } => self.set_config(offset, &data, migration)?,
            Request::SetInflightFd { info, fd } => self.set_inflight(info, &fd)?,
            Request::SetStatus(status) => self.set_status(status),
            Request::ResetDevice => self.reset_device(),
        }
        Ok(None)
    }

    /// Sends what waits to be sent to the front end.
    pub(crate) fn flush(&mut self) {
        let Some(channel) = &self.channel else { return };
        // A suspended device, all of whose rings are stopped, sends nothing ("Suspended device state").
        if self.config_pending && self.protocol.contains(Protocol::CONFIG) && self.is_running() {
            self.config_pending = !channel.config_changed();
        }
        channel.flush();
    }

    /// Whether the front end has not yet made a thread of ours wait. When it has, it is to be seen off.
    pub(crate) fn trust(&self) -> &Trust {
        &self.trust
    }

    /// The channel, while it is to be flushed as soon as it is writable.
    pub(crate) fn channel_to_flush(&self) -> Option<&Channel> {
        let channel = self.channel.as_deref()?;
        let config_waits =
            self.config_pending && self.protocol.contains(Protocol::CONFIG) && self.is_running();
        (channel.is_waiting() || config_waits).then_some(channel)
    }

    /// Notes that the configuration space has changed.
    pub(crate) fn config_changed(&mut self) {
        self.config_pending = true;
    }

    /// The transfer of the device's state, while one is under way.
    pub(crate) fn transfer(&self) -> Option<&Transfer> {
        self.transfer.as_ref()
    }

    /// The features that were negotiated.
    pub(crate) fn features(&self) -> u64 {
        self.features
    }

    /// The state of each ring.
    pub(crate) fn vrings(&self) -> &[Vring] {
        &self.vrings
    }

    // Negotiation.

    fn offered(&self) -> u64 {
        (self.device.features() | RING_FEATURES | F_PROTOCOL_FEATURES | F_LOG_ALL) & !self.options.without
    }

    fn offered_protocol(&self) -> Protocol {
        match self.options.host_notifier {
            true => PROTOCOL_FEATURES | Protocol::HOST_NOTIFIER,
            false => PROTOCOL_FEATURES,
        }
    }

    fn set_features(&mut self, wanted: u64) -> Applied {
        let extra = wanted & !self.offered();
        if extra != 0 {
            return Err(SessionError::Features { wanted, extra });
        }
        // Front ends send them again: for each pair of queues, when logging starts, when the driver has dropped some.
        if wanted == self.features && wanted & F_PROTOCOL_FEATURES != 0 {
            return Ok(());
        }
        self.reconfigure(|session| {
            session.features = wanted;
            if wanted & F_PROTOCOL_FEATURES == 0 {
                session.vrings.iter_mut().for_each(|vring| vring.enabled = true);
            }
        })
    }

    fn set_protocol_features(&mut self, wanted: u64) -> Applied {
        let extra = wanted & !self.offered_protocol().bits();
        if extra != 0 {
            return Err(SessionError::Features { wanted, extra });
        }
        let wanted = Protocol::from_bits_truncate(wanted);
        let in_band_needs = Protocol::BACKEND_REQ | Protocol::REPLY_ACK;
        if wanted.contains(Protocol::INBAND_NOTIFICATIONS) && !wanted.contains(in_band_needs) {
            return Err(SessionError::InBand);
        }
        self.reconfigure(|session| session.protocol = wanted)
    }

    fn check_negotiated(&self, request: &Request) -> Applied {
        let (request, feature) = match request {
            Request::SetLogBase { .. } => ("SET_LOG_BASE", Protocol::LOG_SHMFD),
            Request::SetBackendReqFd { .. } => ("SET_BACKEND_REQ_FD", Protocol::BACKEND_REQ),
            Request::GetConfig { .. } => ("GET_CONFIG", Protocol::CONFIG),
            Request::SetConfig { .. } => ("SET_CONFIG", Protocol::CONFIG),
            Request::GetInflightFd { .. } => ("GET_INFLIGHT_FD", Protocol::INFLIGHT_SHMFD),
            Request::SetInflightFd { .. } => ("SET_INFLIGHT_FD", Protocol::INFLIGHT_SHMFD),
            Request::ResetDevice => ("RESET_DEVICE", Protocol::RESET_DEVICE),
            Request::VringKick { .. } => ("VRING_KICK", Protocol::INBAND_NOTIFICATIONS),
            Request::GetMaxMemSlots => ("GET_MAX_MEM_SLOTS", Protocol::CONFIGURE_MEM_SLOTS),
            Request::AddMemReg(..) => ("ADD_MEM_REG", Protocol::CONFIGURE_MEM_SLOTS),
            Request::RemMemReg(_) => ("REM_MEM_REG", Protocol::CONFIGURE_MEM_SLOTS),
            Request::SetStatus(_) => ("SET_STATUS", Protocol::STATUS),
            Request::GetStatus => ("GET_STATUS", Protocol::STATUS),
            Request::SetDeviceStateFd { .. } => ("SET_DEVICE_STATE_FD", Protocol::DEVICE_STATE),
            Request::CheckDeviceState => ("CHECK_DEVICE_STATE", Protocol::DEVICE_STATE),
            _ => return Ok(()),
        };
        if self.protocol.contains(feature) {
            return Ok(());
        }
        let feature = feature.iter_names().next().map_or("?", |(name, _)| name);
        Err(SessionError::NotNegotiated { request, feature })
    }

    // The device.

    fn get_config(&mut self, offset: u32, len: u32, flags: u32) -> Reply {
        if std::mem::take(&mut self.config_unread) {
            self.device.reset();
        }
        // Front ends ask for as much as the largest device of the type has; what this one lacks reads as zero.
        let config = self.device.config();
        let (start, len) = (offset as usize, len as usize);
        let mut body: Vec<u8> =
            [offset, len as u32, flags].iter().flat_map(|word| word.to_ne_bytes()).collect();
        body.extend((start..start + len).map(|at| config.get(at).copied().unwrap_or(0)));
        Reply { body, fd: None }
    }

    fn set_config(&mut self, offset: u32, data: &[u8], migration: bool) -> Applied {
        self.config_unread = false;
        if migration {
            // Read-only fields may be set too, to what they are on this side anyway.
            let start = offset as usize;
            if self.device.config().get(start..start + data.len()) == Some(data) {
                return Ok(());
            }
        }
        Ok(self.device.write_config(offset, data)?)
    }

    fn status(&self) -> u8 {
        match self.needs_reset.load(Ordering::Acquire) {
            true => self.status | STATUS_NEEDS_RESET,
            false => self.status,
        }
    }

    /// A status of 0 ends the use of the rings, but not what the driver had set: front ends also send it when they pause
    /// a guest that will go on without setting up its device again.
    fn set_status(&mut self, status: u8) {
        self.status = status;
        if status == 0 {
            self.halt_all();
        }
    }

    fn reset_device(&mut self) {
        self.disable_all();
        self.halt_all();
        for vring in &mut self.vrings {
            (vring.position, vring.addresses) = (Position::Unknown, None);
        }
        self.status = 0;
        self.config_unread = true;
    }

    /// Stops all rings until they are kicked again.
    fn halt_all(&mut self) {
        for index in self.indices() {
            self.stop(index);
            self.vrings[usize::from(index)].kick = None;
        }
        self.needs_reset.store(false, Ordering::Release);
    }

    fn set_backend_req_fd(&mut self, fd: OwnedFd, takes_fds: bool) -> Applied {
        let rings = self.vrings.len() as u16;
        let channel = Channel::new(fd, takes_fds, rings, self.bell.clone());
        self.reconfigure(|session| session.channel = Some(Arc::new(channel)))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.queues().stop_all();
        if let Err(error) = self.device.settle()
            && self.log_limits.admits(Kind::Noted)
        {
            tracing::error!(%error, "another host would not find it");
        }
    }
}

/// The queues, whoever panicked while holding them: a queue set is sound between any two of its methods.
pub(crate) fn lock(queues: &Mutex<QueueSet>) -> MutexGuard<'_, QueueSet> {
    queues.lock().unwrap_or_else(PoisonError::into_inner)
}

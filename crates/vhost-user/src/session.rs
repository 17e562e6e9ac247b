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
//! When the session ends, its queues stop, the device forgets what the driver had set, and the memory is unmapped.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vhost::vhost_user::message::{
    FrontendReq, VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures,
};
use virtio::features::{RING_FEATURES, RING_PACKED};
use virtio::memory::{DirtyLog, Mapping};
use virtio::{Call, Device, EventFdCall, InflightError, QueueConfig, QueueSet, RingFormat, StartError};

use crate::backend_channel::{Channel, InBandCall, NOTIFIER_BYTES};
use crate::bell::Bell;
use crate::device_state::{Progress, Transfer};
use crate::inflight::{self, Records};
use crate::log::{self, LogError};
use crate::memory_table::{MemoryTable, MemoryTableError};
use crate::peer_fd::{self, PeerFdError};
use crate::request::{Direction, InflightInfo, Request, RequestError};
use crate::vring::{CallTo, Kick, PlaceError, Position, Vring, signal};
use crate::wire::Message;

/// The front end knows protocol features; its rings start disabled.
const F_PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// Writes to guest memory are logged.
const F_LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();
/// Device status bit: the device has met an error it cannot recover from (virtio 1.2, section 2.1).
const STATUS_NEEDS_RESET: u8 = 64;
/// "No descriptor comes along": bit 8, as in SET_VRING_KICK.
const NO_FD: u64 = 1 << 8;

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

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are the values named in each message")]
pub enum SessionError {
    /// The message is no valid request.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// A request that belongs to a feature which was not negotiated.
    #[error("{request} needs protocol feature {feature}, which was not negotiated")]
    NotNegotiated { request: &'static str, feature: &'static str },
    /// Features beyond the offered ones.
    #[error("features {wanted:#x} contain {extra:#x}, which were not offered")]
    Features { wanted: u64, extra: u64 },
    /// In-band notifications without what they are made of.
    #[error("in-band notifications were negotiated without BACKEND_REQ and REPLY_ACK")]
    InBand,
    /// A ring the device does not have.
    #[error("ring {index}: the device has {queues} queues")]
    NoSuchRing { index: u16, queues: u16 },
    /// A ring larger than the device allows.
    #[error("ring {index} of {size} descriptors: the device allows {max}")]
    TooLarge { index: u16, size: u16, max: u16 },
    /// An inflight record that does not fit the device.
    #[error(
        "inflight record for {queues} queues of {size} descriptors: the device has {queues_max} of at most {size_max}"
    )]
    Inflight { queues: u16, size: u16, queues_max: u16, size_max: u16 },
    /// The memory table was refused.
    #[error(transparent)]
    Memory(#[from] MemoryTableError),
    /// A descriptor was refused.
    #[error("ring {index}, {what} descriptor: {source}")]
    Descriptor { index: u16, what: &'static str, source: PeerFdError },
    /// The descriptor of the back end's channel was refused.
    #[error("back-end channel: {0}")]
    Channel(PeerFdError),
    /// The dirty log was refused.
    #[error("dirty log: {0}")]
    Log(String),
    /// The inflight record was refused.
    #[error("inflight record: {0}")]
    Record(String),
    /// A ring cannot be opened.
    #[error("ring {index}: {reason}")]
    Ring { index: u16, reason: String },
    /// A queue does not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// A configuration write was refused.
    #[error(transparent)]
    Config(#[from] virtio::ConfigError),
    /// The system refused.
    #[error("{what}: {source}")]
    System { what: &'static str, source: std::io::Error },
}

impl SessionError {
    /// Whether the connection must end even if the front end asked for an acknowledgement.
    fn is_fatal(&self) -> bool {
        matches!(self, Self::InBand)
    }
}

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
    features: u64,
    protocol: Protocol,
    memory: MemoryTable,
    vrings: Vec<Vring>,
    log: Option<DirtyLog>,
    inflight: Option<Records>,
    channel: Option<Arc<Channel>>,
    /// What guests write to instead of kicking. Nobody reads it.
    notifier: Option<OwnedFd>,
    status: u8,
    /// A ring broke; set by I/O threads.
    needs_reset: Arc<AtomicBool>,
    transfer: Option<Transfer>,
    /// How the last transfer went; None if there was none.
    transferred: Option<bool>,
    /// The front end is to be told that the configuration changed.
    config_pending: bool,
}

impl Session {
    /// `bell` is rung when [`Session::flush`] should be called.
    pub(crate) fn new(queues: Arc<Mutex<QueueSet>>, options: SessionOptions, bell: Arc<Bell>) -> Self {
        let device = lock(&queues).device().clone();
        Self {
            vrings: (0..device.queues()).map(|_| Vring::default()).collect(),
            device,
            queues,
            options,
            bell,
            features: 0,
            protocol: Protocol::empty(),
            memory: MemoryTable::default(),
            log: None,
            inflight: None,
            channel: None,
            notifier: None,
            status: 0,
            needs_reset: Arc::default(),
            transfer: None,
            transferred: None,
            config_pending: false,
        }
    }

    /// Carries out a message and says what to send back, if anything.
    ///
    /// # Errors
    /// The message was refused and the front end does not wait to be told: its connection must end.
    pub(crate) fn handle(&mut self, message: Message) -> Applied<Option<Reply>> {
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
                tracing::warn!(%error, "request refused");
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
                let table = MemoryTable::new(regions)?;
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
            Request::SetVringAddr { index, addresses } => {
                self.change(index, |vring| vring.addresses = Some(addresses))?;
            }
            Request::SetVringBase { index, base } => {
                self.change(index, |vring| vring.position = Position::Base(base))?;
            }
            Request::SetVringKick { index, fd } => self.set_vring_kick(index, fd)?,
            Request::SetVringCall { index, fd } => self.set_vring_call(index, fd)?,
            Request::SetVringErr { index, fd } => self.set_vring_err(index, fd)?,
            Request::SetVringEnable { index, enable } => {
                self.change(index, |vring| vring.enabled = enable)?;
            }
            Request::VringKick { index } => self.vring_kick(index)?,
            Request::SetBackendReqFd(fd) => self.set_backend_req_fd(fd)?,
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

    /// Goes on with the transfer of the device's state.
    pub(crate) fn advance_transfer(&mut self) {
        let Some(transfer) = &mut self.transfer else { return };
        let result = match transfer.advance() {
            Ok(Progress::Waiting) => return,
            Ok(Progress::Done(state)) if transfer.direction() == Direction::Load => {
                self.device.restore(&state).map_err(|error| error.to_string())
            }
            Ok(Progress::Done(_)) => Ok(()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = &result {
            tracing::warn!(%error, "device state not transferred");
        }
        self.transferred = Some(result.is_ok());
        // Closing our end is what tells the front end that this was all.
        self.transfer = None;
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
        // A front end may send them again, after its driver has dropped some.
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
            Request::SetBackendReqFd(_) => ("SET_BACKEND_REQ_FD", Protocol::BACKEND_REQ),
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

    // Rings.

    fn set_vring_num(&mut self, index: u16, size: u16) -> Applied {
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

    fn get_vring_base(&mut self, index: u16) -> Applied<Reply> {
        self.check_ring(index)?;
        self.stop(index);
        let format = self.format();
        let vring = &mut self.vrings[usize::from(index)];
        vring.kick = None;
        let body = [u32::from(index), vring.base(format)];
        Ok(Reply { body: body.iter().flat_map(|word| word.to_ne_bytes()).collect(), fd: None })
    }

    fn set_vring_kick(&mut self, index: u16, fd: Option<OwnedFd>) -> Applied {
        let refused = |source| SessionError::Descriptor { index, what: "kick", source };
        let kick = match fd {
            Some(fd) => Kick::Fd(peer_fd::to_wait_on(fd).map_err(refused)?),
            None => Kick::None,
        };
        self.change(index, |vring| vring.kick = Some(kick))
    }

    fn vring_kick(&mut self, index: u16) -> Applied {
        self.check_ring(index)?;
        if self.vrings[usize::from(index)].kick.is_none() {
            return self.change(index, |vring| vring.kick = Some(Kick::InBand));
        }
        self.queues().wake(index);
        Ok(())
    }

    fn set_vring_call(&mut self, index: u16, fd: Option<OwnedFd>) -> Applied {
        self.check_ring(index)?;
        let call = match fd {
            Some(fd) => CallTo::Fd(writable(index, "call", fd)?),
            None => CallTo::Nobody,
        };
        if let CallTo::Fd(call) = &call {
            // An interrupt may have been missed while the front end was away.
            call.call();
        }
        self.vrings[usize::from(index)].call = call;
        let call = self.call_of(index);
        self.queues().set_call(index, call);
        Ok(())
    }

    fn set_vring_err(&mut self, index: u16, fd: Option<OwnedFd>) -> Applied {
        self.check_ring(index)?;
        let call = fd.map(|fd| writable(index, "error", fd)).transpose()?;
        *self.vrings[usize::from(index)].error.lock().unwrap_or_else(PoisonError::into_inner) = call;
        Ok(())
    }

    fn disable_all(&mut self) {
        for index in self.indices() {
            self.stop(index);
            self.vrings[usize::from(index)].enabled = false;
        }
    }

    // The device.

    fn get_config(&self, offset: u32, len: u32, flags: u32) -> Reply {
        // Front ends ask for as much as the largest device of the type has; what this one lacks reads as zero.
        let config = self.device.config();
        let (start, len) = (offset as usize, len as usize);
        let mut body: Vec<u8> =
            [offset, len as u32, flags].iter().flat_map(|word| word.to_ne_bytes()).collect();
        body.extend((start..start + len).map(|at| config.get(at).copied().unwrap_or(0)));
        Reply { body, fd: None }
    }

    fn set_config(&mut self, offset: u32, data: &[u8], migration: bool) -> Applied {
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
        self.device.reset();
    }

    /// Stops all rings until they are kicked again.
    fn halt_all(&mut self) {
        for index in self.indices() {
            self.stop(index);
            self.vrings[usize::from(index)].kick = None;
        }
        self.needs_reset.store(false, Ordering::Release);
    }

    fn set_backend_req_fd(&mut self, fd: OwnedFd) -> Applied {
        let rings = self.vrings.len() as u16;
        let channel = Channel::new(fd, rings, self.bell.clone()).map_err(SessionError::Channel)?;
        self.reconfigure(|session| session.channel = Some(Arc::new(channel)))
    }

    // Migration and recovery.

    fn set_log_base(&mut self, len: u64, offset: u64, fd: &OwnedFd) -> Applied<Reply> {
        let log = log::map(fd, offset, len).map_err(|e: LogError| SessionError::Log(e.to_string()))?;
        if !log.covers(self.memory.memory()) {
            tracing::warn!(bytes = len, "the dirty log is shorter than guest memory");
        }
        self.reconfigure(|session| session.log = Some(log))?;
        Ok(Reply { body: [len, offset].iter().flat_map(|word| word.to_ne_bytes()).collect(), fd: None })
    }

    fn get_inflight(&self, asked: InflightInfo, body_len: usize) -> Applied<Reply> {
        let InflightInfo { queues, queue_size: size, .. } = asked;
        let (queues_max, size_max) = (self.vrings.len() as u16, self.device.queue_size_max());
        if queues > queues_max || size > size_max {
            return Err(SessionError::Inflight { queues, size, queues_max, size_max });
        }
        let (info, file) = inflight::allocate(self.format(), queues, size)
            .map_err(|e| SessionError::Record(e.to_string()))?;
        let mut body: Vec<u8> = [info.len, info.offset].iter().flat_map(|word| word.to_ne_bytes()).collect();
        body.extend([info.queues, info.queue_size].iter().flat_map(|half| half.to_ne_bytes()));
        // With the padding of the C structure if the front end has it.
        body.resize(if body_len >= 24 { 24 } else { 20 }, 0);
        Ok(Reply { body, fd: Some(file.into()) })
    }

    fn set_inflight(&mut self, info: InflightInfo, fd: &OwnedFd) -> Applied {
        let inflight = Records::map(info, fd).map_err(|e| SessionError::Record(e.to_string()))?;
        self.reconfigure(|session| session.inflight = Some(inflight))
    }

    fn set_device_state_fd(&mut self, direction: Direction, fd: OwnedFd) -> Reply {
        const FAILED: u64 = 1;
        self.transferred = None;
        self.transfer = None;
        if self.is_running() {
            tracing::warn!("the device state can be transferred only while all rings are stopped");
            return Reply::u64(NO_FD | FAILED);
        }
        let state = match direction {
            Direction::Save => self.device.save(),
            Direction::Load => Vec::new(),
        };
        match Transfer::new(direction, fd, state) {
            Ok(transfer) => {
                self.transfer = Some(transfer);
                self.advance_transfer();
                Reply::u64(NO_FD)
            }
            Err(error) => {
                tracing::warn!(%error, "device state not transferred");
                Reply::u64(NO_FD | FAILED)
            }
        }
    }

    /// The front end asks when it has seen the end of the data, or closed its end: whatever is missing now will not come.
    fn check_device_state(&mut self) -> Reply {
        self.advance_transfer();
        let complete = self.transfer.take().is_none() && self.transferred.take() == Some(true);
        Reply::u64(u64::from(!complete))
    }

    // Starting and stopping.

    /// Makes a change to what one ring's queue depends on.
    fn change(&mut self, index: u16, change: impl FnOnce(&mut Vring)) -> Applied {
        self.check_ring(index)?;
        self.stop(index);
        change(&mut self.vrings[usize::from(index)]);
        self.start(index).map_err(|error| error.of(index))
    }

    /// Makes a change that all queues depend on.
    ///
    /// A ring that is in no memory region afterwards waits for the next change: front ends replace a region by removing it
    /// and adding another.
    fn reconfigure(&mut self, change: impl FnOnce(&mut Self)) -> Applied {
        for index in self.indices() {
            self.stop(index);
        }
        change(self);
        let mut result = Ok(());
        for index in self.indices() {
            match self.start(index) {
                Err(NotStarted::Place(error @ PlaceError::NotMapped(_))) => {
                    tracing::info!(ring = index, %error, "ring stopped until it is in memory again");
                }
                Err(error) => result = result.and(Err(error.of(index))),
                Ok(()) => {}
            }
        }
        result
    }

    /// Stops a queue; false if it did not run.
    fn stop(&mut self, index: u16) -> bool {
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
    fn start(&mut self, index: u16) -> Result<(), NotStarted> {
        let vring = &self.vrings[usize::from(index)];
        if !vring.is_ready() || self.queues().is_running(index) {
            return Ok(());
        }
        let Some(place) = vring.place(self.features, &self.memory)? else { return Ok(()) };
        let kick = match &vring.kick {
            Some(Kick::Fd(fd)) => Some(fd.try_clone()?),
            _ => None,
        };
        let log = match &self.log {
            Some(log) if self.features & F_LOG_ALL != 0 => Some(log::of_queue(log, place.used_log)),
            _ => None,
        };
        let inflight = match &self.inflight {
            Some(records) => records.of_queue(index, place.config.format, place.config.size)?,
            None => None,
        };
        let config = QueueConfig {
            index,
            features: self.features,
            ring: place.config,
            state: place.state,
            memory: self.memory.memory().clone(),
            kick,
            call: self.call_of(index),
            log,
            inflight,
            on_error: Some(self.on_error(index)),
        };
        self.queues().start(config)?;
        tracing::debug!(ring = index, size = place.config.size, format = ?place.config.format, "ring started");
        self.offer_notifier(index);
        Ok(())
    }

    /// What an I/O thread does when it finds the ring broken.
    fn on_error(&self, index: u16) -> Box<dyn FnOnce(&virtio::RingError) + Send> {
        let error = self.vrings[usize::from(index)].error.clone();
        let in_band = self.protocol.contains(Protocol::INBAND_NOTIFICATIONS);
        let channel = self.channel.clone().filter(|_| in_band);
        let needs_reset = self.needs_reset.clone();
        Box::new(move |_| {
            needs_reset.store(true, Ordering::Release);
            if !signal(&error)
                && let Some(channel) = channel
            {
                channel.ring_error(index);
            }
        })
    }

    /// How completions of a ring are announced: a descriptor goes before messages.
    fn call_of(&self, index: u16) -> Option<Arc<dyn Call>> {
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
    fn offer_notifier(&mut self, index: u16) {
        let needs = Protocol::HOST_NOTIFIER | Protocol::BACKEND_SEND_FD;
        let Some(channel) = self.channel.clone().filter(|_| self.protocol.contains(needs)) else { return };
        if self.queues().mode(index) != Some(reactor::Mode::Poll) {
            return;
        }
        if self.notifier.is_none() {
            match Mapping::anonymous("vhost-user-notifier", NOTIFIER_BYTES) {
                Ok((_, file)) => self.notifier = Some(file.into()),
                Err(error) => tracing::warn!(%error, "no host notifier"),
            }
        }
        if let Some(page) = &self.notifier {
            channel.host_notifier(index, Some(page.as_fd()));
        }
    }

    fn format(&self) -> RingFormat {
        if self.features & RING_PACKED != 0 { RingFormat::Packed } else { RingFormat::Split }
    }

    fn check_ring(&self, index: u16) -> Applied {
        let queues = self.vrings.len() as u16;
        if index < queues { Ok(()) } else { Err(SessionError::NoSuchRing { index, queues }) }
    }

    fn indices(&self) -> std::ops::Range<u16> {
        0..self.vrings.len() as u16
    }

    fn is_running(&self) -> bool {
        let queues = self.queues();
        self.indices().any(|index| queues.is_running(index))
    }

    fn queues(&self) -> MutexGuard<'_, QueueSet> {
        lock(&self.queues)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.queues().stop_all();
        self.device.reset();
    }
}

/// Why a queue was not started.
#[derive(Debug, thiserror::Error)]
enum NotStarted {
    #[error(transparent)]
    Place(#[from] PlaceError),
    #[error(transparent)]
    Record(#[from] InflightError),
    #[error(transparent)]
    Queue(#[from] StartError),
    #[error("cannot duplicate the kick descriptor: {0}")]
    Kick(#[from] std::io::Error),
}

impl NotStarted {
    fn of(self, index: u16) -> SessionError {
        match self {
            Self::Place(error) => SessionError::Ring { index, reason: error.to_string() },
            Self::Record(error) => SessionError::Record(error.to_string()),
            Self::Queue(error) => error.into(),
            Self::Kick(source) => SessionError::System { what: "duplicate the kick descriptor", source },
        }
    }
}

/// Whether a request is answered by something else than an acknowledgement, so that none can tell of its failure.
fn has_own_reply(code: u32) -> bool {
    matches!(
        FrontendReq::try_from(code),
        Ok(FrontendReq::GET_FEATURES
            | FrontendReq::GET_PROTOCOL_FEATURES
            | FrontendReq::GET_QUEUE_NUM
            | FrontendReq::GET_VRING_BASE
            | FrontendReq::GET_CONFIG
            | FrontendReq::GET_INFLIGHT_FD
            | FrontendReq::GET_MAX_MEM_SLOTS
            | FrontendReq::GET_STATUS
            | FrontendReq::SET_LOG_BASE)
    )
}

/// A descriptor that announces something by being written to.
fn writable(index: u16, what: &'static str, fd: OwnedFd) -> Applied<Arc<dyn Call>> {
    let refused = |source| SessionError::Descriptor { index, what, source };
    let fd = peer_fd::to_signal(fd).map_err(refused)?;
    let call = EventFdCall::new(fd).map_err(|source| SessionError::System { what, source })?;
    Ok(Arc::new(call))
}

/// The queues, whoever panicked while holding them: a queue set is sound between any two of its methods.
pub(crate) fn lock(queues: &Mutex<QueueSet>) -> MutexGuard<'_, QueueSet> {
    queues.lock().unwrap_or_else(PoisonError::into_inner)
}

//! Why a request was not carried out, and whether the front end can be told.

use vhost::vhost_user::message::FrontendReq;
use virtio::{InflightError, StartError};

use crate::lease::LeaseError;
use crate::memory_table::MemoryTableError;
use crate::request::RequestError;
use crate::vring::PlaceError;

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
    /// The dirty log was refused.
    #[error("dirty log: {0}")]
    Log(String),
    /// The inflight record was refused.
    #[error("inflight record: {0}")]
    Record(String),
    /// Somebody else still works on the guest's memory.
    #[error("inflight record: {0}")]
    Lease(#[from] LeaseError),
    /// A ring cannot be opened.
    #[error("ring {index}: {reason}")]
    Ring { index: u16, reason: String },
    /// A queue does not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// A configuration write was refused.
    #[error(transparent)]
    Config(#[from] virtio::ConfigError),
    /// Another host must not go on with this device's storage.
    #[error(transparent)]
    NotSettled(#[from] virtio::NotSettled),
    /// The front end made one of our threads wait.
    #[error("one of its descriptors was full or empty, and had been made blocking: a thread had to wait")]
    Blocked,
    /// The system refused.
    #[error("{what}: {source}")]
    System { what: &'static str, source: std::io::Error },
}

impl SessionError {
    /// Whether the connection must end even if the front end asked for an acknowledgement. Where something could not be
    /// had in time, connecting again is how to ask for it again.
    pub(super) fn is_fatal(&self) -> bool {
        matches!(self, Self::InBand | Self::Lease(_) | Self::Start(StartError::NotReady { .. }))
    }
}

/// Why a queue was not started.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotStarted {
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
    pub(super) fn of(self, index: u16) -> SessionError {
        match self {
            Self::Place(error) => SessionError::Ring { index, reason: error.to_string() },
            Self::Record(error) => SessionError::Record(error.to_string()),
            Self::Queue(error) => error.into(),
            Self::Kick(source) => SessionError::System { what: "duplicate the kick descriptor", source },
        }
    }
}

/// Whether a request is answered by something else than an acknowledgement, so that none can tell of its failure.
pub(super) fn has_own_reply(code: u32) -> bool {
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

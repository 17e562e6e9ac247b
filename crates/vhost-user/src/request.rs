//! From a message to a typed request, or the reason why it is none.
//!
//! All that can be said of a message without knowing the session is checked here: that its body is long enough, its
//! fields are in range and disjoint where they must be, and that it has exactly the descriptors it needs. A body that
//! is longer than needed is accepted: front ends send whole C unions (User-Mode Linux its largest memory table).

use std::os::fd::OwnedFd;

use vhost::vhost_user::message::{
    FrontendReq, VHOST_USER_CONFIG_SIZE, VhostUserConfig, VhostUserInflight, VhostUserLog, VhostUserMemory,
    VhostUserMemoryRegion, VhostUserTransferDeviceState, VhostUserVringAddr, VhostUserVringState,
};
use virtio::ring::RING_SIZE_MAX;
use vm_memory::ByteValued;

use crate::intake::PeerFd;
use crate::wire::{FDS_MAX, Message};

/// Set in the first field of SET_VRING_KICK, _CALL and _ERR when no descriptor comes along.
const VRING_NO_FD: u64 = 1 << 8;
const VRING_INDEX: u64 = 0xff;
/// `VHOST_VRING_F_LOG`: writes to the used ring are logged.
const VRING_ADDR_LOG: u32 = 1;
/// The memory region of ADD_MEM_REG and REM_MEM_REG stands behind 8 bytes of padding.
const REGION_PADDING: usize = 8;
/// `VHOST_SET_CONFIG_TYPE_MIGRATION`: read-only fields may be set too.
const CONFIG_MIGRATION: u32 = 1;
const DIRECTION_LOAD: u32 = 1;

/// A message that is no valid request.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("request {code}: {kind}")]
pub struct RequestError {
    /// The request code.
    pub code: u32,
    /// What is wrong.
    pub kind: RequestErrorKind,
}

/// What is wrong with a message.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestErrorKind {
    /// No such request, or one this back end does not offer.
    #[error("not a request that is supported here")]
    Unknown,
    /// The body is too short.
    #[error("a body of {have} bytes: at least {need} are needed")]
    Short {
        /// Bytes received.
        have: usize,
        /// Bytes needed.
        need: usize,
    },
    /// The wrong number of descriptors.
    #[error("{have} file descriptors: {need} are needed")]
    Fds {
        /// Descriptors received.
        have: usize,
        /// Descriptors needed.
        need: usize,
    },
    /// A descriptor is of a kind that cannot be used.
    #[error("its file descriptor cannot be used: {0}")]
    Descriptor(String),
    /// A field is out of range.
    #[error("{field} is {value:#x}: {allowed}")]
    Value {
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What is allowed.
        allowed: &'static str,
    },
}

/// A region of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RegionInfo {
    /// Guest-physical address.
    pub(crate) guest: u64,
    /// Bytes; not 0. The sums of this with every address are below 2^64.
    pub(crate) len: u64,
    /// Address in the front end's process.
    pub(crate) user: u64,
    /// Offset in the file, in bytes.
    pub(crate) offset: u64,
}

/// The addresses of a ring, in the front end's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RingAddresses {
    pub(crate) desc: u64,
    pub(crate) driver: u64,
    pub(crate) device: u64,
    /// Where writes to the device area are logged: a guest address. None if they are not.
    pub(crate) log: Option<u64>,
}

/// The shared record of requests in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct InflightInfo {
    pub(crate) len: u64,
    pub(crate) offset: u64,
    pub(crate) queues: u16,
    pub(crate) queue_size: u16,
}

/// Which way a device's state goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// Out of this back end.
    Save,
    /// Into it.
    Load,
}

/// A request. Named and documented as in the specification.
#[derive(Debug)]
pub(crate) enum Request {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemTable(Vec<(RegionInfo, OwnedFd)>),
    SetLogBase {
        len: u64,
        offset: u64,
        fd: OwnedFd,
    },
    SetLogFd,
    SetVringNum {
        index: u16,
        size: u16,
    },
    SetVringAddr {
        index: u16,
        addresses: RingAddresses,
    },
    SetVringBase {
        index: u16,
        base: u32,
    },
    GetVringBase {
        index: u16,
    },
    SetVringKick {
        index: u16,
        fd: Option<OwnedFd>,
    },
    SetVringCall {
        index: u16,
        fd: Option<OwnedFd>,
    },
    SetVringErr {
        index: u16,
        fd: Option<OwnedFd>,
    },
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable {
        index: u16,
        enable: bool,
    },
    SetBackendReqFd {
        fd: OwnedFd,
        takes_fds: bool,
    },
    GetConfig {
        offset: u32,
        len: u32,
        flags: u32,
    },
    SetConfig {
        offset: u32,
        data: Vec<u8>,
        migration: bool,
    },
    GetInflightFd {
        info: InflightInfo,
        body_len: usize,
    },
    SetInflightFd {
        info: InflightInfo,
        fd: OwnedFd,
    },
    ResetDevice,
    VringKick {
        index: u16,
    },
    GetMaxMemSlots,
    AddMemReg(RegionInfo, OwnedFd),
    RemMemReg(RegionInfo),
    SetStatus(u8),
    GetStatus,
    /// Its own reply can tell that the descriptor is none that can be used.
    SetDeviceStateFd {
        direction: Direction,
        fd: Result<OwnedFd, String>,
    },
    CheckDeviceState,
}

impl Request {
    /// Reads a message. Descriptors that belong to no valid request are closed.
    pub(crate) fn parse(message: Message<PeerFd>) -> Result<Self, RequestError> {
        let Message { request: code, body, fds, .. } = message;
        parse(code, &body, Fds(fds)).map_err(|kind| RequestError { code, kind })
    }
}

type Parsed<T> = Result<T, RequestErrorKind>;

fn parse(code: u32, body: &[u8], mut fds: Fds) -> Parsed<Request> {
    let request = match FrontendReq::try_from(code).map_err(|_| RequestErrorKind::Unknown)? {
        FrontendReq::GET_FEATURES => Request::GetFeatures,
        FrontendReq::SET_FEATURES => Request::SetFeatures(read::<u64>(body)?),
        FrontendReq::SET_OWNER => Request::SetOwner,
        FrontendReq::RESET_OWNER => Request::ResetOwner,
        FrontendReq::SET_MEM_TABLE => Request::SetMemTable(mem_table(body, &mut fds)?),
        FrontendReq::SET_LOG_BASE => {
            let log = read::<VhostUserLog>(body)?;
            Request::SetLogBase { len: log.mmap_size, offset: log.mmap_offset, fd: fds.one()? }
        }
        FrontendReq::SET_LOG_FD => {
            // Where to signal that the log has changed: the front ends there are look at the log when they want to.
            drop(fds.one_of_any_kind()?);
            Request::SetLogFd
        }
        FrontendReq::SET_VRING_NUM => {
            let (index, num) = vring_state(body)?;
            let allowed = "1 to 32768";
            let size = u16::try_from(num).ok().filter(|size| (1..=RING_SIZE_MAX).contains(size));
            Request::SetVringNum { index, size: size.ok_or_else(|| value("ring size", num.into(), allowed))? }
        }
        FrontendReq::SET_VRING_ADDR => vring_addr(body)?,
        FrontendReq::SET_VRING_BASE => {
            let (index, base) = vring_state(body)?;
            Request::SetVringBase { index, base }
        }
        FrontendReq::GET_VRING_BASE => Request::GetVringBase { index: vring_state(body)?.0 },
        FrontendReq::SET_VRING_KICK => {
            let (index, fd) = vring_fd(body, &mut fds)?;
            Request::SetVringKick { index, fd }
        }
        FrontendReq::SET_VRING_CALL => {
            let (index, fd) = vring_fd(body, &mut fds)?;
            Request::SetVringCall { index, fd }
        }
        FrontendReq::SET_VRING_ERR => {
            let (index, fd) = vring_fd(body, &mut fds)?;
            Request::SetVringErr { index, fd }
        }
        FrontendReq::GET_PROTOCOL_FEATURES => Request::GetProtocolFeatures,
        FrontendReq::SET_PROTOCOL_FEATURES => Request::SetProtocolFeatures(read::<u64>(body)?),
        FrontendReq::GET_QUEUE_NUM => Request::GetQueueNum,
        FrontendReq::SET_VRING_ENABLE => {
            let (index, num) = vring_state(body)?;
            if num > 1 {
                return Err(value("enable", num.into(), "0 or 1"));
            }
            Request::SetVringEnable { index, enable: num == 1 }
        }
        FrontendReq::SET_BACKEND_REQ_FD => {
            let (fd, takes_fds) = open(fds.one_of_any_kind()?)?;
            Request::SetBackendReqFd { fd, takes_fds }
        }
        FrontendReq::GET_CONFIG => {
            let VhostUserConfig { offset, size, flags } = config_header(body)?;
            Request::GetConfig { offset, len: size, flags }
        }
        FrontendReq::SET_CONFIG => {
            let VhostUserConfig { offset, size, flags } = config_header(body)?;
            let need = size_of::<VhostUserConfig>() + size as usize;
            let short = RequestErrorKind::Short { have: body.len(), need };
            let data = body.get(size_of::<VhostUserConfig>()..need).ok_or(short)?.to_vec();
            Request::SetConfig { offset, data, migration: flags & CONFIG_MIGRATION != 0 }
        }
        FrontendReq::GET_INFLIGHT_FD => {
            Request::GetInflightFd { info: inflight(body)?, body_len: body.len() }
        }
        FrontendReq::SET_INFLIGHT_FD => Request::SetInflightFd { info: inflight(body)?, fd: fds.one()? },
        FrontendReq::RESET_DEVICE => Request::ResetDevice,
        FrontendReq::VRING_KICK => Request::VringKick { index: vring_state(body)?.0 },
        FrontendReq::GET_MAX_MEM_SLOTS => Request::GetMaxMemSlots,
        FrontendReq::ADD_MEM_REG => Request::AddMemReg(single_region(body)?, fds.one()?),
        FrontendReq::REM_MEM_REG => {
            // "For compatibility with existing incorrect implementations, the back-end MAY accept messages with one
            // file descriptor. If a file descriptor is passed, the back-end MUST close it".
            if fds.0.len() == 1 {
                fds.0.clear();
            }
            Request::RemMemReg(single_region(body)?)
        }
        FrontendReq::SET_STATUS => {
            let status = read::<u64>(body)?;
            let allowed = "a virtio device status has 8 bits";
            Request::SetStatus(u8::try_from(status).map_err(|_| value("status", status, allowed))?)
        }
        FrontendReq::GET_STATUS => Request::GetStatus,
        FrontendReq::SET_DEVICE_STATE_FD => {
            let VhostUserTransferDeviceState { direction, phase } = read(body)?;
            if phase != 0 {
                return Err(value("phase", phase.into(), "only 0, with all rings stopped"));
            }
            let direction = match direction {
                0 => Direction::Save,
                DIRECTION_LOAD => Direction::Load,
                other => return Err(value("direction", other.into(), "0 to save, 1 to load")),
            };
            let fd = match open(fds.one_of_any_kind()?) {
                Ok((fd, _)) => Ok(fd),
                Err(RequestErrorKind::Descriptor(reason)) => Err(reason),
                Err(other) => return Err(other),
            };
            Request::SetDeviceStateFd { direction, fd }
        }
        FrontendReq::CHECK_DEVICE_STATE => Request::CheckDeviceState,
        _ => return Err(RequestErrorKind::Unknown),
    };
    fds.none()?;
    Ok(request)
}

/// The descriptors of a message that nobody has asked for yet.
struct Fds(Vec<PeerFd>);

impl Fds {
    fn one(&mut self) -> Parsed<OwnedFd> {
        Ok(open(self.one_of_any_kind()?)?.0)
    }

    fn one_of_any_kind(&mut self) -> Parsed<PeerFd> {
        let have = self.0.len();
        if have != 1 {
            return Err(RequestErrorKind::Fds { have, need: 1 });
        }
        self.0.pop().ok_or(RequestErrorKind::Fds { have, need: 1 })
    }

    fn none(&self) -> Parsed<()> {
        match self.0.len() {
            0 => Ok(()),
            have => Err(RequestErrorKind::Fds { have, need: 0 }),
        }
    }
}

/// A descriptor that can be used, and whether it takes others along.
fn open(fd: PeerFd) -> Parsed<(OwnedFd, bool)> {
    match fd {
        PeerFd::Open { fd, takes_fds } => Ok((fd, takes_fds)),
        PeerFd::Kept => Err(RequestErrorKind::Descriptor("none was expected".to_owned())),
        PeerFd::Refused(reason) => Err(RequestErrorKind::Descriptor(reason)),
    }
}

fn value(field: &'static str, value: u64, allowed: &'static str) -> RequestErrorKind {
    RequestErrorKind::Value { field, value, allowed }
}

/// Reads a structure from the front of a body.
fn read<T: ByteValued + Default>(body: &[u8]) -> Parsed<T> {
    let need = size_of::<T>();
    let bytes = body.get(..need).ok_or(RequestErrorKind::Short { have: body.len(), need })?;
    let mut value = T::default();
    value.as_mut_slice().copy_from_slice(bytes);
    Ok(value)
}

fn ring_index(index: u64) -> Parsed<u16> {
    u16::try_from(index).map_err(|_| value("ring index", index, "at most 65535"))
}

fn vring_state(body: &[u8]) -> Parsed<(u16, u32)> {
    let VhostUserVringState { index, num } = read(body)?;
    Ok((ring_index(index.into())?, num))
}

fn vring_fd(body: &[u8], fds: &mut Fds) -> Parsed<(u16, Option<OwnedFd>)> {
    let field = read::<u64>(body)?;
    if field & !(VRING_INDEX | VRING_NO_FD) != 0 {
        return Err(value("ring index and flags", field, "only bits 0 to 8"));
    }
    let fd = if field & VRING_NO_FD == 0 { Some(fds.one()?) } else { None };
    Ok((ring_index(field & VRING_INDEX)?, fd))
}

fn vring_addr(body: &[u8]) -> Parsed<Request> {
    let VhostUserVringAddr { index, flags, descriptor, used, available, log } = read(body)?;
    if flags & !VRING_ADDR_LOG != 0 {
        return Err(value("ring address flags", flags.into(), "only bit 0"));
    }
    let log = (flags & VRING_ADDR_LOG != 0).then_some(log);
    let addresses = RingAddresses { desc: descriptor, driver: available, device: used, log };
    Ok(Request::SetVringAddr { index: ring_index(index.into())?, addresses })
}

fn mem_table(body: &[u8], fds: &mut Fds) -> Parsed<Vec<(RegionInfo, OwnedFd)>> {
    let VhostUserMemory { num_regions, .. } = read(body)?;
    let count = num_regions as usize;
    if count > FDS_MAX {
        return Err(value("number of regions", num_regions.into(), "at most 64 in one message"));
    }
    let have = fds.0.len();
    if have != count {
        return Err(RequestErrorKind::Fds { have, need: count });
    }
    let need = size_of::<VhostUserMemory>() + count * size_of::<VhostUserMemoryRegion>();
    let short = RequestErrorKind::Short { have: body.len(), need };
    let regions = body.get(size_of::<VhostUserMemory>()..need).ok_or(short)?;
    regions
        .chunks_exact(size_of::<VhostUserMemoryRegion>())
        .zip(fds.0.drain(..))
        .map(|(bytes, fd)| Ok((region(bytes)?, open(fd)?.0)))
        .collect()
}

fn single_region(body: &[u8]) -> Parsed<RegionInfo> {
    let need = REGION_PADDING + size_of::<VhostUserMemoryRegion>();
    region(body.get(REGION_PADDING..).ok_or(RequestErrorKind::Short { have: body.len(), need })?)
}

fn region(bytes: &[u8]) -> Parsed<RegionInfo> {
    let VhostUserMemoryRegion {
        guest_phys_addr: guest,
        memory_size: len,
        user_addr: user,
        mmap_offset: offset,
    } = read(bytes)?;
    let fits = |start: u64| start.checked_add(len).is_some();
    if len == 0 || !fits(guest) || !fits(user) || !fits(offset) {
        return Err(value("region size", len, "not 0, and every range ends below 2^64"));
    }
    Ok(RegionInfo { guest, len, user, offset })
}

fn config_header(body: &[u8]) -> Parsed<VhostUserConfig> {
    let header: VhostUserConfig = read(body)?;
    let (offset, size, flags) = (header.offset, header.size, header.flags);
    let end = u64::from(offset) + u64::from(size);
    if size == 0 || end > VHOST_USER_CONFIG_SIZE.into() {
        return Err(value("end of the configuration access", end, "1 to 4096 bytes within 4096"));
    }
    if flags > CONFIG_MIGRATION {
        return Err(value("configuration flags", flags.into(), "0 or 1"));
    }
    Ok(header)
}

/// The specification has 20 bytes; the C structure that front ends send has 4 bytes of padding at its end.
fn inflight(body: &[u8]) -> Parsed<InflightInfo> {
    const BYTES: usize = 20;
    let bytes = body.get(..BYTES).ok_or(RequestErrorKind::Short { have: body.len(), need: BYTES })?;
    let mut padded = [0; size_of::<VhostUserInflight>()];
    padded[..BYTES].copy_from_slice(bytes);
    let info: VhostUserInflight = read(&padded)?;
    if info.num_queues == 0 {
        return Err(value("number of queues", 0, "at least 1"));
    }
    if !(1..=RING_SIZE_MAX).contains(&info.queue_size) {
        return Err(value("ring size", info.queue_size.into(), "1 to 32768"));
    }
    Ok(InflightInfo {
        len: info.mmap_size,
        offset: info.mmap_offset,
        queues: info.num_queues,
        queue_size: info.queue_size,
    })
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    fn message(request: u32, body: Vec<u8>, fds: usize) -> Message<PeerFd> {
        let fd = || PeerFd::Open { fd: eventfd(0, EventfdFlags::CLOEXEC).unwrap(), takes_fds: false };
        Message { request, need_reply: false, body, fds: (0..fds).map(|_| fd()).collect() }
    }

    fn longs(longs: &[u64]) -> Vec<u8> {
        longs.iter().flat_map(|long| long.to_ne_bytes()).collect()
    }

    fn kind(request: FrontendReq, body: Vec<u8>, fds: usize) -> RequestErrorKind {
        Request::parse(message(request.into(), body, fds)).expect_err("refused").kind
    }

    #[test]
    fn every_request_says_what_it_lacks() {
        use FrontendReq as R;
        use RequestErrorKind as K;
        let region = longs(&[0, 0x1000, 0x2000, 0x3000, 0]);
        let cases = [
            (R::SET_FEATURES, vec![0; 7], 0, K::Short { have: 7, need: 8 }),
            (R::SET_FEATURES, vec![0; 8], 1, K::Fds { have: 1, need: 0 }),
            (R::SET_VRING_ADDR, vec![0; 39], 0, K::Short { have: 39, need: 40 }),
            (R::SET_VRING_KICK, longs(&[0]), 0, K::Fds { have: 0, need: 1 }),
            (R::SET_VRING_KICK, longs(&[0x100]), 1, K::Fds { have: 1, need: 0 }),
            (R::SET_VRING_CALL, longs(&[0]), 2, K::Fds { have: 2, need: 1 }),
            (R::SET_BACKEND_REQ_FD, vec![], 0, K::Fds { have: 0, need: 1 }),
            (R::SET_MEM_TABLE, longs(&[1]), 1, K::Short { have: 8, need: 40 }),
            (R::SET_MEM_TABLE, longs(&[2]), 1, K::Fds { have: 1, need: 2 }),
            (R::ADD_MEM_REG, region.clone(), 0, K::Fds { have: 0, need: 1 }),
            (R::REM_MEM_REG, region, 2, K::Fds { have: 2, need: 0 }),
            (R::GET_CONFIG, vec![0; 11], 0, K::Short { have: 11, need: 12 }),
            (R::GET_INFLIGHT_FD, vec![0; 19], 0, K::Short { have: 19, need: 20 }),
            (R::SEND_RARP, longs(&[0]), 0, K::Unknown),
            (R::IOTLB_MSG, vec![0; 32], 0, K::Unknown),
        ];
        for (request, body, fds, expected) in cases {
            assert_eq!(kind(request, body, fds), expected, "{request:?}");
        }
        assert_eq!(Request::parse(message(0, vec![], 0)).unwrap_err().kind, K::Unknown);
        assert_eq!(Request::parse(message(u32::MAX, vec![], 0)).unwrap_err().kind, K::Unknown);
    }

    #[test]
    fn values_out_of_range_are_named() {
        use FrontendReq as R;
        let vring =
            |index: u32, num: u32| [index, num].iter().flat_map(|w| w.to_ne_bytes()).collect::<Vec<u8>>();
        let config = |offset: u32, size: u32, flags: u32| {
            let header = [offset, size, flags].into_iter().flat_map(|w| w.to_ne_bytes());
            header.chain([0; 16]).collect::<Vec<u8>>()
        };
        let cases = [
            (R::SET_VRING_NUM, vring(0, 0), "ring size"),
            (R::SET_VRING_NUM, vring(0, 32769), "ring size"),
            (R::SET_VRING_NUM, vring(65536, 4), "ring index"),
            (R::SET_VRING_ENABLE, vring(0, 2), "enable"),
            (R::SET_VRING_KICK, longs(&[0x200]), "ring index and flags"),
            (R::SET_STATUS, longs(&[0x100]), "status"),
            (R::GET_CONFIG, config(0, 0, 0), "end of the configuration access"),
            (R::GET_CONFIG, config(4000, 97, 0), "end of the configuration access"),
            (R::GET_CONFIG, config(u32::MAX, u32::MAX, 0), "end of the configuration access"),
            (R::SET_CONFIG, config(0, 4, 2), "configuration flags"),
            (R::GET_INFLIGHT_FD, vec![0; 24], "number of queues"),
            (R::ADD_MEM_REG, longs(&[0, 0, 0, 0, 0]), "region size"),
            (R::ADD_MEM_REG, longs(&[0, u64::MAX, 1, 0, 0]), "region size"),
            (R::ADD_MEM_REG, longs(&[0, 0, 1, u64::MAX, 0]), "region size"),
            (R::ADD_MEM_REG, longs(&[0, 0, 1, 0, u64::MAX]), "region size"),
            (R::SET_DEVICE_STATE_FD, vring(2, 0), "direction"),
            (R::SET_DEVICE_STATE_FD, vring(0, 1), "phase"),
        ];
        for (request, body, name) in cases {
            let fds = usize::from(matches!(request, R::ADD_MEM_REG | R::SET_DEVICE_STATE_FD));
            let RequestErrorKind::Value { field, .. } = kind(request, body, fds) else {
                panic!("{request:?}: a value out of range")
            };
            assert_eq!(field, name, "{request:?}");
        }
        let too_many = kind(R::SET_MEM_TABLE, longs(&[65]), 0);
        assert!(matches!(too_many, RequestErrorKind::Value { field: "number of regions", .. }));
    }

    #[test]
    fn a_body_may_be_a_whole_union() {
        // User-Mode Linux: room for two regions, one used.
        let body = longs(&[1, 0x1000, 0x2000, 0x3000, 0, 0, 0, 0, 0]);
        let request = Request::parse(message(FrontendReq::SET_MEM_TABLE.into(), body, 1)).unwrap();
        let Request::SetMemTable(regions) = request else { panic!("a memory table") };
        assert_eq!(regions.len(), 1);
        assert_eq!(regions[0].0, RegionInfo { guest: 0x1000, len: 0x2000, user: 0x3000, offset: 0 });
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(
            code in prop_oneof![0u32..50, any::<u32>()],
            body in prop_oneof![vec(any::<u8>(), 0..200), vec(0u8..3, 0..200)],
            fds in 0usize..4,
        ) {
            let _ = Request::parse(message(code, body, fds));
        }
    }
}

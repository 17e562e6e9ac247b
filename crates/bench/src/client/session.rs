//! The front end's side of the vhost-user protocol, as far as a load generator needs it.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use vhost::VhostBackend;
use vhost::VringConfigData;
use vhost::vhost_user::message::{FrontendReq, VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio::RingFormat;
use virtio::features::{EVENT_IDX, INDIRECT_DESC, RING_PACKED, VERSION_1};
use vmm_sys_util::eventfd::EventFd;

use super::guest::Guest;
use super::lane::Lane;
use crate::case::{Case, Ring};

/// How long a server may take to answer a message.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);
/// `VIRTIO_BLK_F_MQ` (virtio 1.2, section 5.2.3).
const BLK_F_MQ: u64 = 1 << 12;
/// `VIRTIO_BLK_F_FLUSH`: a driver without it must be given stable writes only (section 5.2.6.2), which some servers do
/// and others do not; with it all of them may cache writes, as for every guest.
const BLK_F_FLUSH: u64 = 1 << 9;
/// Bytes of the configuration space up to and including `num_queues`, and where it is (section 5.2.4).
const CONFIG_BYTES: usize = 36;
const NUM_QUEUES_AT: usize = 34;
const SECTOR_BYTES: u64 = 512;

/// What a server cannot do, so that a case is skipped for it.
#[derive(Debug)]
pub(crate) struct Unsupported(pub(crate) String);

/// A connection to a server, with features agreed on and no queue started.
pub(crate) struct Session {
    frontend: Frontend,
    /// The same socket, for the one message that the library cannot send.
    socket: UnixStream,
    /// Virtio features agreed on.
    pub(crate) features: u64,
    /// Size of the disk.
    pub(crate) capacity_bytes: u64,
}

impl Session {
    /// Connects and negotiates what `case` needs; the inner error says what the server does not offer.
    pub(crate) fn connect(path: &Path, case: &Case) -> Result<Result<Self, Unsupported>> {
        let socket =
            UnixStream::connect(path).with_context(|| format!("cannot connect to {}", path.display()))?;
        socket.set_read_timeout(Some(REPLY_TIMEOUT)).context("cannot set a timeout on the socket")?;
        let clone = socket.try_clone().context("cannot duplicate the socket")?;
        let mut frontend = Frontend::from_stream(clone, case.queues.into());
        let unsupported = |what: &str| Ok(Err(Unsupported(format!("does not offer {what}"))));

        let offered = frontend.get_features().context("GET_FEATURES")?;
        let protocol_bit = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let mut features = VERSION_1 | protocol_bit;
        if case.ring == Ring::Packed {
            features |= RING_PACKED;
        }
        if case.indirect {
            features |= INDIRECT_DESC;
        }
        for (bit, name) in [
            (VERSION_1, "virtio 1.x"),
            (protocol_bit, "protocol features"),
            (features & RING_PACKED, "packed rings"),
            (features & INDIRECT_DESC, "indirect descriptors"),
        ] {
            if offered & bit != bit {
                return unsupported(name);
            }
        }
        features |= offered & (EVENT_IDX | BLK_F_MQ | BLK_F_FLUSH);

        let protocol = frontend.get_protocol_features().context("GET_PROTOCOL_FEATURES")?;
        let mut wanted = VhostUserProtocolFeatures::CONFIG;
        if case.inflight {
            wanted |= VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        }
        if case.queues > 1 {
            wanted |= VhostUserProtocolFeatures::MQ;
        }
        for (bit, name) in [
            (VhostUserProtocolFeatures::CONFIG, "its configuration space"),
            (VhostUserProtocolFeatures::INFLIGHT_SHMFD, "tracking of requests in flight"),
            (VhostUserProtocolFeatures::MQ, "several queues"),
        ] {
            if wanted.contains(bit) && !protocol.contains(bit) {
                return unsupported(name);
            }
        }
        wanted |= protocol & (VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::MQ);
        frontend.set_protocol_features(wanted).context("SET_PROTOCOL_FEATURES")?;
        if wanted.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        if case.queues > 1 {
            let most = frontend.get_queue_num().context("GET_QUEUE_NUM")?;
            if most < case.queues.into() {
                return unsupported(&format!("more than {most} queue"));
            }
        }
        frontend.set_owner().context("SET_OWNER")?;
        let capacity_bytes = capacity(&mut frontend, case.queues)?;
        frontend.set_features(features).context("SET_FEATURES")?;
        Ok(Ok(Self { frontend, socket, features, capacity_bytes }))
    }

    /// Shares the guest's memory and starts the queues; `call` announces completions of all of them.
    pub(crate) fn start(&mut self, case: &Case, guest: &Guest, lanes: &[Lane], call: &EventFd) -> Result<()> {
        if case.inflight {
            let ask = VhostUserInflight::new(0, 0, case.queues, case.ring_size());
            let (area, file) = self.frontend.get_inflight_fd(&ask).context("GET_INFLIGHT_FD")?;
            let reply =
                VhostUserInflight::new(area.mmap_size, area.mmap_offset, case.queues, case.ring_size());
            self.frontend.set_inflight_fd(&reply, file.as_raw_fd()).context("SET_INFLIGHT_FD")?;
        }
        self.frontend.set_mem_table(&[guest.region()]).context("SET_MEM_TABLE")?;
        for (index, lane) in lanes.iter().enumerate() {
            self.start_queue(index, guest, lane, call)
                .with_context(|| format!("cannot start queue {index}"))?;
        }
        for index in 0..lanes.len() {
            self.frontend.set_vring_enable(index, true).context("SET_VRING_ENABLE")?;
        }
        // A server without replies may still be busy with the above; this one it has to answer.
        self.frontend.get_features().context("GET_FEATURES")?;
        Ok(())
    }

    fn start_queue(&mut self, index: usize, guest: &Guest, lane: &Lane, call: &EventFd) -> Result<()> {
        let config = lane.config();
        self.frontend.set_vring_num(index, config.size).context("SET_VRING_NUM")?;
        self.set_vring_base(index, config.format)?;
        let addresses = VringConfigData {
            queue_max_size: config.size,
            queue_size: config.size,
            flags: 0,
            desc_table_addr: guest.user_addr(config.desc),
            used_ring_addr: guest.user_addr(config.device),
            avail_ring_addr: guest.user_addr(config.driver),
            log_addr: None,
        };
        self.frontend.set_vring_addr(index, &addresses).context("SET_VRING_ADDR")?;
        self.frontend.set_vring_call(index, call).context("SET_VRING_CALL")?;
        self.frontend.set_vring_kick(index, lane.kick()).context("SET_VRING_KICK")?;
        Ok(())
    }

    /// A packed ring begins with both wrap counters set, in bits 15 and 31 of its base. The library sends 16 bits.
    fn set_vring_base(&mut self, index: usize, format: RingFormat) -> Result<()> {
        let base: u32 = match format {
            RingFormat::Split => 0,
            RingFormat::Packed => 0x8000_8000,
        };
        const VERSION: u32 = 1;
        let words = [FrontendReq::SET_VRING_BASE as u32, VERSION, 8, index as u32, base];
        let message: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.socket.write_all(&message).context("SET_VRING_BASE")
    }

    /// Stops the queues, so that the server is seen to let go of them in an orderly way.
    pub(crate) fn stop(&mut self, queues: usize) -> Result<()> {
        for index in 0..queues {
            self.frontend
                .get_vring_base(index)
                .with_context(|| format!("GET_VRING_BASE of queue {index}"))?;
        }
        Ok(())
    }
}

fn capacity(frontend: &mut Frontend, queues: u16) -> Result<u64> {
    let (_, config) = frontend
        .get_config(0, CONFIG_BYTES as u32, VhostUserConfigFlags::empty(), &[0; CONFIG_BYTES])
        .context("GET_CONFIG")?;
    let word = |at: usize| -> Option<[u8; 8]> { config.get(at..at + 8)?.try_into().ok() };
    let sectors = word(0).map(u64::from_le_bytes).context("a short configuration space")?;
    let found = config.get(NUM_QUEUES_AT..NUM_QUEUES_AT + 2).map_or(0, |b| u16::from_le_bytes([b[0], b[1]]));
    if queues > 1 && found < queues {
        bail!("the server was told to have {queues} queues but its configuration space says {found}");
    }
    if sectors == 0 {
        bail!("the server's disk is empty");
    }
    Ok(sectors * SECTOR_BYTES)
}

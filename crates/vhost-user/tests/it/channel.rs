//! What the back end has to say by itself.

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use reactor::Mode;
use vhost::vhost_user::message::{BackendReq, FrontendReq, VhostUserProtocolFeatures as Protocol};
use virtio::RingFormat;
use virtio::features::{EVENT_IDX, IN_ORDER, RING_PACKED};

use crate::device::Echo;
use crate::guest::{Driver, Guest, USER};
use crate::host::{Host, LOG_ALL, PATIENCE, eventually};
use crate::negotiation::{new_eventfd, read_eventfd};
use crate::raw::{NEED_REPLY, Raw, longs, words};

/// A front end that has one ring of 16 set up but for kick, call and enabling.
struct Peer {
    raw: Raw,
    channel: UnixStream,
    guest: Guest,
    driver: Driver,
}

impl Peer {
    fn new(host: &Host, protocol: Protocol) -> Self {
        let (channel, theirs) = UnixStream::pair().unwrap();
        channel.set_read_timeout(Some(PATIENCE)).unwrap();
        Self::with_channel(host, protocol, channel, &theirs.into())
    }

    fn with_channel(host: &Host, protocol: Protocol, channel: UnixStream, theirs: &OwnedFd) -> Self {
        let mut raw = Raw::connect(&host.path);
        raw.negotiate(LOG_ALL | RING_PACKED | IN_ORDER | EVENT_IDX);
        raw.set(FrontendReq::SET_PROTOCOL_FEATURES, protocol.bits());
        raw.send(FrontendReq::SET_BACKEND_REQ_FD, NEED_REPLY, &[], &[theirs.as_fd()]);
        assert_eq!(raw.reply_u64(), Some(0));
        let mut guest = Guest::new(1, 1 << 20);
        let driver = Driver::new(&mut guest, RingFormat::Split, 16, false);
        let region = guest.raw_table()[0];
        let body = longs(&[1, region.guest_phys_addr, region.memory_size, region.user_addr, 0]);
        raw.send(FrontendReq::SET_MEM_TABLE, 0, &body, &[guest.files[0].as_fd()]);
        raw.vring(FrontendReq::SET_VRING_NUM, 0, 16);
        let (desc, used, avail) =
            (driver.config.desc.0 + USER, driver.config.device.0 + USER, driver.config.driver.0 + USER);
        let body = [longs(&[0]), longs(&[desc, used, avail, 0])].concat();
        raw.send(FrontendReq::SET_VRING_ADDR, 0, &body, &[]);
        Self { raw, channel, guest, driver }
    }

    /// The next message on the channel, which asks for no reply.
    fn next(&mut self) -> (u32, Vec<u8>) {
        let mut header = [0; 12];
        self.channel.read_exact(&mut header).unwrap();
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!(word(4), 1, "version 1, no reply needed");
        let mut body = vec![0; word(8) as usize];
        self.channel.read_exact(&mut body).unwrap();
        (word(0), body)
    }

    fn request(&mut self, request: FrontendReq, body: &[u8]) {
        self.raw.send(request, NEED_REPLY, body, &[]);
        assert_eq!(self.raw.reply_u64(), Some(0));
    }
}

const IN_BAND: Protocol =
    Protocol::REPLY_ACK.union(Protocol::BACKEND_REQ).union(Protocol::INBAND_NOTIFICATIONS);

#[test]
fn kicks_and_calls_go_in_band() {
    let host = Host::new(2);
    let mut peer = Peer::new(&host, IN_BAND);
    peer.request(FrontendReq::SET_VRING_ENABLE, &words(&[0, 1]));
    assert!(!host.handle.status().queues[0].started);
    for i in 0..10u32 {
        let at = peer.driver.offer(&mut peer.guest, &i.to_le_bytes());
        // The first one starts the ring.
        peer.request(FrontendReq::VRING_KICK, &words(&[0, 0]));
        assert_eq!(peer.next(), (BackendReq::VRING_CALL.into(), words(&[0, 0])));
        assert!(peer.driver.ring.reap().unwrap().is_some());
        assert_eq!(peer.guest.read(at, 4), i.to_le_bytes());
    }
    peer.raw.send(FrontendReq::VRING_KICK, NEED_REPLY, &words(&[2, 0]), &[]);
    assert_eq!(peer.raw.reply_u64(), Some(1), "no such ring");
    // A descriptor goes before messages.
    let call = new_eventfd();
    peer.raw.vring_fd(FrontendReq::SET_VRING_CALL, 0, &call);
    assert_eq!(peer.raw.ask(FrontendReq::GET_QUEUE_NUM), Some(2));
    peer.driver.offer(&mut peer.guest, b"data");
    peer.request(FrontendReq::VRING_KICK, &words(&[0, 0]));
    eventually("an answer comes", || peer.driver.ring.reap().unwrap().is_some());
    let mut total = 0;
    while total < 2 {
        total += read_eventfd(&call);
    }
    peer.channel.set_nonblocking(true).unwrap();
    assert!(peer.channel.read(&mut [0]).is_err(), "no message as well");
}

#[test]
fn calls_that_find_the_channel_full_come_later() {
    let host = Host::new(1);
    let (channel, theirs) = UnixStream::pair().unwrap();
    channel.set_read_timeout(Some(PATIENCE)).unwrap();
    let theirs: OwnedFd = theirs.into();
    let mut peer = Peer::with_channel(&host, IN_BAND, channel, &theirs);
    peer.request(FrontendReq::SET_VRING_ENABLE, &words(&[0, 1]));
    // Somebody has filled it with the front half of a message to the last byte.
    let mut filled = 0;
    while let Ok(bytes) = rustix::net::send(
        &theirs,
        &[0; 64],
        rustix::net::SendFlags::DONTWAIT | rustix::net::SendFlags::NOSIGNAL,
    ) {
        filled += bytes;
    }
    for _ in 0..3 {
        peer.driver.offer(&mut peer.guest, b"data");
        peer.request(FrontendReq::VRING_KICK, &words(&[0, 0]));
        eventually("an answer comes", || peer.driver.ring.reap().unwrap().is_some());
    }
    // The control thread answers all the time, and sends the call when there is room.
    assert_eq!(peer.raw.ask(FrontendReq::GET_QUEUE_NUM), Some(1));
    let mut junk = vec![0; filled];
    peer.channel.read_exact(&mut junk).unwrap();
    assert_eq!(peer.next(), (BackendReq::VRING_CALL.into(), words(&[0, 0])));
}

#[test]
fn errors_go_in_band_where_there_is_no_descriptor_for_them() {
    let host = Host::new(1);
    let mut peer = Peer::new(&host, IN_BAND);
    peer.request(FrontendReq::SET_VRING_ENABLE, &words(&[0, 1]));
    peer.guest.write(peer.driver.config.driver, &[0, 0, 0xff, 0xff]);
    peer.request(FrontendReq::VRING_KICK, &words(&[0, 0]));
    assert_eq!(peer.next(), (BackendReq::VRING_ERR.into(), words(&[0, 0])));
}

#[test]
fn configuration_changes_are_announced_while_a_ring_runs() {
    let host = Host::new(1);
    let mut peer = Peer::new(&host, Protocol::REPLY_ACK | Protocol::BACKEND_REQ | Protocol::CONFIG);
    // Suspended: nothing may be sent yet.
    host.device.change_config(1, 77);
    peer.raw.send(FrontendReq::GET_CONFIG, 0, &words(&[1, 1, 0]), &[]);
    assert_eq!(peer.raw.reply().unwrap().1, [words(&[1, 1, 0]), vec![77]].concat());
    peer.channel.set_nonblocking(true).unwrap();
    assert!(peer.channel.read(&mut [0]).is_err());
    peer.channel.set_nonblocking(false).unwrap();

    let kick = new_eventfd();
    peer.raw.vring_fd(FrontendReq::SET_VRING_KICK, 0, &kick);
    peer.request(FrontendReq::SET_VRING_ENABLE, &words(&[0, 1]));
    assert_eq!(peer.next(), (BackendReq::CONFIG_CHANGE_MSG.into(), vec![]));
    host.device.change_config(1, 78);
    assert_eq!(peer.next(), (BackendReq::CONFIG_CHANGE_MSG.into(), vec![]));
}

/// User-Mode Linux listens on a pipe.
#[test]
fn the_channel_may_be_a_pipe() {
    let host = Host::new(1);
    let (read, write) = rustix::pipe::pipe().unwrap();
    let (unused, _) = UnixStream::pair().unwrap();
    let protocol = Protocol::REPLY_ACK | Protocol::BACKEND_REQ | Protocol::CONFIG;
    let mut peer = Peer::with_channel(&host, protocol, unused, &write);
    peer.raw.vring_fd(FrontendReq::SET_VRING_KICK, 0, &new_eventfd());
    peer.request(FrontendReq::SET_VRING_ENABLE, &words(&[0, 1]));
    host.device.change_config(0, 1);
    let mut header = [0; 12];
    std::fs::File::from(read).read_exact(&mut header).unwrap();
    assert_eq!(header.to_vec(), words(&[BackendReq::CONFIG_CHANGE_MSG.into(), 1, 0]));
}

#[test]
fn what_is_no_channel_is_refused() {
    let host = Host::new(1);
    let mut raw = Raw::connect(&host.path);
    raw.negotiate(0);
    let datagrams = std::os::unix::net::UnixDatagram::unbound().unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    for fd in [new_eventfd().as_fd(), datagrams.as_fd(), file.as_fd()] {
        raw.send(FrontendReq::SET_BACKEND_REQ_FD, NEED_REPLY, &[], &[fd]);
        assert_eq!(raw.reply_u64(), Some(1));
    }
}

#[test]
fn guests_of_a_polled_queue_are_offered_memory_to_kick() {
    let host = Host::with(Echo::new(1), |options| options.host_notifier = true, Mode::Poll);
    let protocol =
        Protocol::REPLY_ACK | Protocol::BACKEND_REQ | Protocol::BACKEND_SEND_FD | Protocol::HOST_NOTIFIER;
    let mut peer = Peer::new(&host, protocol);
    peer.raw.vring_fd(FrontendReq::SET_VRING_KICK, 0, &new_eventfd());
    peer.request(FrontendReq::SET_VRING_ENABLE, &words(&[0, 1]));
    let (request, body) = peer.next();
    assert_eq!(request, u32::from(BackendReq::VRING_HOST_NOTIFIER_MSG));
    assert_eq!(body, longs(&[0, 4096, 0]));
}

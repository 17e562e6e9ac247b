//! A log does not grow with what front ends do.
//!
//! Alone in its process, because it counts all that is logged.

#![allow(clippy::unwrap_used)]
#![allow(dead_code, reason = "shared with the other tests")]

#[path = "it/device.rs"]
mod device;
#[path = "it/guest.rs"]
mod guest;
#[path = "it/host.rs"]
mod host;
#[path = "it/raw.rs"]
mod raw;

use std::sync::atomic::{AtomicUsize, Ordering};

use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};
use vhost::vhost_user::message::FrontendReq;

use host::{Host, eventually};
use raw::{NEED_REPLY, Raw, words};

/// Lines of one kind in a minute; the test may see two minutes, and a line each about those left out.
const LINES_MAX: usize = 2 * (8 + 1);

static LINES: AtomicUsize = AtomicUsize::new(0);

/// Counts what is logged by default.
struct Counter;

impl Subscriber for Counter {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::INFO
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {
        LINES.fetch_add(1, Ordering::SeqCst);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// Lines that are logged by `act`, of which the device knows when its front end has gone.
fn lines(host: &Host, act: impl FnOnce()) -> usize {
    let before = LINES.load(Ordering::SeqCst);
    act();
    eventually("the session ends", || host.handle.status().peer.is_none());
    LINES.load(Ordering::SeqCst) - before
}

#[test]
fn a_log_stays_short_whatever_front_ends_do() {
    tracing::subscriber::set_global_default(Counter).unwrap();
    let host = Host::new(1);
    let sessions = |count: u64| host.handle.status().sessions >= count;
    let checks = lines(&host, || {
        for count in 1..=200 {
            drop(Raw::connect(&host.path));
            eventually("it is seen", || sessions(count));
        }
    });
    assert_eq!(checks, 0, "somebody looks whether the socket is served");

    let refused = lines(&host, || {
        let mut raw = Raw::connect(&host.path);
        raw.negotiate(0);
        for _ in 0..20_000 {
            raw.send(FrontendReq::SET_VRING_NUM, NEED_REPLY, &words(&[99, 1]), &[]);
            assert_eq!(raw.reply_u64(), Some(1));
        }
    });
    // It came and went, too.
    assert!((3..=3 * LINES_MAX).contains(&refused), "{refused} lines");

    let malformed = lines(&host, || {
        for count in 202..402 {
            Raw::connect(&host.path).send_bytes(&[0xff; 12], &[]);
            eventually("it is seen", || sessions(count));
        }
    });
    assert!((1..=2 * LINES_MAX).contains(&malformed), "{malformed} lines");

    let turned_away = lines(&host, || {
        let mut first = Raw::connect(&host.path);
        assert_eq!(first.ask(FrontendReq::GET_QUEUE_NUM), Some(1));
        for _ in 0..200 {
            Raw::connect(&host.path).wait_for_end();
        }
    });
    assert!((1..=3 * LINES_MAX).contains(&turned_away), "{turned_away} lines");
}

//! Scrapers, and others who connect.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use super::*;

const LONG: Duration = Duration::from_secs(180);
const SCRAPE: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n";

/// A server at a Unix socket in a folder of its own, whose page is what `page` says.
struct Served {
    path: PathBuf,
    thread: Option<MetricsThread>,
    _folder: tempfile::TempDir,
}

impl Served {
    fn new(page: impl Fn() -> String + Send + 'static) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.sock");
        let socket = MetricsSocket::listen(&Address::Unix(path.clone())).unwrap();
        let thread = Some(socket.answer(Box::new(page)).unwrap());
        Self { path, thread, _folder: folder }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream
    }

    fn scrape(&self) -> String {
        ask(self.connect())
    }
}

fn ask(mut stream: impl Read + Write) -> String {
    stream.write_all(SCRAPE).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn scrapes_are_answered_one_after_the_other_over_unix_and_tcp() {
    let served = Served::new(|| "page\n".to_owned());
    for _ in 0..3 * CONNECTIONS_MAX {
        assert!(served.scrape().ends_with("\r\n\r\npage\n"));
    }
    let socket = MetricsSocket::listen(&"127.0.0.1:0".parse().unwrap()).unwrap();
    let place = socket.place();
    let _thread = socket.answer(Box::new(|| "page\n".to_owned())).unwrap();
    let address = place.strip_prefix("http://").and_then(|rest| rest.strip_suffix("/metrics")).unwrap();
    assert!(ask(TcpStream::connect(address).unwrap()).ends_with("\r\n\r\npage\n"));
}

#[test]
fn who_takes_all_places_and_says_nothing_loses_the_first_of_them() {
    let served = Served::new(|| "page\n".to_owned());
    let mut silent: Vec<_> = (0..CONNECTIONS_MAX).map(|_| served.connect()).collect();
    assert!(served.scrape().ends_with("page\n"));
    assert_eq!(silent[0].read(&mut [0]).unwrap(), 0, "the oldest one is closed");
}

#[test]
fn who_does_not_read_its_answer_keeps_nobody_waiting() {
    let served = Served::new(|| "x".repeat(4 << 20));
    let mut deaf = served.connect();
    deaf.write_all(SCRAPE).unwrap();
    for _ in 0..3 {
        assert_eq!(served.scrape().matches('x').count(), 1 + (4 << 20), "text/plain has one, too");
    }
}

#[test]
fn the_thread_ends_whoever_is_connected_and_takes_its_socket_along() {
    let mut served = Served::new(|| "x".repeat(4 << 20));
    let (mut silent, mut begun, mut deaf) = (served.connect(), served.connect(), served.connect());
    begun.write_all(b"GET /metrics").unwrap();
    deaf.write_all(SCRAPE).unwrap();
    assert!(served.scrape().starts_with("HTTP/1.1 200 OK\r\n"));
    drop(served.thread.take());
    assert_eq!(silent.read(&mut [0]).unwrap(), 0);
    assert!(!served.path.exists());
}

#[test]
fn a_place_that_is_taken_is_refused_with_the_reason() {
    let served = Served::new(String::new);
    let listen = |address: &str| MetricsSocket::listen(&address.parse().unwrap());
    let refusal = |address: &str| format!("{:#}", listen(address).err().unwrap());
    let unix = refusal(&format!("unix:{}", served.path.display()));
    assert!(unix.starts_with("metrics: ") && unix.contains("is in use by process"), "{unix}");
    let first = TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp = refusal(&first.local_addr().unwrap().to_string());
    assert!(tcp.starts_with("metrics: cannot listen at 127.0.0.1:"), "{tcp}");
    assert!(tcp.contains("in use"), "{tcp}");
}

#[test]
fn figures_that_do_not_come_keep_nobody_from_ending() {
    let (asked, collecting) = channel();
    let (come, figures) = channel::<()>();
    let mut served = Served::new(move || {
        asked.send(()).unwrap();
        let _ = figures.recv();
        String::new()
    });
    let mut scraper = served.connect();
    scraper.write_all(SCRAPE).unwrap();
    collecting.recv_timeout(LONG).unwrap();
    drop(served.thread.take());
    drop(come);
    let mut rest = Vec::new();
    // Closed without an answer, or with the last one: the thread ends now.
    let _ = scraper.read_to_end(&mut rest);
}

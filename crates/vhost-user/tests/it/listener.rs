//! Who may connect, and when.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use reactor::{Mode, Pool};
use vhost::vhost_user::message::FrontendReq;
use vhost_user::{Error, ListenError, Options, Server};
use virtio::QueueSet;

use crate::device::Echo;
use crate::host::{Host, eventually, new_path};
use crate::raw::Raw;

fn server(options: &Options) -> Result<Server, Error> {
    let pool = Arc::new(Pool::start(reactor::Options::default()).unwrap());
    Server::new(QueueSet::new(Echo::new(1), pool, Mode::Hybrid, "test"), options)
}

#[test]
fn a_second_front_end_is_turned_away() {
    let host = Host::new(1);
    let mut first = Raw::connect(&host.path);
    assert_eq!(first.ask(FrontendReq::GET_QUEUE_NUM), Some(1));
    let mut second = Raw::connect(&host.path);
    second.wait_for_end();
    assert_eq!(first.ask(FrontendReq::GET_QUEUE_NUM), Some(1));
    let status = host.handle.status();
    assert_eq!((status.sessions, status.refused), (1, 1));
    assert_eq!(status.peer.unwrap().pid, std::process::id() as i32);
    drop(first);
    eventually("the session ends", || host.handle.status().peer.is_none());
    assert_eq!(Raw::connect(&host.path).ask(FrontendReq::GET_QUEUE_NUM), Some(1));
}

#[test]
fn the_socket_of_a_dead_service_is_replaced() {
    let options = Options::new(new_path());
    drop(UnixListener::bind(&options.socket).unwrap());
    assert!(options.socket.exists());
    let server = server(&options).unwrap();
    UnixStream::connect(&options.socket).unwrap();
    drop(server);
    assert!(!options.socket.exists());
}

#[test]
fn the_socket_of_a_living_service_is_left_alone() {
    let host = Host::new(1);
    let Err(Error::Listen(error)) = server(&Options::new(&host.path)) else { panic!("it is in use") };
    assert_eq!(
        error.to_string(),
        format!("{} is in use by process {}", host.path.display(), std::process::id())
    );
    assert!(matches!(error, ListenError::InUse { .. }));
    assert_eq!(Raw::connect(&host.path).ask(FrontendReq::GET_QUEUE_NUM), Some(1));
}

#[test]
fn what_is_no_socket_is_left_alone() {
    let options = Options::new(new_path());
    std::fs::write(&options.socket, "precious").unwrap();
    assert!(matches!(server(&options), Err(Error::Listen(ListenError::NotASocket { .. }))));
    assert_eq!(std::fs::read_to_string(&options.socket).unwrap(), "precious");
    std::fs::remove_file(&options.socket).unwrap();
}

#[test]
fn a_socket_that_is_somebody_elses_by_now_is_not_removed() {
    let options = Options::new(new_path());
    let server = server(&options).unwrap();
    std::fs::remove_file(&options.socket).unwrap();
    let other = UnixListener::bind(&options.socket).unwrap();
    drop(server);
    assert!(options.socket.exists());
    drop(other);
    std::fs::remove_file(&options.socket).unwrap();
}

#[test]
fn the_socket_has_the_permissions_asked_for() {
    for mode in [0o600, 0o666, 0o660] {
        let options = Options { socket_mode: mode, ..Options::new(new_path()) };
        let _server = server(&options).unwrap();
        let found = std::fs::metadata(&options.socket).unwrap().permissions().mode();
        assert_eq!(found & 0o777, mode);
    }
}

#[test]
fn a_path_that_cannot_be_is_named() {
    let long = "x".repeat(200);
    for path in [format!("/tmp/{long}"), "/nonexistent/socket".to_owned()] {
        let Err(error) = server(&Options::new(&path)) else { panic!("{path} cannot be") };
        assert!(error.to_string().contains(&path), "{error}");
    }
}

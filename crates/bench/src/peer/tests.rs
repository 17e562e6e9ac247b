use super::*;

const FILE: &str = r#"
name = "some-server"
kind = "vhost-user"
command = ["srv", "--socket={socket}", "{backend}", "-q", "{queues}", "-c{cpu}"]
version = ["no-such-program-anywhere", "--version"]
[backends]
null = ["--null", "--bytes={size}"]
tmpfs = "file:{path}"
[files]
"config.json" = '{"disk": "{path}", "size_mib": {size_mib}}'
"#;

fn read(text: &str) -> Result<Vec<Peer>> {
    parse(&[("test.toml".into(), text.into())])
}

#[test]
fn placeholders_are_filled() {
    let peer = read(FILE).unwrap().remove(0);
    let null = Target { kind: BackendKind::Null, bytes: 4096, path: None };
    let dir = Path::new("/d");
    let fill = Fill { dir, target: &null, queues: 2, cpu: 3, more: Vec::new() };
    assert_eq!(
        peer.command(&fill),
        ["srv", "--socket=/d/blk.sock", "--null", "--bytes=4096", "-q", "2", "-c3"],
        "a list of words becomes as many arguments"
    );
    let file = Target { kind: BackendKind::Tmpfs, bytes: 2 << 20, path: Some("/x".into()) };
    assert_eq!(peer.command(&Fill { target: &file, ..fill })[2], "file:/x");
}

#[test]
fn files_are_written_before_the_start() {
    let peer = read(FILE).unwrap().remove(0);
    let scratch = tempfile::tempdir().unwrap();
    let target = Target { kind: BackendKind::Tmpfs, bytes: 2 << 20, path: Some("/x".into()) };
    let fill = Fill { dir: scratch.path(), target: &target, queues: 1, cpu: 0, more: Vec::new() };
    peer.write_files(&fill).unwrap();
    let text = std::fs::read_to_string(scratch.path().join("config.json")).unwrap();
    assert_eq!(text, r#"{"disk": "/x", "size_mib": 2}"#);
}

#[test]
fn a_program_that_is_not_there_is_a_reason_not_an_error() {
    let peer = read(FILE).unwrap().remove(0);
    assert_eq!(peer.detect().unwrap_err(), "no-such-program-anywhere is not installed");
    assert!(peer.has_backend(BackendKind::Null) && !peer.has_backend(BackendKind::Memory));
}

#[test]
fn the_version_is_the_first_line() {
    let echo = FILE.replace(r#""no-such-program-anywhere", "--version""#, r#""echo", "srv 1.2\nmore""#);
    assert_eq!(read(&echo).unwrap()[0].detect().unwrap().version, "srv 1.2");
    let fails = FILE.replace(r#""no-such-program-anywhere", "--version""#, r#""false""#);
    assert!(read(&fails).unwrap()[0].detect().unwrap_err().starts_with("false failed with"));
}

#[test]
fn mistakes_are_named() {
    assert!(read(&FILE.replace("kind", "kid")).is_err());
    let bare = "name = \"b\"\nkind = \"bare\"";
    assert!(read(bare).is_ok());
    assert!(read(&bare.replace("bare", "vhost-user")).unwrap_err().to_string().contains("needs a `command`"));
    let twice = [("a".to_owned(), bare.to_owned()), ("b".to_owned(), bare.to_owned())];
    assert_eq!(parse(&twice).unwrap_err().to_string(), "two peers are called `b`");
}

#[test]
fn the_peers_that_come_with_the_program_are_sound() {
    let peers = parse(&crate::data::peers(None).unwrap()).unwrap();
    assert!(peers.iter().any(|peer| peer.kind == PeerKind::Bare));
    assert!(peers.iter().any(|peer| peer.name == "exitless" && peer.kind == PeerKind::VhostUser));
}

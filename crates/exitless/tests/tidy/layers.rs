//! Who may know whom.

use crate::Finding;
use crate::source::{Source, words};

/// A crate of ours: its folder, the name that sources use for it, and the crates that it may know.
struct Room {
    folder: &'static str,
    name: &'static str,
    may_know: &'static [&'static str],
}

const fn room(folder: &'static str, name: &'static str, may_know: &'static [&'static str]) -> Room {
    Room { folder, name, may_know }
}

/// What tests need from a machine: for the tests of all crates, and nothing else.
const FOR_TESTS: &str = "needs";
/// Devices and transports, layer 2, do not know each other.
const BELOW_DEVICES: &[&str] = &["reactor", "virtio"];
const ROOMS: &[Room] = &[
    room("reactor", "reactor", &[]),
    room("virtio", "virtio", &["reactor"]),
    room("qcow2", "qcow2", &[]),
    room("blk", "blk", &["reactor", "virtio", "qcow2"]),
    room("rng", "rng", BELOW_DEVICES),
    room("net", "net", BELOW_DEVICES),
    room("rdma", "rdma", BELOW_DEVICES),
    room("vhost-user", "vhost_user", BELOW_DEVICES),
    room("vmm", "vmm", BELOW_DEVICES),
    room("guest", "exitless_guest", &["virtio"]),
    room("bench", "bench", BELOW_DEVICES),
    room(FOR_TESTS, FOR_TESTS, &[]),
    room(
        "exitless",
        "exitless",
        &["reactor", "virtio", "blk", "rng", "net", "rdma", "vhost_user", "vmm", "bench"],
    ),
];

const DEVICES: &[&str] = &["blk", "rng", "net", "rdma"];
const TRANSPORTS: &[&str] = &["vhost-user", "vmm"];
/// What would tie a device to a transport, as part of a name.
const WORDS_OF_TRANSPORTS: &[&str] = &["pci", "vhost", "kvm", "mmio"];
/// What would tie a transport to a device.
const WORDS_OF_DEVICES: &[&str] = &["blk", "disk", "rng", "entropy", "nic", "rdma"];

fn find(folder: &str) -> Result<&'static Room, Finding> {
    let room = ROOMS.iter().find(|room| room.folder == folder);
    room.ok_or_else(|| format!("crates/{folder}: it has no layer; give it one in tests/tidy/layers.rs"))
}

/// Whether `room` may know the crate that sources call `name`. Crates that are not ours are anybody's.
fn may_know(room: &Room, name: &str) -> bool {
    let ours = ROOMS.iter().any(|other| other.name == name);
    !ours || room.name == name || name == FOR_TESTS || room.may_know.contains(&name)
}

/// Dependencies of any kind on crates of the same or a higher layer.
pub(crate) fn of_manifest(folder: &str, manifest: &toml::Table) -> Vec<Finding> {
    let room = match find(folder) {
        Ok(room) => room,
        Err(finding) => return vec![finding],
    };
    let tables = ["dependencies", "dev-dependencies", "build-dependencies"];
    let targets = manifest.get("target").and_then(toml::Value::as_table).into_iter().flatten();
    let places = targets.filter_map(|(_, target)| target.as_table()).chain([manifest]);
    let dependencies = places
        .flat_map(|place| tables.map(|table| place.get(table).and_then(toml::Value::as_table)))
        .flatten()
        .flat_map(toml::Table::keys);
    let names = |key: &str| [key, key.trim_start_matches("exitless-")].map(|name| name.replace('-', "_"));
    let wrong = dependencies.filter(|key| !names(key).iter().all(|name| may_know(room, name)));
    let shipped = manifest.get("dependencies").and_then(|table| table.as_table()?.get(FOR_TESTS));
    let wrong = wrong.map(String::as_str).chain(shipped.map(|_| FOR_TESTS));
    wrong.map(|key| format!("crates/{folder}/Cargo.toml: {folder} must not know {key}")).collect()
}

/// `use` of crates of the same or a higher layer.
pub(crate) fn of_source(source: &Source) -> Vec<Finding> {
    let Ok(room) = find(source.krate()) else { return Vec::new() };
    let used = source.bare.iter().enumerate().filter_map(|(index, line)| {
        let line = line.trim_start();
        let line = line.strip_prefix("pub ").unwrap_or(line);
        let path = line.strip_prefix("use ").or_else(|| line.strip_prefix("extern crate "))?;
        Some((index + 1, words(path.trim_start_matches("::")).next()?))
    });
    let wrong = used.filter(|(_, name)| !may_know(room, name));
    wrong.map(|(line, name)| source.finding(line, format!("{} must not know {name}", room.name))).collect()
}

/// Names in code or literals that tie a device to a transport or a transport to a device.
pub(crate) fn names(source: &Source) -> Vec<Finding> {
    let (who, forbidden) = match source.krate() {
        folder if DEVICES.contains(&folder) => ("a device", WORDS_OF_TRANSPORTS),
        folder if TRANSPORTS.contains(&folder) => ("a transport", WORDS_OF_DEVICES),
        _ => return Vec::new(),
    };
    let found = source.real(&source.code).flat_map(|(line, code)| {
        let parts = words(code).flat_map(parts_of_name).filter(|part| forbidden.contains(&part.as_str()));
        parts.map(move |part| (line, part)).collect::<Vec<_>>()
    });
    found.map(|(line, part)| source.finding(line, format!("{who} must not say `{part}`"))).collect()
}

/// `virtio_blk`, `VirtioBlk` and `VIRTIO_BLK` are all `virtio` and `blk`.
fn parts_of_name(name: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut before = '_';
    for c in name.chars() {
        if c == '_' || (c.is_uppercase() && before.is_lowercase()) {
            parts.push(String::new());
        }
        if c != '_' {
            parts.iter_mut().last().into_iter().for_each(|part| part.extend(c.to_lowercase()));
        }
        before = c;
    }
    parts
}

/// Crates that do not inherit the workspace's lints.
pub(crate) fn lints(folder: &str, manifest: &toml::Table) -> Vec<Finding> {
    let inherited = manifest.get("lints").and_then(|lints| lints.get("workspace")?.as_bool());
    if inherited == Some(true) {
        return Vec::new();
    }
    vec![format!("crates/{folder}/Cargo.toml: it must inherit the lints: [lints] workspace = true")]
}

#[test]
fn a_manifest_that_knows_too_much_is_found() {
    let manifest = |text: &str| text.parse::<toml::Table>().unwrap();
    let sideways = manifest("[dependencies]\nblk.workspace = true\nserde = '1'");
    assert_eq!(
        of_manifest("vhost-user", &sideways),
        ["crates/vhost-user/Cargo.toml: vhost-user must not know blk"]
    );
    let upwards = manifest("[dev-dependencies]\nexitless-vhost-user = { path = '..' }");
    assert_eq!(of_manifest("virtio", &upwards).len(), 1);
    let hidden = manifest("[target.'cfg(loom)'.dependencies]\nvirtio.workspace = true");
    assert_eq!(of_manifest("reactor", &hidden).len(), 1);
    let guest = manifest("[dependencies]\nexitless-guest = { path = '../guest' }");
    assert_eq!(of_manifest("exitless", &guest).len(), 1, "it is embedded, not linked");
    let itself =
        manifest("[dev-dependencies]\nexitless-virtio = { path = '.' }\n[dependencies]\nreactor = '1'");
    assert!(of_manifest("virtio", &itself).is_empty());
    assert_eq!(of_manifest("sound", &itself).len(), 1, "a crate without a layer");
    assert!(of_manifest("blk", &manifest("[dev-dependencies]\nneeds.workspace = true")).is_empty());
    let shipped = manifest("[dependencies]\nneeds.workspace = true");
    assert_eq!(of_manifest("blk", &shipped), ["crates/blk/Cargo.toml: blk must not know needs"]);
    assert_eq!(lints("blk", &sideways).len(), 1);
    assert!(lints("blk", &manifest("[lints]\nworkspace = true")).is_empty());
}

#[test]
fn a_source_that_knows_too_much_is_found() {
    let text = "use reactor::Poller;\npub use blk::Blk;\nuse ::bench;\n// use rng;\nuse std::net;\nuse virtio_driver::X;";
    let source = Source::new("crates/vhost-user/src/a.rs", text);
    assert_eq!(
        of_source(&source),
        [
            "crates/vhost-user/src/a.rs:2: vhost_user must not know blk",
            "crates/vhost-user/src/a.rs:3: vhost_user must not know bench",
        ]
    );
}

#[test]
fn names_from_the_other_side_are_found() {
    let text = "// PCI\nstruct PciBar;\nconst VHOST_X: u8 = 0;\nlet a = \"no kvm here\";\nexplicit();";
    assert_eq!(names(&Source::new("crates/blk/src/a.rs", text)).len(), 3);
    assert!(names(&Source::new("crates/vhost-user/src/a.rs", text)).is_empty());
    let text = "fn virtio_blk() {}\nlet disk = 5;\nlet would_block = 5;";
    assert_eq!(names(&Source::new("crates/vhost-user/src/a.rs", text)).len(), 2);
    assert!(names(&Source::new("crates/exitless/src/a.rs", text)).is_empty());
}

//! Every input the fuzzer ever found interesting, or that once broke something, runs with every `cargo test`.

use std::panic::catch_unwind;
use std::path::Path;

fn replay(target: &str, run: fn(&[u8])) {
    let package = std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo says where the package is");
    let corpus = Path::new(&package).join("corpus").join(target);
    let mut inputs = Vec::new();
    for entry in std::fs::read_dir(&corpus).expect("the corpus folder is there") {
        inputs.push(entry.expect("the corpus folder can be listed").path());
    }
    assert!(!inputs.is_empty(), "no inputs in {}", corpus.display());
    inputs.retain(|path| {
        let data = std::fs::read(path).expect("a corpus file can be read");
        catch_unwind(|| run(&data)).is_err()
    });
    assert!(inputs.is_empty(), "these inputs break it: {inputs:?}");
}

#[test]
fn ring() {
    replay("ring", fuzz::ring::run);
}

#[test]
fn record() {
    replay("record", fuzz::record::run);
}

#[test]
fn memory() {
    replay("memory", fuzz::memory::run);
}

#[test]
fn blk() {
    replay("blk", fuzz::blk::run);
}

#[test]
fn vhost_user() {
    replay("vhost_user", fuzz::vhost_user::run);
}

#[test]
fn pci() {
    replay("pci", fuzz::pci::run);
}

#[test]
fn config() {
    replay("config", fuzz::config::run);
}

#[test]
fn qcow2() {
    replay("qcow2", fuzz::qcow2::run);
}

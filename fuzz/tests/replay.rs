//! Every input the fuzzer ever found interesting, or that once broke something, runs with every `cargo test`.

use std::path::Path;

fn replay(target: &str, run: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let mut count = 0;
    for entry in std::fs::read_dir(&corpus).expect("the corpus folder is there") {
        let path = entry.expect("the corpus folder can be listed").path();
        let data = std::fs::read(&path).expect("a corpus file can be read");
        println!("{}", path.display());
        run(&data);
        count += 1;
    }
    assert!(count > 0, "no inputs in {}", corpus.display());
}

#[test]
fn ring() {
    replay("ring", fuzz::ring::run);
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

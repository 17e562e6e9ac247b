//! The rules of this house that a compiler does not know: who may know whom, where unsafe code may stand, what no
//! file may contain. `ARCHITECTURE.md` gives the reasons.
//!
//! A rule is a function from sources to findings, and is shown to fail on a bad sample in the file that defines it.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

#[path = "tidy/fence.rs"]
mod fence;
#[path = "tidy/layers.rs"]
mod layers;
#[path = "tidy/readme.rs"]
mod readme;
#[path = "tidy/source.rs"]
mod source;
#[path = "tidy/words.rs"]
mod words;

use std::fs;
use std::path::{Path, PathBuf};

use source::Source;

/// A place and what is wrong there.
pub(crate) type Finding = String;

fn root() -> PathBuf {
    // As it is now: a clone that shares this one's target directory runs the same program.
    let package = std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo says where the package is");
    Path::new(&package).join("../..")
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()))
}

fn crates() -> Vec<String> {
    let entries = fs::read_dir(root().join("crates")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> =
        names.filter(|name| root().join("crates").join(name).join("Cargo.toml").exists()).collect();
    names.sort();
    names
}

fn manifests() -> Vec<(String, toml::Table)> {
    let manifest = |name: String| {
        let table = read(&root().join("crates").join(&name).join("Cargo.toml")).parse().unwrap();
        (name, table)
    };
    crates().into_iter().map(manifest).collect()
}

/// All Rust sources of the workspace.
fn sources() -> Vec<Source> {
    fn collect(folder: &Path, into: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && path.file_name().is_some_and(|name| name != "target") {
                collect(&path, into);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                into.push(path);
            }
        }
    }
    let mut paths = Vec::new();
    for name in crates() {
        collect(&root().join("crates").join(name), &mut paths);
    }
    collect(&root().join("fuzz"), &mut paths);
    paths.sort();
    let relative = |path: &Path| path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
    paths.iter().map(|path| Source::new(&relative(path), &read(path))).collect()
}

/// Applies a rule for one file to all of them.
fn of_all(rule: impl Fn(&Source) -> Vec<Finding>) -> Vec<Finding> {
    let sources = sources();
    assert!(sources.len() > 50, "only {} sources found", sources.len());
    sources.iter().flat_map(rule).collect()
}

fn assert_none(findings: Vec<Finding>) {
    assert!(findings.is_empty(), "{} findings:\n{}", findings.len(), findings.join("\n"));
}

#[test]
fn crates_depend_on_lower_layers_only() {
    assert_none(
        manifests().iter().flat_map(|(name, manifest)| layers::of_manifest(name, manifest)).collect(),
    );
}

#[test]
fn sources_use_lower_layers_only() {
    assert_none(of_all(layers::of_source));
}

#[test]
fn devices_name_no_transport_and_transports_no_device() {
    assert_none(of_all(layers::names));
}

#[test]
fn every_crate_inherits_the_lints() {
    assert_none(manifests().iter().flat_map(|(name, manifest)| layers::lints(name, manifest)).collect());
}

#[test]
fn unsafe_code_stays_behind_the_fence() {
    assert_none(of_all(fence::of_source));
}

#[test]
fn the_fence_has_no_gap_for_a_file_that_is_gone() {
    let sources = sources();
    assert_none(fence::unused(&sources));
}

#[test]
fn every_unsafe_says_why_it_is_sound() {
    assert_none(of_all(fence::arguments));
}

#[test]
fn no_file_is_longer_than_it_may_be() {
    assert_none(of_all(words::length));
}

#[test]
fn every_crate_opens_with_its_purpose() {
    assert_none(of_all(words::opening));
}

#[test]
fn nothing_is_left_undone_or_printed_for_debugging() {
    assert_none(of_all(words::left_over));
}

#[test]
fn nothing_is_unwrapped_outside_of_tests() {
    assert_none(of_all(words::unwrapped));
}

#[test]
fn modules_are_named_after_what_they_do() {
    assert_none(of_all(words::module_name));
}

#[test]
fn cargo_run_is_the_program() {
    let defaults: Vec<_> =
        manifests().into_iter().filter_map(|(_, m)| m["package"].get("default-run").cloned()).collect();
    assert_eq!(defaults, ["exitless".into()], "`cargo run` would not know which program to run");
}

#[test]
fn commands_in_the_documentation_are_commands_of_the_program() {
    let documents = ["README.md", "ARCHITECTURE.md"].map(|name| root().join(name));
    let more = fs::read_dir(root().join("docs")).into_iter().flatten().map(|entry| entry.unwrap().path());
    let documents = documents.into_iter().chain(more);
    let documents = documents.filter(|path| path.extension().is_some_and(|extension| extension == "md"));
    let documents = documents.filter(|path| path.exists());
    assert_none(documents.flat_map(|path| readme::commands(&path.to_string_lossy(), &read(&path))).collect());
}

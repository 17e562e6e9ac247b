//! Where unsafe code may stand, and what must stand beside it.

use crate::Finding;
use crate::source::{Source, words};

/// The files that may contain unsafe code. Tests and examples, which nobody ships, need no place here, but their
/// unsafe code needs an argument like any other.
const ALLOWED: &[&str] = &[
    "crates/bench/src/server/spawn.rs",
    "crates/blk/src/backends/file/device.rs",
    "crates/blk/src/backends/file/fixed.rs",
    "crates/blk/src/backends/file/inline.rs",
    "crates/blk/src/backends/lock.rs",
    "crates/blk/src/backends/file/ring.rs",
    "crates/blk/src/backends/memory/copy.rs",
    "crates/blk/src/backends/memory/store.rs",
    "crates/guest/src/image/bytes.rs",
    "crates/guest/src/image/main.rs",
    "crates/guest/src/machine/clock.rs",
    "crates/guest/src/machine/heap.rs",
    "crates/guest/src/machine/mmio.rs",
    "crates/guest/src/machine/physical.rs",
    "crates/guest/src/machine/service.rs",
    "crates/guest/src/machine/smp.rs",
    "crates/guest/src/machine/sync.rs",
    "crates/reactor/src/apart.rs",
    "crates/reactor/src/raw_fd.rs",
    "crates/reactor/src/tsc.rs",
    "crates/reactor/src/watchdog/signal.rs",
    "crates/virtio/src/memory/area.rs",
    "crates/virtio/src/memory/backing.rs",
    "crates/virtio/src/memory/mapping.rs",
    "crates/virtio/src/memory/segment.rs",
    "crates/virtio/src/memory/sigbus.rs",
    "crates/virtio/src/memory/translate.rs",
    "crates/vmm/src/raw.rs",
    "crates/vmm/src/vcpu/kick.rs",
];

const OPT_IN: &str = "#![allow(unsafe_code)]";
/// A shorter header gives no argument.
const HEADER_WORDS_MIN: usize = 16;

fn is_unsafe(line: &str) -> bool {
    words(line).any(|word| word == "unsafe")
}

/// Unsafe code in files that may not have it, or that do not say why they do.
pub(crate) fn of_source(source: &Source) -> Vec<Finding> {
    if source.test.iter().all(|&test| test) {
        return Vec::new();
    }
    let Some(line) = source.bare.iter().position(|line| is_unsafe(line)).map(|index| index + 1) else {
        return match source.bare.iter().position(|line| line.contains("allow(unsafe_code)")) {
            Some(index) => vec![source.finding(index + 1, "it allows unsafe code and has none")],
            None => Vec::new(),
        };
    };
    let mut findings = Vec::new();
    if !ALLOWED.contains(&source.path.as_str()) {
        findings.push(
            source.finding(line, "unsafe code; files that may have it are listed in tests/tidy/fence.rs"),
        );
    }
    let header = source
        .text
        .iter()
        .take_while(|line| line.trim().is_empty() || line.starts_with("//!") || line.starts_with("#!["));
    let header: Vec<_> = header.collect();
    if !header.iter().any(|line| line.starts_with(OPT_IN)) {
        findings.push(source.finding(1, format!("its header must have {OPT_IN}")));
    }
    let argument = header.iter().filter_map(|line| line.strip_prefix("//!")).flat_map(words).count();
    if argument < HEADER_WORDS_MIN {
        findings
            .push(source.finding(1, "its header must say why it needs unsafe code and what keeps it sound"));
    }
    findings
}

/// Files that may contain unsafe code and do not, or do not exist.
pub(crate) fn unused(sources: &[Source]) -> Vec<Finding> {
    let needs = |path: &str| {
        sources.iter().any(|source| source.path == path && source.bare.iter().any(|line| is_unsafe(line)))
    };
    let unused = ALLOWED.iter().filter(|path| !needs(path));
    unused.map(|path| format!("{path}: it is allowed unsafe code and has none")).collect()
}

/// Unsafe code without an argument, or with one that trusts the guest.
pub(crate) fn arguments(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (index, line) in source.bare.iter().enumerate().filter(|(_, line)| is_unsafe(line)) {
        if line.trim_start().starts_with("#") {
            continue;
        }
        let argument = argument(source, index);
        if !argument.contains("SAFETY:") && !argument.contains("# Safety") {
            findings.push(source.finding(index + 1, "unsafe code without a SAFETY: comment"));
        } else if argument.to_lowercase().contains("guest will not") {
            findings.push(source.finding(index + 1, "the guest will, if it can"));
        }
    }
    findings
}

/// The comments that belong to the unsafe code in a line: on it, and above it up to the statement before.
fn argument(source: &Source, line: usize) -> String {
    let ends = |line: &str| line.trim_end().ends_with([';', '{', '}', ',']);
    let above = (0..line).rev().take_while(|&above| !ends(&source.bare[above]));
    above.chain([line]).map(|line| source.text[line].as_str()).collect::<Vec<_>>().join("\n")
}

#[test]
fn unsafe_code_outside_the_fence_is_found() {
    let rules = |text: &str| of_source(&Source::new("crates/x/src/a.rs", text));
    assert_eq!(rules("//! Words.\nfn a() { unsafe { b() } }").len(), 3);
    let header = format!("//! {}\n{OPT_IN}\n", "word ".repeat(HEADER_WORDS_MIN));
    assert_eq!(rules(&format!("{header}unsafe impl Send for A {{}}")).len(), 1, "the list only");
    assert_eq!(rules(&format!("{header}// unsafe\nlet a = \"unsafe\";")).len(), 1, "needless");
    assert!(of_source(&Source::new("crates/x/tests/a.rs", "unsafe { b() }")).is_empty());
    assert!(rules("#![deny(unsafe_code)]\n/// Not unsafe.\nfn a() {}").is_empty());
}

#[test]
fn unsafe_code_without_an_argument_is_found() {
    let lines = |text: &str| arguments(&Source::new("crates/x/src/a.rs", text)).len();
    assert_eq!(lines("// SAFETY: sound.\nlet a = unsafe { b() };\nlet c = unsafe { d() };"), 1);
    assert_eq!(lines("// SAFETY: sound.\nlet a =\n    unsafe { b() };"), 0);
    assert_eq!(lines("/// # Safety\n/// Be careful.\npub unsafe fn a() {}"), 0);
    assert_eq!(lines("// SAFETY: the guest will not do that.\nunsafe { b() }"), 1);
    assert_eq!(lines("// SAFETY: first.\nlet a = 1;\nunsafe { b() }"), 1);
}

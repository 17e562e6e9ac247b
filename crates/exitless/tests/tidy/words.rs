//! What no file may contain, and what each must.

use crate::Finding;
use crate::source::{Source, words};

/// Lines in a file.
const LINES_MAX: usize = 600;
/// Marks of unfinished work, in comments too.
const MARKS: &[&str] = &["TODO", "FIXME", "XXX", "HACK"];
/// Macros that only unfinished code has.
const UNFINISHED: &[&str] = &["todo!", "unimplemented!", "dbg!"];
/// Macros that take the terminal from whoever uses a library.
const PRINTING: &[&str] = &["println!", "eprintln!", "print!", "eprint!"];
/// Crates that belong to the terminal: the program, what it measures with, and what tells a tester what is missing.
const PROGRAMS: &[&str] = &["exitless", "bench", "needs"];
/// Names that say nothing about what is in a module.
const EMPTY_NAMES: &[&str] =
    &["util", "utils", "helper", "helpers", "common", "manager", "misc", "base", "core"];

/// Files that hold more than one idea.
pub(crate) fn length(source: &Source) -> Vec<Finding> {
    let lines = source.text.len();
    if lines <= LINES_MAX {
        return Vec::new();
    }
    vec![source.finding(LINES_MAX + 1, format!("{lines} lines, at most {LINES_MAX} are allowed"))]
}

/// Roots of crates that do not say what the crate is for.
pub(crate) fn opening(source: &Source) -> Vec<Finding> {
    let is_root = ["/src/lib.rs", "/src/main.rs"].iter().any(|root| source.path.ends_with(root));
    let opens = source.text.first().is_some_and(|line| line.starts_with("//! ") && words(line).count() > 2);
    if !is_root || opens {
        Vec::new()
    } else {
        vec![source.finding(1, "it must open with //! and the crate's purpose")]
    }
}

/// Unfinished code, and prints in libraries.
pub(crate) fn left_over(source: &Source) -> Vec<Finding> {
    // This file has to name what it forbids.
    if source.path.ends_with("tests/tidy/words.rs") {
        return Vec::new();
    }
    let marks = source.text.iter().enumerate().flat_map(|(index, line)| {
        let found = words(line).filter(|word| MARKS.contains(word));
        found.map(|word| source.finding(index + 1, word)).collect::<Vec<_>>()
    });
    let all = source.bare.iter().enumerate().map(|(index, line)| (index + 1, line.as_str()));
    let unfinished = find(source, all, UNFINISHED);
    let library = !PROGRAMS.contains(&source.krate());
    let printing = if library { find(source, source.real(&source.bare), PRINTING) } else { Vec::new() };
    marks.chain(unfinished).chain(printing).collect()
}

fn find<'a>(source: &Source, lines: impl Iterator<Item = (usize, &'a str)>, macros: &[&str]) -> Vec<Finding> {
    let has = |line: &str, name: &str| {
        let continues = |before: &str| before.ends_with(|c: char| c.is_alphanumeric() || c == '_');
        line.match_indices(name).any(|(at, _)| !continues(&line[..at]))
    };
    let found = lines.flat_map(|(line, code)| {
        let found = macros.iter().filter(|name| has(code, name));
        found.map(|name| source.finding(line, name)).collect::<Vec<_>>()
    });
    found.collect()
}

/// Panics in place of errors.
pub(crate) fn unwrapped(source: &Source) -> Vec<Finding> {
    let unwrapped = source.real(&source.bare).filter(|(_, line)| line.contains(".unwrap()"));
    unwrapped.map(|(line, _)| source.finding(line, "unwrap() outside of a test")).collect()
}

/// Modules named after nothing.
pub(crate) fn module_name(source: &Source) -> Vec<Finding> {
    let mut parts = source.path.trim_end_matches(".rs").split('/').skip(1);
    let empty = parts.find(|part| EMPTY_NAMES.contains(part));
    empty.map(|name| source.finding(1, format!("`{name}` does not say what is in it"))).into_iter().collect()
}

#[cfg(test)]
fn source(path: &str, text: &str) -> Source {
    Source::new(path, text)
}

#[test]
fn long_files_are_found() {
    assert!(length(&source("crates/x/src/a.rs", &"a\n".repeat(600))).is_empty());
    assert_eq!(length(&source("crates/x/src/a.rs", &"a\n".repeat(601))).len(), 1);
}

#[test]
fn crates_without_purpose_are_found() {
    assert!(opening(&source("crates/x/src/lib.rs", "//! What it is for.\n")).is_empty());
    assert_eq!(opening(&source("crates/x/src/lib.rs", "//! x\n")).len(), 1);
    assert_eq!(opening(&source("crates/x/src/main.rs", "fn main() {}")).len(), 1);
    assert!(opening(&source("crates/x/src/a.rs", "fn a() {}")).is_empty());
}

#[test]
fn unfinished_code_is_found() {
    let text = "// TODO later\nlet a = \"println!\";\nprintln!();\ndbg!(a);\nmy_println!();\n#[cfg(test)]\nmod t {\n println!();\n}";
    let lines = |path: &str| left_over(&source(path, text));
    assert_eq!(
        lines("crates/blk/src/a.rs"),
        ["crates/blk/src/a.rs:1: TODO", "crates/blk/src/a.rs:4: dbg!", "crates/blk/src/a.rs:3: println!"]
    );
    assert_eq!(lines("crates/exitless/src/a.rs").len(), 2);
}

#[test]
fn unwraps_and_empty_names_are_found() {
    let text = "a.unwrap();\nb.unwrap_or(1);\n// c.unwrap()\n#[cfg(test)]\nmod t { d.unwrap(); }";
    assert_eq!(
        unwrapped(&source("crates/x/src/a.rs", text)),
        ["crates/x/src/a.rs:1: unwrap() outside of a test"]
    );
    assert_eq!(module_name(&source("crates/x/src/utils.rs", "")).len(), 1);
    assert_eq!(module_name(&source("crates/x/src/common/a.rs", "")).len(), 1);
    assert!(module_name(&source("crates/x/src/a.rs", "")).is_empty());
}

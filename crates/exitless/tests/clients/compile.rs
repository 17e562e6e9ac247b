//! Programs and libraries that tests compile from sources beside them, kept between runs.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::PathBuf;
use std::process::Command;

use crate::{needs, probe};

/// The guests' own checker, linked statically so that it needs nothing else there.
pub(crate) fn ledger() -> Result<PathBuf, String> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let flags = ["--edition", "2024", "-O", "-C", "target-feature=+crt-static", "-C", "strip=symbols"];
    compile("ledger", "rs", include_str!("guest/ledger.rs"), Command::new(rustc).args(flags))
}

/// A C program.
pub(crate) fn c_program(name: &str, source: &str) -> Result<PathBuf, String> {
    c(name, source, &["-O2"])
}

/// A C library for `LD_PRELOAD`.
pub(crate) fn c_library(name: &str, source: &str) -> Result<PathBuf, String> {
    c(name, source, &["-O2", "-shared", "-fPIC"])
}

fn c(name: &str, source: &str, flags: &[&str]) -> Result<PathBuf, String> {
    let compiler = ["cc", "gcc", "clang"].iter().find_map(|name| needs::program(name));
    let compiler = compiler.ok_or_else(|| format!("no C compiler installed, which {name} needs"))?;
    compile(name, "c", source, Command::new(compiler).args(flags))
}

/// What `compiler` makes of `source`, under a name that depends on the source.
fn compile(name: &str, ending: &str, source: &str, compiler: &mut Command) -> Result<PathBuf, String> {
    let mut hash = DefaultHasher::new();
    source.hash(&mut hash);
    let binary = needs::cache_dir().join(format!("{name}-{:016x}", hash.finish()));
    if !binary.exists() {
        remove_older(name);
        let (file, fresh) = (binary.with_extension(ending), binary.with_extension("new"));
        fs::write(&file, source).expect("write a source");
        probe::succeeds(compiler.arg("-o").arg(&fresh).arg(&file))
            .map_err(|reason| format!("cannot compile {name}: {reason}"))?;
        fs::rename(&fresh, &binary).expect("put what was compiled in place");
    }
    Ok(binary)
}

/// Removes what was kept under `name` and another hash.
pub(crate) fn remove_older(name: &str) {
    for entry in fs::read_dir(needs::cache_dir()).expect("list the cache").flatten() {
        let file = entry.file_name();
        let hash =
            file.to_str().and_then(|file| file.strip_prefix(name)?.strip_prefix('-')?.split('.').next());
        if hash.is_some_and(|hash| hash.len() == 16 && hash.bytes().all(|digit| digit.is_ascii_hexdigit())) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

//! Builds the embedded guest, a bare-metal program, for `src/guest.rs` to embed.
//!
//! It needs nothing that is not there: the same toolchain, the target of this machine, crates that this build has
//! fetched already. It has a target directory of its own, since this build holds the lock of the other one.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// What a change of makes another image.
const SOURCES: &[&str] =
    &["crates/guest", "crates/virtio/src", "crates/virtio/Cargo.toml", "Cargo.lock", "Cargo.toml"];
/// What this build's cargo has set for this build, and would be wrong for the other.
const NOT_INHERITED: &[&str] = &[
    "CARGO_BUILD_",
    "CARGO_CFG_",
    "CARGO_FEATURE_",
    "CARGO_PROFILE_",
    "CARGO_TARGET_",
    "CARGO_UNSTABLE_",
    "CLIPPY_",
];
const FALLBACK_TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() -> Result<(), Box<dyn Error>> {
    // Not `env!`: clones that share a target directory share this program too, but not their sources.
    let package = folder("CARGO_MANIFEST_DIR")?;
    let root = package.join("../..");
    let root = root.canonicalize().map_err(|error| format!("no workspace at {}: {error}", root.display()))?;
    for source in SOURCES {
        println!("cargo:rerun-if-changed=../../{source}");
    }
    let out = folder("OUT_DIR")?;
    let host = env::var("HOST").unwrap_or_default();
    let target = if host.starts_with("x86_64-unknown-linux-") { &host } else { FALLBACK_TARGET };

    let target_dir = out.join("guest");
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(&root).args(["build", "--quiet", "--locked", "--offline"]);
    cargo.args(["--package", "exitless-guest", "--bin", "guest-image", "--features", "image"]);
    cargo.args(["--profile", "guest", "--target", target]).arg("--target-dir").arg(&target_dir);
    for (name, _) in env::vars_os() {
        let inherited = !NOT_INHERITED.iter().any(|prefix| name.to_string_lossy().starts_with(prefix));
        if !inherited {
            cargo.env_remove(name);
        }
    }
    cargo.env_remove("RUSTC_WORKSPACE_WRAPPER").env_remove("RUSTFLAGS");
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags(&root).join("\x1f"));
    let status = cargo.status().map_err(|error| format!("cannot start {cargo:?}: {error}"))?;
    if !status.success() {
        return Err(format!("the embedded guest does not build: {cargo:?}: {status}").into());
    }
    let (built, embedded) = (target_dir.join(target).join("guest/guest-image"), out.join("guest.elf"));
    fs::copy(&built, &embedded)
        .map_err(|error| format!("cannot copy {} to {}: {error}", built.display(), embedded.display()))?;
    Ok(())
}

/// A folder that cargo names to this program when it runs it.
fn folder(variable: &str) -> Result<PathBuf, String> {
    env::var_os(variable)
        .map(PathBuf::from)
        .ok_or_else(|| format!("no {variable}: this is a build script of cargo"))
}

/// Linked where the linker script says, without anything of an operating system's.
fn flags(root: &Path) -> Vec<String> {
    let script = root.join("crates/guest/src/image/layout.ld");
    let mut flags = vec!["-Crelocation-model=static".to_owned()];
    let arguments = ["-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-z,noexecstack"];
    flags.extend(arguments.map(|argument| format!("-Clink-arg={argument}")));
    flags.push(format!("-Clink-arg=-Wl,-T,{}", script.display()));
    flags
}

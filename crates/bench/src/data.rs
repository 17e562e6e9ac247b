//! The cases and peers that come with the program, or those of a folder given instead.

use std::path::Path;

use anyhow::{Context, Result, ensure};

macro_rules! embed {
    ($folder:literal: $($name:literal),+ $(,)?) => {
        &[$(($name, include_str!(concat!("../../../bench/", $folder, "/", $name)))),+]
    };
}

const CASES: &[(&str, &str)] =
    embed!("cases": "null.toml", "memory.toml", "tmpfs.toml", "disk.toml", "idle.toml");
const PEERS: &[(&str, &str)] = embed!("peers": "bare.toml", "exitless.toml", "exitless-notify.toml", "qemu-storage-daemon.toml", "spdk.toml", "fio.toml");

/// Case files as name and text.
pub(crate) fn cases(folder: Option<&Path>) -> Result<Vec<(String, String)>> {
    read(folder, CASES)
}

/// Peer files as name and text.
pub(crate) fn peers(folder: Option<&Path>) -> Result<Vec<(String, String)>> {
    read(folder, PEERS)
}

fn read(folder: Option<&Path>, embedded: &[(&str, &str)]) -> Result<Vec<(String, String)>> {
    let Some(folder) = folder else {
        return Ok(embedded.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect());
    };
    let entries = std::fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("cannot list {}", folder.display()))?.path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            paths.push(path);
        }
    }
    ensure!(!paths.is_empty(), "{} holds no .toml file", folder.display());
    paths.sort();
    paths
        .into_iter()
        .map(|path| {
            let text = std::fs::read_to_string(&path);
            let text = text.with_context(|| format!("cannot read {}", path.display()))?;
            Ok((path.display().to_string(), text))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_in_the_folders_is_embedded() {
        let package = std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo says where the package is");
        let root = Path::new(&package).join("../../bench");
        for (folder, embedded) in [("cases", CASES), ("peers", PEERS)] {
            let found = read(Some(&root.join(folder)), &[]).unwrap();
            assert_eq!(found.len(), embedded.len(), "list every file of bench/{folder} in {}", file!());
        }
    }

    #[test]
    fn a_folder_without_files_is_an_error() {
        let empty = tempfile::tempdir().unwrap();
        assert!(cases(Some(empty.path())).unwrap_err().to_string().contains("holds no .toml file"));
        assert!(cases(Some(&empty.path().join("none"))).is_err());
    }
}

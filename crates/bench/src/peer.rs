//! Peers: who is measured. They are data (`bench/peers/*.toml`); this module reads them and finds out which of them
//! are installed.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::backend::{BackendKind, Target};
use crate::pattern;

/// How long a server may take until its socket accepts, unless its file says otherwise.
const READY_MS_MAX_DEFAULT: u64 = 10_000;

/// What kind of thing a peer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum PeerKind {
    /// A process that serves a vhost-user socket, driven by the load generator.
    VhostUser,
    /// A thread of this process that answers the rings without a device: the ceiling of the method.
    Bare,
    /// `fio` on the same file, without virtio: what the storage itself does.
    Fio,
}

/// Guest memory that a server can work with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum GuestPages {
    /// An ordinary memfd.
    #[default]
    Plain,
    /// A memfd of 2 MiB huge pages, which the administrator has to set aside.
    Huge,
}

/// One server, as its file describes it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Peer {
    pub(crate) name: String,
    pub(crate) kind: PeerKind,
    /// The program and its arguments, with placeholders.
    #[serde(default)]
    command: Vec<String>,
    /// Prints the version. If it cannot be run, the peer counts as not installed.
    #[serde(default)]
    version: Vec<String>,
    /// What `{backend}` stands for, by backend; a backend that is missing here is one the peer does not have.
    #[serde(default)]
    backends: BTreeMap<BackendKind, OneOrMany>,
    /// Files to write into the run's own folder `{dir}` first, by name.
    #[serde(default)]
    files: BTreeMap<String, String>,
    /// Patterns of the only cases it is meant for; none means all.
    #[serde(default)]
    cases: Vec<String>,
    /// The largest ring it takes, in descriptors.
    #[serde(default)]
    pub(crate) ring_max: Option<u16>,
    #[serde(default)]
    pub(crate) guest_memory: GuestPages,
    #[serde(default)]
    pub(crate) ready_ms_max: Option<u64>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// What the placeholders of a command stand for.
#[derive(Clone, Debug)]
pub(crate) struct Fill<'a> {
    /// A folder for this start of the server only.
    pub(crate) dir: &'a Path,
    pub(crate) target: &'a Target,
    pub(crate) queues: u16,
    pub(crate) cpu: u32,
    /// More placeholders, by name with braces.
    pub(crate) more: Vec<(&'static str, String)>,
}

impl Fill<'_> {
    /// Where the server is to listen.
    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.join("blk.sock")
    }

    fn apply(&self, text: &str) -> String {
        let path = self.target.path.as_deref().unwrap_or(Path::new("")).display().to_string();
        let mut text = text
            .replace("{socket}", &self.socket().display().to_string())
            .replace("{dir}", &self.dir.display().to_string())
            .replace("{path}", &path)
            .replace("{size}", &self.target.bytes.to_string())
            .replace("{size_mib}", &(self.target.bytes >> 20).to_string())
            .replace("{queues}", &self.queues.to_string())
            .replace("{cpu}", &self.cpu.to_string())
            .replace("{cpu_mask}", &format!("{:#x}", 1_u128.checked_shl(self.cpu).unwrap_or(0)));
        for (name, value) in &self.more {
            text = text.replace(name, value);
        }
        text
    }
}

/// A peer that can be run here.
#[derive(Clone, Debug)]
pub(crate) struct Installed {
    pub(crate) peer: Peer,
    /// The first line that its version command printed.
    pub(crate) version: String,
}

impl Peer {
    pub(crate) fn ready_ms_max(&self) -> u64 {
        self.ready_ms_max.unwrap_or(READY_MS_MAX_DEFAULT)
    }

    /// Whether `case` is one it is meant for.
    pub(crate) fn wants(&self, case: &str) -> bool {
        self.cases.is_empty() || self.cases.iter().any(|only| pattern::matches(only, case))
    }

    pub(crate) fn has_backend(&self, kind: BackendKind) -> bool {
        self.backends.contains_key(&kind)
    }

    /// The command for one start.
    pub(crate) fn command(&self, fill: &Fill<'_>) -> Vec<String> {
        let backend: &[String] = match self.backends.get(&fill.target.kind) {
            None => &[],
            Some(OneOrMany::One(one)) => std::slice::from_ref(one),
            Some(OneOrMany::Many(many)) => many,
        };
        let mut command = Vec::new();
        for word in &self.command {
            match word.as_str() {
                "{backend}" => command.extend(backend.iter().map(|word| fill.apply(word))),
                word => {
                    command.push(own_program(&fill.apply(&word.replace("{backend}", &backend.join(" ")))))
                }
            }
        }
        command
    }

    /// Writes the files that the command needs.
    pub(crate) fn write_files(&self, fill: &Fill<'_>) -> Result<()> {
        let backend = match self.backends.get(&fill.target.kind) {
            Some(OneOrMany::One(one)) => one.as_str(),
            _ => "",
        };
        for (name, text) in &self.files {
            let path = fill.dir.join(name);
            let text = fill.apply(&text.replace("{backend}", backend));
            std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }

    /// The peer with its version; the inner error says why it cannot be run here.
    pub(crate) fn detect(&self) -> Result<Installed, String> {
        let installed = |version: String| Installed { peer: self.clone(), version };
        let Some((program, arguments)) = self.version.split_first() else {
            return Ok(installed(String::new()));
        };
        let program = own_program(program);
        let output = Command::new(&program).args(arguments).stdin(Stdio::null()).output();
        let output = output.map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => format!("{program} is not installed"),
            _ => format!("cannot run {program}: {error}"),
        })?;
        if !output.status.success() {
            return Err(format!("{} failed with {}", self.version.join(" "), output.status));
        }
        let text = if output.stdout.is_empty() { output.stderr } else { output.stdout };
        let text = String::from_utf8_lossy(&text);
        Ok(installed(text.lines().next().unwrap_or_default().trim().to_owned()))
    }
}

/// `{exitless}` is the program that is running or, for the benchmarks' own program, the one beside it.
pub(crate) fn own_program(word: &str) -> String {
    if !word.contains("{exitless}") {
        return word.to_owned();
    }
    let running = std::env::current_exe().unwrap_or_else(|_| "exitless".into());
    let alone = running.file_name().is_some_and(|name| name == "exitless-bench");
    let program = if alone { running.with_file_name("exitless") } else { running };
    word.replace("{exitless}", &program.display().to_string())
}

/// Reads peer files, given as name and text.
pub(crate) fn parse(files: &[(String, String)]) -> Result<Vec<Peer>> {
    let mut peers = Vec::new();
    for (file, text) in files {
        let peer: Peer = toml::from_str(text).with_context(|| format!("cannot read a peer from {file}"))?;
        ensure!(
            (peer.kind == PeerKind::Bare) == peer.command.is_empty(),
            "{file}: every kind of peer but `bare` needs a `command`"
        );
        peers.push(peer);
    }
    let mut names = HashSet::new();
    if let Some(twice) = peers.iter().find(|peer| !names.insert(&peer.name)) {
        bail!("two peers are called `{}`", twice.name);
    }
    Ok(peers)
}

#[cfg(test)]
mod tests;

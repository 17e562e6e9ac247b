//! The rows of the ablation. They are data (`bench/vbmq/rows.toml`); this module reads them.

use std::collections::{BTreeMap, HashSet};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::backend::BackendKind;
use crate::peer::Peer;

const ROWS: &str = include_str!("../../../../bench/vbmq/rows.toml");

/// The row that ratios are taken to.
pub(crate) const BASELINE: &str = "a";
/// The row without a virtual machine.
pub(crate) const BARE_METAL: &str = "bare-metal";

/// What runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum RowKind {
    /// The monitor of this program.
    Monitor,
    /// Nothing: the load generator drives the server itself.
    BareMetal,
    /// QEMU.
    Qemu,
}

/// How many I/O threads there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Threads {
    /// One for all queues.
    #[default]
    One,
    /// One for each queue.
    PerQueue,
}

/// Where threads are pinned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Placement {
    /// Nowhere.
    #[default]
    None,
    /// I/O threads and vCPUs on CPUs of their own.
    Apart,
    /// The same, each I/O thread near the vCPU whose queue it serves.
    Near,
}

/// How the guest learns of completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Completion {
    /// It looks at the ring all the time.
    Polled,
    /// It halts until an interrupt.
    Interrupt,
}

impl Completion {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Polled => "polled",
            Self::Interrupt => "interrupt",
        }
    }
}

/// One row.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Row {
    pub(crate) name: String,
    /// A few words for tables.
    pub(crate) title: String,
    /// What it changes against the row above, or what it is.
    pub(crate) change: String,
    pub(crate) kind: RowKind,
    /// One queue, whatever the number of vCPUs; one vCPU drives it, with all the requests in flight.
    #[serde(default)]
    pub(crate) one_queue: bool,
    #[serde(default)]
    pub(crate) threads: Threads,
    #[serde(default)]
    pub(crate) placement: Placement,
    pub(crate) completion: Completion,
    /// A property that QEMU's virtio-blk-pci must have.
    #[serde(default)]
    pub(crate) property: Option<String>,
    /// Arguments behind those of its kind.
    #[serde(default)]
    pub(crate) args: Vec<String>,
    /// What `{backend}` stands for, if not what it does for all; a backend that is missing is one it does not have.
    #[serde(default)]
    backends: Option<BTreeMap<BackendKind, String>>,
    /// The vhost-user server that is started first.
    #[serde(default)]
    pub(crate) server: Option<Peer>,
}

/// All of it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Rows {
    /// The command that runs the guest in this program's monitor.
    pub(crate) monitor: Vec<String>,
    /// The command that runs it in QEMU.
    pub(crate) qemu: Vec<String>,
    backends: BTreeMap<BackendKind, String>,
    #[serde(rename = "row")]
    pub(crate) all: Vec<Row>,
}

impl Rows {
    /// The rows that come with the program.
    pub(crate) fn embedded() -> Result<Self> {
        Self::parse(ROWS).context("cannot read bench/vbmq/rows.toml")
    }

    pub(crate) fn parse(text: &str) -> Result<Self> {
        let rows: Self = toml::from_str(text)?;
        let mut names = HashSet::new();
        for row in &rows.all {
            ensure!(names.insert(&row.name), "two rows are called `{}`", row.name);
            ensure!(
                row.kind != RowKind::BareMetal || row.server.is_some(),
                "row `{}` has no guest and no server",
                row.name
            );
        }
        ensure!(names.contains(&BASELINE.to_owned()), "there is no row `{BASELINE}` to compare with");
        Ok(rows)
    }

    /// What `{backend}` stands for in `row`; None if it has no such backend.
    pub(crate) fn backend<'a>(&'a self, row: &'a Row, kind: BackendKind) -> Option<&'a str> {
        if let Some(server) = &row.server {
            return server.has_backend(kind).then_some("");
        }
        row.backends.as_ref().unwrap_or(&self.backends).get(&kind).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rows_of_the_program_are_the_ablation_and_its_peers() {
        let rows = Rows::embedded().unwrap();
        let names: Vec<_> = rows.all.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(&names[..9], ["a", "b", "c", "d", "e", "f", "g", "h", BARE_METAL]);
        assert!(names[9..].iter().all(|name| name.starts_with("qemu-")), "{names:?}");
        assert!(rows.all.iter().all(|row| !row.title.is_empty() && !row.change.is_empty()));
        assert!(rows.all[0].one_queue && rows.all[0].completion == Completion::Interrupt);
        assert_eq!(rows.all[7].completion, Completion::Polled);
    }

    #[test]
    fn a_row_has_the_backends_it_names_or_all() {
        let rows = Rows::embedded().unwrap();
        let row = |name: &str| rows.all.iter().find(|row| row.name == name).unwrap();
        assert_eq!(rows.backend(row("a"), BackendKind::Memory), Some("mem:{size}"));
        assert_eq!(rows.backend(row("qemu-iothread"), BackendKind::Memory), None);
        assert!(rows.backend(row("qemu-vhost-user-exitless"), BackendKind::Memory).is_some());
        assert!(rows.backend(row("qemu-vhost-user-qsd"), BackendKind::Memory).is_none());
    }

    #[test]
    fn wrong_rows_are_refused() {
        let head = "monitor = []\nqemu = []\n[backends]\n";
        let row = |name: &str, kind: &str| {
            format!(
                "[[row]]\nname = \"{name}\"\ntitle = \"t\"\nchange = \"c\"\nkind = \"{kind}\"\ncompletion = \"polled\"\n"
            )
        };
        let parse = |rows: &[String]| Rows::parse(&(head.to_owned() + &rows.concat()));
        assert!(parse(&[row("a", "monitor")]).is_ok());
        assert!(parse(&[row("b", "monitor")]).unwrap_err().to_string().contains("no row `a`"));
        assert!(
            parse(&[row("a", "monitor"), row("a", "qemu")]).unwrap_err().to_string().contains("two rows")
        );
        assert!(parse(&[row("a", "bare-metal")]).unwrap_err().to_string().contains("no server"));
        assert!(parse(&[row("a", "tape")]).is_err());
    }
}

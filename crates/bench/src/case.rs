//! Cases: what is asked of every server. They are data (`bench/cases/*.toml`); this module reads them.
//!
//! A `[[case]]` names lists of values; it stands for one case for each combination, whose name is the template with
//! `{depth}`, `{queues}`, `{ring}`, `{client}`, `{inflight}` and `{op}` filled in.

use std::collections::HashSet;
use std::fmt;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use virtio::RingFormat;

use crate::backend::BackendKind;
use crate::pattern;

/// The largest `depth`: a ring of 1024 holds that many three-descriptor chains.
const DEPTH_MAX: u16 = 256;
const QUEUES_MAX: u16 = 16;

/// What the requests of a case do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Op {
    RandRead,
    RandWrite,
    Read,
    Write,
    /// None after a short load: the cost of a server that has nothing to do.
    Idle,
}

impl Op {
    pub(crate) fn writes(self) -> bool {
        matches!(self, Self::RandWrite | Self::Write)
    }

    pub(crate) fn random(self) -> bool {
        !matches!(self, Self::Read | Self::Write)
    }

    /// The name, which is fio's too.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::RandRead => "randread",
            Self::RandWrite => "randwrite",
            Self::Read => "read",
            Self::Write => "write",
            Self::Idle => "idle",
        }
    }
}

/// How the client learns of completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Client {
    /// It looks at the ring all the time and asks for no calls.
    Polled,
    /// It asks for calls and sleeps on the call eventfd whenever it finds nothing.
    Event,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Ring {
    Split,
    Packed,
}

impl Ring {
    pub(crate) fn format(self) -> RingFormat {
        match self {
            Self::Split => RingFormat::Split,
            Self::Packed => RingFormat::Packed,
        }
    }
}

/// One thing to measure.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Case {
    pub(crate) name: String,
    /// Cases with the same group stand together in reports.
    pub(crate) group: String,
    pub(crate) backend: BackendKind,
    pub(crate) op: Op,
    pub(crate) block_bytes: u32,
    /// Requests in flight in each queue.
    pub(crate) depth: u16,
    pub(crate) queues: u16,
    pub(crate) ring: Ring,
    pub(crate) client: Client,
    pub(crate) inflight: bool,
    /// Each chain in an indirect table, as Linux makes them; otherwise three descriptors in the ring.
    pub(crate) indirect: bool,
    /// Rest between a completion and the next request, in ms.
    pub(crate) pause_ms: u32,
    /// The client runs on the server's CPU.
    pub(crate) shared_cpu: bool,
    /// Part of `--quick`.
    pub(crate) quick: bool,
}

impl Case {
    /// Descriptors in the ring: as few as hold the requests in flight, at least 256.
    pub(crate) fn ring_size(&self) -> u16 {
        let per_request = if self.indirect { 1 } else { 3 };
        (self.depth * per_request).next_power_of_two().max(256)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CaseFile {
    #[serde(default)]
    case: Vec<Spec>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Spec {
    name: String,
    group: String,
    backend: BackendKind,
    op: OneOrMany<Op>,
    #[serde(default = "default_block")]
    block: String,
    #[serde(default = "default_depth")]
    depth: OneOrMany<u16>,
    #[serde(default = "one_queue")]
    queues: OneOrMany<u16>,
    #[serde(default = "split")]
    ring: OneOrMany<Ring>,
    #[serde(default = "polled")]
    client: OneOrMany<Client>,
    #[serde(default = "no")]
    inflight: OneOrMany<bool>,
    #[serde(default)]
    indirect: bool,
    #[serde(default)]
    pause_ms: u32,
    #[serde(default)]
    shared_cpu: bool,
    /// Patterns of the names that `--quick` runs.
    #[serde(default)]
    quick: Vec<String>,
}

#[derive(Clone, Deserialize)]
#[serde(untagged)]
enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    fn as_slice(&self) -> &[T] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }
}

fn default_block() -> String {
    "4KiB".into()
}
fn default_depth() -> OneOrMany<u16> {
    OneOrMany::One(32)
}
fn one_queue() -> OneOrMany<u16> {
    OneOrMany::One(1)
}
fn split() -> OneOrMany<Ring> {
    OneOrMany::One(Ring::Split)
}
fn polled() -> OneOrMany<Client> {
    OneOrMany::One(Client::Polled)
}
fn no() -> OneOrMany<bool> {
    OneOrMany::One(false)
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// Reads case files, given as name and text, into cases in the order written.
pub(crate) fn parse(files: &[(String, String)]) -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for (file, text) in files {
        let parsed: CaseFile =
            toml::from_str(text).with_context(|| format!("cannot read cases from {file}"))?;
        for spec in &parsed.case {
            expand(spec, &mut cases).with_context(|| format!("{file}: case `{}`", spec.name))?;
        }
    }
    let mut names = HashSet::new();
    if let Some(twice) = cases.iter().find(|case| !names.insert(&case.name)) {
        bail!("two cases are called `{}`; put what differs into the name", twice.name);
    }
    Ok(cases)
}

fn expand(spec: &Spec, cases: &mut Vec<Case>) -> Result<()> {
    let block_bytes = parse_bytes(&spec.block)?;
    let block_bytes = u32::try_from(block_bytes).context("`block` is too large")?;
    ensure!(
        block_bytes.is_power_of_two() && block_bytes >= 512,
        "`block` must be a power of two of at least 512"
    );
    for &op in spec.op.as_slice() {
        for &ring in spec.ring.as_slice() {
            for &client in spec.client.as_slice() {
                for &inflight in spec.inflight.as_slice() {
                    for &queues in spec.queues.as_slice() {
                        for &depth in spec.depth.as_slice() {
                            let mut case = Case {
                                name: String::new(),
                                group: spec.group.clone(),
                                backend: spec.backend,
                                op,
                                block_bytes,
                                depth,
                                queues,
                                ring,
                                client,
                                inflight,
                                indirect: spec.indirect,
                                pause_ms: spec.pause_ms,
                                shared_cpu: spec.shared_cpu,
                                quick: false,
                            };
                            name(spec, &mut case)?;
                            cases.push(case);
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

fn name(spec: &Spec, case: &mut Case) -> Result<()> {
    ensure!((1..=DEPTH_MAX).contains(&case.depth), "`depth` {} is not in 1..={DEPTH_MAX}", case.depth);
    ensure!((1..=QUEUES_MAX).contains(&case.queues), "`queues` {} is not in 1..={QUEUES_MAX}", case.queues);
    let ring = if case.ring == Ring::Split { "split" } else { "packed" };
    let client = if case.client == Client::Polled { "polled" } else { "event" };
    case.name = spec
        .name
        .replace("{op}", case.op.name())
        .replace("{depth}", &case.depth.to_string())
        .replace("{queues}", &case.queues.to_string())
        .replace("{ring}", ring)
        .replace("{client}", client)
        .replace("{inflight}", if case.inflight { "tracked" } else { "untracked" });
    case.quick = spec.quick.iter().any(|pattern| pattern::matches(pattern, &case.name));
    Ok(())
}

/// Reads a size: a number of bytes, or of `KiB`, `MiB` or `GiB`.
pub(crate) fn parse_bytes(text: &str) -> Result<u64> {
    let (digits, shift) = [("KiB", 10), ("MiB", 20), ("GiB", 30)]
        .iter()
        .find_map(|(unit, shift)| text.strip_suffix(unit).map(|digits| (digits, *shift)))
        .unwrap_or((text, 0));
    let number: u64 =
        digits.trim().parse().ok().with_context(|| format!("`{text}` is not a size like 4KiB"))?;
    number.checked_mul(1 << shift).with_context(|| format!("`{text}` is too large"))
}

#[cfg(test)]
mod tests;

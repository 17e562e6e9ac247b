//! The command line of `exitless bench`.

use std::path::PathBuf;

use clap::Subcommand;

/// Measure this program and other servers side by side.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    pub(crate) what: What,
}

#[derive(Debug, Subcommand)]
pub(crate) enum What {
    /// Disks: drive vhost-user-blk servers with one load generator.
    Blk(BlkArgs),
    /// Virtual machines: what polling, threads, placement and mapped doorbells bring, step by step. Needs /dev/kvm.
    Vbmq(VbmqArgs),
}

/// Options of `exitless bench blk`.
#[derive(Debug, clap::Args)]
pub struct BlkArgs {
    /// Fewer cases and short repetitions: two minutes, no root, no VM, no other package.
    #[arg(long)]
    pub(crate) quick: bool,

    /// Run only cases whose name contains PATTERN, or fits it if it has a `*`; also `peer:PATTERN`.
    #[arg(long, value_name = "PATTERN")]
    pub(crate) only: Vec<String>,

    /// Take the cases from the .toml files of this folder.
    #[arg(long, value_name = "DIR")]
    pub(crate) cases: Option<PathBuf>,

    /// Take the peers from the .toml files of this folder.
    #[arg(long, value_name = "DIR")]
    pub(crate) peers: Option<PathBuf>,

    /// List the cases and the peers, and what is missing for those that cannot be run here.
    #[arg(long)]
    pub(crate) list: bool,

    /// Repetitions of each case and peer, interleaved [default: 5, with --quick 3].
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) repetitions: Option<u32>,

    /// Duration of each repetition in ms [default: 1000, with --quick 400].
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(10..=3_600_000))]
    pub(crate) measure_ms: Option<u64>,

    /// The CPU of the servers [default: the first allowed].
    #[arg(long, value_name = "CPU")]
    pub(crate) server_cpu: Option<u32>,

    /// The CPU of the load generator [default: the next one on another core].
    #[arg(long, value_name = "CPU")]
    pub(crate) client_cpu: Option<u32>,

    /// The folder for the disk file [default: the folder for temporary files].
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,

    /// Print everything as JSON instead of tables.
    #[arg(long, conflicts_with = "markdown")]
    pub(crate) json: bool,

    /// Print one compact Markdown table: a row for each case, a column for each peer.
    #[arg(long)]
    pub(crate) markdown: bool,

    /// Write every repetition to this file, as a line, as soon as it was measured.
    #[arg(long, value_name = "FILE")]
    pub(crate) csv: Option<PathBuf>,

    /// Draw the medians.
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
}

/// Options of `exitless bench vbmq`.
#[derive(Debug, clap::Args)]
pub struct VbmqArgs {
    /// Fewer conditions and short repetitions: two minutes.
    #[arg(long)]
    pub(crate) quick: bool,

    /// Run only rows whose name is ROW, or fits it if it has a `*`.
    #[arg(long, value_name = "ROW")]
    pub(crate) only: Vec<String>,

    /// Backends to measure [default: null, mem, file; with --quick null, mem].
    #[arg(long, value_name = "BACKEND", value_delimiter = ',')]
    pub(crate) backend: Vec<String>,

    /// Requests in flight in each queue [default: 1, 32, 128; with --quick 1, 32].
    #[arg(long, value_name = "COUNT", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) qd: Vec<u16>,

    /// vCPUs, each of which drives a queue [default: 1, 2, and doubled while there are two CPUs for each; with --quick 1].
    #[arg(long, value_name = "COUNT", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) jobs: Vec<u16>,

    /// Repetitions of each row and condition, interleaved [default: 3, with --quick 1].
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) repetitions: Option<u32>,

    /// Duration of each repetition in ms [default: 1000, with --quick 300].
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(10..=3_600_000))]
    pub(crate) measure_ms: Option<u64>,

    /// The folder for the disk file [default: the folder for temporary files].
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,

    /// Print everything as JSON instead of tables.
    #[arg(long)]
    pub(crate) json: bool,

    /// Write every repetition to this file, as a line, as soon as it was measured.
    #[arg(long, value_name = "FILE")]
    pub(crate) csv: Option<PathBuf>,

    /// Draw the medians.
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,

    /// Measure nothing: report what a run wrote to this file by --csv, whole or not.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["csv", "only", "backend", "qd", "jobs", "repetitions", "measure_ms"])]
    pub(crate) from: Option<PathBuf>,
}

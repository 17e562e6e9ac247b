//! Options: the same on the command line and in a configuration file.
//!
//! These structs are the only definition of an option. A flag `--block-size 4096` is the key `block-size = 4096` in
//! a file, which `config` reads by handing its keys to the parsers defined here.

use std::num::{NonZeroU16, NonZeroU64};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use blk::Spec;
use clap::builder::PossibleValuesParser;
use clap::builder::TypedValueParser as _;
use clap::{Args, ValueEnum};
use reactor::{CpuList, Mode};

use crate::feature::{self, Feature};
use crate::metrics::Address;
use crate::size::Size;

/// Options of the whole process.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Service")]
pub struct ServiceOptions {
    /// CPUs to run I/O threads on, one thread each, like `2-5,7` [default: as needed, beginning with those that take the
    /// interrupts of the disks].
    ///
    /// Without it, queues are spread over the CPUs that this process may use, and threads start as they are needed.
    #[arg(long, value_name = "LIST")]
    pub cpus: Option<CpuList>,

    /// Accept commands of `exitless ctl` at this socket.
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,

    /// Serve metrics in Prometheus' format at `unix:PATH` or `IP:PORT`, path /metrics.
    #[arg(long, value_name = "ADDR")]
    pub metrics: Option<Address>,

    /// Log to stderr what is at least this important [default: info].
    #[arg(long, value_name = "LEVEL", ignore_case = true)]
    pub log: Option<LogLevel>,

    /// Report readiness and the end as JSON lines on stdout instead of as text on stderr.
    #[arg(long)]
    pub json: bool,
}

impl ServiceOptions {
    /// These options where they were given, `other` ones elsewhere.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            cpus: self.cpus.or(other.cpus),
            control: self.control.or(other.control),
            metrics: self.metrics.or(other.metrics),
            log: self.log.or(other.log),
            json: self.json || other.json,
        }
    }
}

/// How important a log line must be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs, reason = "the names are tracing's")]
pub enum LogLevel {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

/// Where a front end connects.
#[derive(Args, Clone, Debug)]
pub struct SocketOptions {
    /// The vhost-user socket to create; the virtual machine connects to it.
    ///
    /// One that nobody listens at is replaced.
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,

    /// Permissions of the socket, in octal [default: 600].
    #[arg(long, value_name = "MODE", value_parser = parse_mode)]
    pub socket_mode: Option<u32>,

    /// Group of the socket, by number or name.
    #[arg(long, value_name = "GROUP")]
    pub socket_group: Option<String>,

    /// The device's name in logs and for `exitless ctl` [default: the socket's file name without extension].
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    pub name: Option<String>,

    /// How queues notice requests: `notify` sleeps until kicked, `poll` never sleeps, `hybrid` polls while there is load.
    #[arg(long, value_name = "MODE", value_parser = mode_parser(), default_value_t = Mode::Hybrid)]
    pub poll: Mode,
}

/// The longest name of a device, in bytes.
pub const NAME_BYTES_MAX: usize = 64;

impl SocketOptions {
    /// The device's name, given or made from the socket's.
    #[must_use]
    pub fn name(&self) -> String {
        self.name.clone().unwrap_or_else(|| {
            self.socket
                .file_stem()
                .map_or_else(|| "device".to_owned(), |stem| stem.to_string_lossy().into_owned())
        })
    }
}

/// Options of a disk.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Device")]
pub struct BlkOptions {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub socket: SocketOptions,

    /// What the disk is stored in: `file:PATH` (raw file or block device), `qcow2:PATH`, `mem:SIZE`, `null:SIZE`.
    ///
    /// Options follow after commas; a comma in a path is written twice.
    /// `file`: direct=auto|on|off, engine=auto|uring|inline, lock=on|late|off, fixed-buffers=on|off, sqpoll=MS.
    /// `qcow2`: direct=on|off, backing=on|off, engine, lock. `mem`: huge=on|off.
    ///
    /// lock=on keeps the image for this service, and QEMU and its tools from writing it. lock=late opens one that another service uses, and takes it when its
    /// guest arrives by live migration. lock=off lets anybody write it at any time.
    #[arg(long, value_name = "SPEC", display_order = 1)]
    pub backend: Spec,

    /// Queues the driver may use [default: one per CPU listed in --cpus, else 1].
    ///
    /// Each may have a ring of up to 1024 descriptors, as in QEMU. A front end that wants a larger one gets an error, or
    /// loses its connection if it does not ask for acknowledgements.
    #[arg(long, value_name = "COUNT", value_parser = parse_count::<NonZeroU16>)]
    pub queues: Option<NonZeroU16>,

    /// The driver may not write.
    #[arg(long)]
    pub read_only: bool,

    /// Serial number that the driver sees, at most 20 bytes of ASCII.
    #[arg(long, value_name = "ID")]
    pub serial: Option<String>,

    /// Block size that the driver sees, in bytes [default: the storage's: 512, or 4096 where it takes no less].
    ///
    /// An image that was partitioned with another block size than the guest sees has to be given that one. Both hosts of
    /// a live migration must have the same.
    #[arg(long, value_name = "BYTES", value_parser = block_size_parser())]
    pub block_size: Option<u32>,

    /// The most requests per second.
    #[arg(long, value_name = "COUNT", value_parser = parse_count::<NonZeroU64>)]
    pub iops: Option<NonZeroU64>,

    /// The most bytes per second, like `200M`.
    #[arg(long, value_name = "BYTES")]
    pub bandwidth: Option<Size>,

    /// Features to withhold from the driver, separated by commas.
    #[arg(long, value_name = "FEATURES", value_delimiter = ',', value_parser = feature::parser(feature::OF_BLK))]
    pub without: Vec<Feature>,
}

/// Options of an entropy source.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Device")]
pub struct RngOptions {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub socket: SocketOptions,

    /// The most bytes per second, like `64K`.
    #[arg(long, value_name = "BYTES")]
    pub bandwidth: Option<Size>,

    /// Features to withhold from the driver, separated by commas.
    #[arg(long, value_name = "FEATURES", value_delimiter = ',', value_parser = feature::parser(feature::OF_RINGS))]
    pub without: Vec<Feature>,
}

/// A device of any kind.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub enum DeviceOptions {
    Blk(BlkOptions),
    Rng(RngOptions),
}

impl DeviceOptions {
    /// Where its front end connects.
    #[must_use]
    pub fn socket(&self) -> &SocketOptions {
        match self {
            Self::Blk(options) => &options.socket,
            Self::Rng(options) => &options.socket,
        }
    }

    /// The file that it is stored in, if it is.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Blk(options) => options.backend.path(),
            Self::Rng(_) => None,
        }
    }
}

pub(crate) fn mode_parser() -> impl clap::builder::TypedValueParser<Value = Mode> {
    PossibleValuesParser::new(["notify", "hybrid", "poll"]).try_map(|mode| mode.parse::<Mode>())
}

fn block_size_parser() -> impl clap::builder::TypedValueParser<Value = u32> {
    PossibleValuesParser::new(["512", "4096"]).try_map(|size| size.parse::<u32>())
}

/// A number that is not 0.
pub(crate) fn parse_count<T: FromStr>(text: &str) -> Result<T, &'static str> {
    text.parse().map_err(|_| "it must be a whole number, at least 1 and not too large")
}

/// Permissions in octal, as for chmod(1).
fn parse_mode(text: &str) -> Result<u32, String> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    let mode = u32::from_str_radix(digits, 8).ok().filter(|&mode| mode <= 0o777 && !digits.starts_with('+'));
    mode.ok_or_else(|| "it must be octal permissions, 0 to 777, like 660".to_owned())
}

fn parse_name(text: &str) -> Result<String, String> {
    let plain = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    if plain && (1..=NAME_BYTES_MAX).contains(&text.len()) {
        return Ok(text.to_owned());
    }
    Err(format!("it must be 1 to {NAME_BYTES_MAX} letters, digits, dots, dashes and underscores"))
}

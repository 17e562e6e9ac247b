//! Configuration files: many devices in one process.
//!
//! ```toml
//! cpus = "2-5"
//!
//! [[blk]]
//! socket = "/run/vm1-disk.sock"
//! backend = "file:/srv/vm1.raw"
//! queues = 4
//! without = ["packed", "event-idx"]
//!
//! [[rng]]
//! socket = "/run/vm1-rng.sock"
//! ```
//!
//! Keys are the long options of the command line and nothing here knows any of them: a key and its value are given to
//! the parser of the options in `options`, and what that has against them is reported with the place in the file.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args, Command, FromArgMatches};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::options::{BlkOptions, DeviceOptions, RngOptions, ServiceOptions};

/// What a file says.
#[derive(Clone, Debug)]
pub struct Config {
    /// Keys outside of any device.
    pub service: ServiceOptions,
    /// The devices, in the order of the file.
    pub devices: Vec<DeviceOptions>,
}

/// The largest file that is read.
pub const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// What is wrong with a file, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}:{line}:{column}: {message}", file.display())]
pub struct ConfigError {
    /// The file.
    pub file: PathBuf,
    /// The line, from 1.
    pub line: usize,
    /// The column, in characters, from 1.
    pub column: usize,
    /// The key, what is wrong with it, and what is allowed.
    pub message: String,
}

/// A complaint about the bytes of `span`.
struct Complaint {
    span: Range<usize>,
    message: String,
}

type Result<T, E = Complaint> = std::result::Result<T, E>;

impl Config {
    /// Reads a file's `text`. `file` is for messages only.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn parse(file: &Path, text: &str) -> Result<Self, ConfigError> {
        parse(text).map_err(|complaint| {
            let before = text.get(..complaint.span.start).unwrap_or(text);
            let line_start = before.rfind('\n').map_or(0, |at| at + 1);
            ConfigError {
                file: file.to_owned(),
                line: before.matches('\n').count() + 1,
                column: before[line_start..].chars().count() + 1,
                message: complaint.message,
            }
        })
    }
}

/// A kind of device: the name of its tables, and their reader.
type Kind = (&'static str, fn(&Table<'_>) -> Result<DeviceOptions>);

const KINDS: [Kind; 2] = [
    ("blk", |table| table.read::<BlkOptions>("blk").map(DeviceOptions::Blk)),
    ("rng", |table| table.read::<RngOptions>("rng").map(DeviceOptions::Rng)),
];

fn parse(text: &str) -> Result<Config> {
    let document = DeTable::parse(text).map_err(|error| Complaint {
        span: error.span().unwrap_or(0..0),
        message: error.message().to_owned(),
    })?;
    let mut global = Table { span: 0..0, entries: Vec::new() };
    let mut devices = Vec::new();
    for (key, value) in document.get_ref() {
        match KINDS.iter().find(|(kind, _)| *kind == key.get_ref()) {
            Some((kind, read)) => {
                for table in tables(kind, value)? {
                    devices.push((table.span.clone(), read(&table)?));
                }
            }
            None => global.entries.push((key, value)),
        }
    }
    let service = global.read("")?;
    devices.sort_by_key(|(span, _)| span.start);
    refuse_twins(&devices)?;
    if devices.is_empty() {
        let message = "there is no device; add a table `[[blk]]` or `[[rng]]`".to_owned();
        return Err(Complaint { span: 0..0, message });
    }
    Ok(Config { service, devices: devices.into_iter().map(|(_, device)| device).collect() })
}

/// The tables of one kind: `[[blk]]` any number of times, or `[blk]` once.
fn tables<'a>(kind: &str, value: &'a Spanned<DeValue<'a>>) -> Result<Vec<Table<'a>>> {
    let table = |value: &'a Spanned<DeValue<'a>>| match value.get_ref() {
        DeValue::Table(table) => Ok(Table { span: value.span(), entries: table.iter().collect() }),
        _ => Err(Complaint {
            span: value.span(),
            message: format!("`{kind}` must be a table; begin one with `[[{kind}]]` on a line of its own"),
        }),
    };
    match value.get_ref() {
        DeValue::Array(array) => array.iter().map(table).collect(),
        _ => Ok(vec![table(value)?]),
    }
}

/// Names and sockets belong to one device each.
fn refuse_twins(devices: &[(Range<usize>, DeviceOptions)]) -> Result<()> {
    for (index, (span, device)) in devices.iter().enumerate() {
        let (socket, name) = (&device.socket().socket, device.socket().name());
        let earlier = || devices[..index].iter().map(|(_, other)| other.socket());
        if earlier().any(|other| other.socket == *socket) {
            let message = format!("two devices have the socket `{}`", socket.display());
            return Err(Complaint { span: span.clone(), message });
        }
        if earlier().any(|other| other.name() == name) {
            let message = format!("two devices have the name `{name}`; give one of them a `name` of its own");
            return Err(Complaint { span: span.clone(), message });
        }
    }
    Ok(())
}

/// A key and its value.
type Entry<'a> = (&'a Spanned<Cow<'a, str>>, &'a Spanned<DeValue<'a>>);

/// The keys of a table that are options.
struct Table<'a> {
    span: Range<usize>,
    entries: Vec<Entry<'a>>,
}

impl Table<'_> {
    /// Reads the table as options `T`. `kind` is its name in messages; empty for the top of the file.
    fn read<T: Args + FromArgMatches>(&self, kind: &str) -> Result<T> {
        let command = T::augment_args(Command::new("").no_binary_name(true).disable_help_flag(true));
        // One by one and with nothing required, so that an error is about the key at hand.
        let lenient = command.clone().mut_args(|arg| arg.required(false));
        let mut arguments = Vec::new();
        let mut entries = self.entries.clone();
        entries.sort_by_key(|(key, _)| key.span().start);
        for (key, value) in entries {
            let path =
                if kind.is_empty() { key.get_ref().to_string() } else { format!("{kind}.{}", key.get_ref()) };
            let argument = argument(&command, &path, key, value)?;
            let argument = Vec::from_iter(argument);
            lenient.clone().try_get_matches_from(&argument).map_err(|error| Complaint {
                span: value.span(),
                message: format!("`{path}` = {}: {}", show(value.get_ref()), reason(&error)),
            })?;
            arguments.extend(argument);
        }
        let matches = command.try_get_matches_from(arguments);
        matches.and_then(|matches| T::from_arg_matches(&matches)).map_err(|error| Complaint {
            span: self.span.clone(),
            message: format!("`[[{kind}]]`: {}", reason(&error)),
        })
    }
}

/// A key and its value as the argument they stand for; None for a switch that is off, and for an empty list.
fn argument(
    command: &Command,
    path: &str,
    key: &Spanned<Cow<'_, str>>,
    value: &Spanned<DeValue<'_>>,
) -> Result<Option<String>> {
    let name = key.get_ref();
    let Some(option) = command.get_arguments().find(|option| option.get_long() == Some(name)) else {
        return Err(Complaint { span: key.span(), message: unknown(command, path, name) });
    };
    let wrong = |allowed: &str| Complaint {
        span: value.span(),
        message: format!("`{path}` = {}: it must be {allowed}", show(value.get_ref())),
    };
    if !option.get_action().takes_values() {
        return match value.get_ref() {
            DeValue::Boolean(on) => Ok(on.then(|| format!("--{name}"))),
            _ => Err(wrong("true or false")),
        };
    }
    let text = match (value.get_ref(), option.get_value_delimiter()) {
        // A list of nothing is nothing given.
        (DeValue::Array(items), Some(_)) if items.is_empty() => return Ok(None),
        (DeValue::Array(items), Some(delimiter)) => {
            let items: Option<Vec<_>> = items.iter().map(|item| scalar(item.get_ref())).collect();
            items.map(|items| items.join(&delimiter.to_string()))
        }
        (value, _) => scalar(value),
    };
    match text {
        Some(text) => Ok(Some(format!("--{name}={text}"))),
        None if option.get_value_delimiter().is_some() => Err(wrong("a string or a list of strings")),
        None => Err(wrong("a string or a whole number")),
    }
}

fn scalar(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) => Some(number.to_string()),
        _ => None,
    }
}

/// A value as the file may have it, in short.
fn show(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => format!("{text:?}"),
        DeValue::Integer(number) => number.to_string(),
        DeValue::Float(number) => number.to_string(),
        DeValue::Boolean(on) => on.to_string(),
        DeValue::Datetime(time) => time.to_string(),
        DeValue::Array(items) => {
            let items: Vec<_> = items.iter().map(|item| show(item.get_ref())).collect();
            format!("[{}]", items.join(", "))
        }
        DeValue::Table(_) => "{…}".to_owned(),
    }
}

/// Complains about a key that is no option: with the one that was probably meant, or else with all there are.
fn unknown(command: &Command, path: &str, name: &str) -> String {
    let meant = command.clone().try_get_matches_from([format!("--{name}=")]).err().and_then(|error| {
        let suggested = error.get(ContextKind::SuggestedArg)?.to_string();
        Some(suggested.trim_start_matches('-').to_owned())
    });
    if let Some(meant) = meant {
        return format!("unknown key `{path}`; did you mean `{meant}`?");
    }
    let keys = command.get_arguments().filter_map(|option| option.get_long());
    let mut allowed: Vec<_> = keys.collect();
    if !path.contains('.') {
        allowed.extend(KINDS.map(|(kind, _)| kind));
    }
    format!("unknown key `{path}`; allowed are {}", Listed(&allowed))
}

/// What the options' parser has against its input, in one line.
fn reason(error: &clap::Error) -> String {
    let listed = |kind| match error.get(kind) {
        Some(ContextValue::Strings(names)) if !names.is_empty() => Some(Listed(names).to_string()),
        Some(ContextValue::String(name)) => Some(Listed(&[name]).to_string()),
        _ => None,
    };
    match error.kind() {
        ErrorKind::InvalidValue => match listed(ContextKind::ValidValue) {
            Some(allowed) => format!("allowed are {allowed}"),
            None => "it must not be empty".to_owned(),
        },
        ErrorKind::MissingRequiredArgument => {
            let missing = listed(ContextKind::InvalidArg).unwrap_or_default();
            format!("it needs {missing}")
        }
        _ => match std::error::Error::source(error) {
            Some(source) => source.to_string(),
            None => {
                error.to_string().lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned()
            }
        },
    }
}

/// Names as prose has them. Of an option's usage, like `--socket <PATH>`, its name is left.
struct Listed<'a, T>(&'a [T]);

impl<T: AsRef<str>> fmt::Display for Listed<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, name) in self.0.iter().enumerate() {
            let name = name.as_ref().trim_start_matches('-');
            let name = name.split_once(" <").map_or(name, |(name, _)| name);
            write!(f, "{}`{name}`", if index > 0 { ", " } else { "" })?;
        }
        Ok(())
    }
}

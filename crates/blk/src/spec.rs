//! Disks as one line of text: `null:8G`, `mem:2G`, `file:/dev/sdb,direct=on`, `qcow2:/images/a.qcow2`.
//!
//! After the kind and its size or path come options, separated by commas. A comma in a path is written twice, as for
//! QEMU.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use crate::backend::{Backend, BackendError};
use crate::backends::file::{Direct, Engine, File, FileOptions, Lock};
use crate::backends::memory::Memory;
use crate::backends::null::Null;
use crate::backends::qcow2::{Qcow2, Qcow2Options};

/// The smallest disk.
const BYTES_MIN: u64 = 512;

/// What a disk is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Spec {
    /// Takes everything and keeps nothing.
    Null {
        /// Size in bytes.
        bytes: u64,
    },
    /// Memory of this process.
    Memory {
        /// Size in bytes.
        bytes: u64,
        /// In huge pages, which is the default.
        huge: bool,
    },
    /// A raw file or block device.
    File {
        /// Where it is.
        path: PathBuf,
        /// How to open it; `read_only` is chosen when it is opened.
        options: FileOptions,
    },
    /// A qcow2 image.
    Qcow2 {
        /// Where it is.
        path: PathBuf,
        /// How to open it; `read_only` is chosen when it is opened.
        options: Qcow2Options,
    },
}

impl Spec {
    /// The file that it is stored in, if it is.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Null { .. } | Self::Memory { .. } => None,
            Self::File { path, .. } | Self::Qcow2 { path, .. } => Some(path),
        }
    }

    /// Opens the storage. Files opened with `read_only` may have other readers; the storage of the other kinds is not
    /// shared, and it is [`Options::read_only`](crate::Options::read_only) that keeps the driver from writing it.
    ///
    /// # Errors
    /// It is not there, is used by somebody else, or cannot do what the options ask for.
    pub fn open(&self, read_only: bool) -> Result<Arc<dyn Backend>, BackendError> {
        Ok(match self {
            Self::Null { bytes } => Arc::new(Null::new(*bytes)),
            Self::Memory { bytes, huge } => Arc::new(Memory::new(*bytes, *huge)?),
            Self::File { path, options } => {
                Arc::new(File::open(path, FileOptions { read_only, ..*options })?)
            }
            Self::Qcow2 { path, options } => {
                Arc::new(Qcow2::open(path, Qcow2Options { read_only, ..*options })?)
            }
        })
    }
}

/// Why a line is no disk. The message says what is allowed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// No kind that there is.
    #[error(
        "{0:?} is no disk: expected null:SIZE, mem:SIZE, file:PATH or qcow2:PATH, then options after commas"
    )]
    Kind(String),
    /// No size that there can be.
    #[error(
        "{0:?} is no size: expected bytes (a multiple of 512), or a number with K, M, G or T, of at least 512 bytes"
    )]
    Size(String),
    /// A path is missing.
    #[error("{0}: expected a path after the colon")]
    NoPath(&'static str),
    /// No option that this kind has.
    #[error("{kind} has no option {option:?}: expected one of {allowed}")]
    Option {
        /// The kind of disk.
        kind: &'static str,
        /// What was given.
        option: String,
        /// What is allowed.
        allowed: &'static str,
    },
    /// A value that an option cannot have.
    #[error("{option}={value}: expected {allowed}")]
    Value {
        /// The option.
        option: &'static str,
        /// What was given.
        value: String,
        /// What is allowed.
        allowed: &'static str,
    },
}

/// Reads a size: bytes, or a number with K, M, G or T (powers of 1024, an `iB` or `B` behind it is ignored).
///
/// # Errors
/// It is no number, no multiple of 512, or too large.
pub fn parse_size(text: &str) -> Result<u64, SpecError> {
    let bad = || SpecError::Size(text.to_owned());
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        _ => return Err(bad()),
    };
    let number: u64 = number.parse().map_err(|_| bad())?;
    let bytes = number.checked_mul(1 << shift).filter(|&bytes| bytes < 1 << 62).ok_or_else(bad)?;
    if bytes >= BYTES_MIN && bytes % 512 == 0 { Ok(bytes) } else { Err(bad()) }
}

/// Writes a size so that [`parse_size`] reads it.
fn format_size(bytes: u64) -> String {
    let unit = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
    let unit = unit.iter().find(|&&(shift, _)| bytes > 0 && bytes.is_multiple_of(1 << shift));
    unit.map_or(bytes.to_string(), |(shift, name)| format!("{}{name}", bytes >> shift))
}

/// Cuts at single commas; double ones stand for a comma.
fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(c);
        }
    }
    parts
}

fn on_off(option: &'static str, value: &str) -> Result<bool, SpecError> {
    match value {
        "on" | "" => Ok(true),
        "off" => Ok(false),
        _ => Err(SpecError::Value { option, value: value.to_owned(), allowed: "on or off" }),
    }
}

fn number(option: &'static str, value: &str, allowed: &'static str, max: u32) -> Result<u32, SpecError> {
    let bad = || SpecError::Value { option, value: value.to_owned(), allowed };
    value.parse().ok().filter(|&n| n > 0 && n <= max).ok_or_else(bad)
}

impl FromStr for Spec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let (kind, rest) = text.split_once(':').ok_or_else(|| SpecError::Kind(text.to_owned()))?;
        let parts = split(rest);
        let (first, options) = parts.split_first().ok_or_else(|| SpecError::Kind(text.to_owned()))?;
        let mut options = options.iter().map(|option| option.split_once('=').unwrap_or((option, "")));
        let unknown =
            |kind, option: &str, allowed| Err(SpecError::Option { kind, option: option.to_owned(), allowed });
        let path =
            |kind| if first.is_empty() { Err(SpecError::NoPath(kind)) } else { Ok(PathBuf::from(first)) };
        match kind {
            "null" => {
                let bytes = parse_size(first)?;
                options.next().map_or(Ok(Self::Null { bytes }), |(option, _)| unknown("null", option, "none"))
            }
            "mem" => {
                let (bytes, mut huge) = (parse_size(first)?, true);
                for (option, value) in options {
                    match option {
                        "huge" => huge = on_off("huge", value)?,
                        _ => return unknown("mem", option, "huge"),
                    }
                }
                Ok(Self::Memory { bytes, huge })
            }
            "file" => Ok(Self::File { path: path("file")?, options: file_options(options)? }),
            "qcow2" => Ok(Self::Qcow2 { path: path("qcow2")?, options: qcow2_options(options)? }),
            _ => Err(SpecError::Kind(text.to_owned())),
        }
    }
}

fn engine(value: &str) -> Result<Engine, SpecError> {
    Ok(match value {
        "auto" => Engine::Auto,
        "uring" => Engine::Uring,
        "inline" => Engine::Inline,
        _ => {
            let (value, allowed) = (value.to_owned(), "auto, uring or inline");
            return Err(SpecError::Value { option: "engine", value, allowed });
        }
    })
}

fn lock(value: &str) -> Result<Lock, SpecError> {
    Ok(match value {
        "on" | "" => Lock::On,
        "late" => Lock::Late,
        "off" => Lock::Off,
        _ => {
            let (value, allowed) = (value.to_owned(), "on, late or off");
            return Err(SpecError::Value { option: "lock", value, allowed });
        }
    })
}

fn file_options<'a>(given: impl Iterator<Item = (&'a str, &'a str)>) -> Result<FileOptions, SpecError> {
    let mut options = FileOptions::default();
    for (option, value) in given {
        let bad = |option, allowed| SpecError::Value { option, value: value.to_owned(), allowed };
        match option {
            "direct" => {
                options.direct = match value {
                    "auto" => Direct::Auto,
                    "on" | "" => Direct::On,
                    "off" => Direct::Off,
                    _ => return Err(bad("direct", "auto, on or off")),
                }
            }
            "engine" => options.engine = engine(value)?,
            "lock" => options.lock = lock(value)?,
            "fixed-buffers" => options.fixed_buffers = on_off("fixed-buffers", value)?,
            "sqpoll" => options.sqpoll_ms = Some(number("sqpoll", value, "1 to 60000 milliseconds", 60_000)?),
            _ => {
                let allowed = "direct, engine, fixed-buffers, lock, sqpoll";
                return Err(SpecError::Option { kind: "file", option: option.to_owned(), allowed });
            }
        }
    }
    Ok(options)
}

fn qcow2_options<'a>(given: impl Iterator<Item = (&'a str, &'a str)>) -> Result<Qcow2Options, SpecError> {
    let mut options = Qcow2Options::default();
    for (option, value) in given {
        match option {
            "direct" => options.direct = on_off("direct", value)?,
            "backing" => options.backing = on_off("backing", value)?,
            "engine" => options.engine = engine(value)?,
            "lock" => options.lock = lock(value)?,
            _ => {
                let allowed = "backing, direct, engine, lock";
                return Err(SpecError::Option { kind: "qcow2", option: option.to_owned(), allowed });
            }
        }
    }
    Ok(options)
}

impl TryFrom<String> for Spec {
    type Error = SpecError;

    fn try_from(text: String) -> Result<Self, SpecError> {
        text.parse()
    }
}

impl From<Spec> for String {
    fn from(spec: Spec) -> Self {
        spec.to_string()
    }
}

/// Writes options that files and images have, unless they have their default.
fn write_ways(f: &mut fmt::Formatter<'_>, engine: Engine, lock: Lock) -> fmt::Result {
    match engine {
        Engine::Auto => {}
        Engine::Uring => f.write_str(",engine=uring")?,
        Engine::Inline => f.write_str(",engine=inline")?,
    }
    match lock {
        Lock::On => Ok(()),
        Lock::Late => f.write_str(",lock=late"),
        Lock::Off => f.write_str(",lock=off"),
    }
}

impl fmt::Display for Spec {
    /// Writes the line that reads as this, without the options that have their default.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let escaped = |path: &PathBuf| path.display().to_string().replace(',', ",,");
        let on_off = |on| if on { "on" } else { "off" };
        match self {
            Self::Null { bytes } => write!(f, "null:{}", format_size(*bytes)),
            Self::Memory { bytes, huge } => {
                write!(f, "mem:{}", format_size(*bytes))?;
                if *huge { Ok(()) } else { f.write_str(",huge=off") }
            }
            Self::File { path, options } => {
                let default = FileOptions::default();
                write!(f, "file:{}", escaped(path))?;
                match options.direct {
                    Direct::Auto => {}
                    Direct::On => f.write_str(",direct=on")?,
                    Direct::Off => f.write_str(",direct=off")?,
                }
                write_ways(f, options.engine, options.lock)?;
                if options.fixed_buffers != default.fixed_buffers {
                    write!(f, ",fixed-buffers={}", on_off(options.fixed_buffers))?;
                }
                options.sqpoll_ms.map_or(Ok(()), |ms| write!(f, ",sqpoll={ms}"))
            }
            Self::Qcow2 { path, options } => {
                let default = Qcow2Options::default();
                write!(f, "qcow2:{}", escaped(path))?;
                for (name, on, default) in [
                    ("direct", options.direct, default.direct),
                    ("backing", options.backing, default.backing),
                ] {
                    if on != default {
                        write!(f, ",{name}={}", on_off(on))?;
                    }
                }
                write_ways(f, options.engine, options.lock)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_reads_back_as_itself() {
        for line in [
            "null:8G",
            "null:512",
            "mem:1536",
            "mem:2G,huge=off",
            "file:/dev/sdb",
            "file:a,,b.img,direct=on,engine=uring,lock=off,fixed-buffers=on,sqpoll=100",
            "file:x,direct=off,engine=inline,lock=late",
            "qcow2:/images/a.qcow2",
            "qcow2:a,direct=on,backing=on,engine=inline,lock=late",
            "qcow2:a,lock=off",
        ] {
            assert_eq!(line.parse::<Spec>().unwrap().to_string(), line);
        }
    }

    #[test]
    fn sizes_are_powers_of_1024() {
        for (text, bytes) in [
            ("512", 512),
            ("1K", 1024),
            ("3m", 3 << 20),
            ("2GiB", 2 << 30),
            ("1TB", 1 << 40),
            ("1024B", 1024),
        ] {
            assert_eq!(parse_size(text), Ok(bytes));
        }
        for text in
            ["", "0", "1", "511", "513", "-1", "1.5G", "G", "8X", "99999999T", "18446744073709551616", "1 G"]
        {
            assert!(parse_size(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn paths_may_have_commas_and_colons() {
        let Spec::File { path, options } = "file:/a:b,,c,lock=off".parse().unwrap() else { panic!("a file") };
        assert_eq!((path, options.lock), (PathBuf::from("/a:b,c"), Lock::Off));
    }

    #[test]
    fn mistakes_are_answered_with_what_is_allowed() {
        for (line, hint) in [
            ("", "null:SIZE"),
            ("nul:1G", "null:SIZE"),
            ("/dev/sdb", "file:PATH"),
            ("null:big", "multiple of 512"),
            ("null:1G,huge=on", "expected one of none"),
            ("mem:1G,hugh", "expected one of huge"),
            ("mem:1G,huge=yes", "on or off"),
            ("file:", "a path"),
            ("file:x,direct=maybe", "auto, on or off"),
            ("file:x,sqpoll=0", "1 to 60000"),
            ("file:x,lock=maybe", "on, late or off"),
            ("file:x,cache=none", "direct, engine"),
        ] {
            let message = line.parse::<Spec>().unwrap_err().to_string();
            assert!(message.contains(hint), "{line}: {message}");
        }
    }

    #[test]
    fn a_spec_opens_what_it_says() {
        let disk = "mem:3M".parse::<Spec>().unwrap().open(false).unwrap();
        assert_eq!(disk.geometry().bytes, 3 << 20);
        assert!("file:/no/such/file".parse::<Spec>().unwrap().open(false).is_err());
    }
}

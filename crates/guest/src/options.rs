//! The command line: `key=value` pairs, separated by blanks. Every key has a default; an unknown one is an error.

use alloc::string::{String, ToString};
use core::str::FromStr;

use virtio::RingFormat;

/// Processors that drive one queue each, at most.
pub const JOBS_MAX: u16 = 64;
/// Requests in flight in a queue, at most.
pub const DEPTH_MAX: u16 = 1024;
/// Bytes of a sector, the unit of requests (virtio 1.2, section 5.2.4).
pub const SECTOR_BYTES: u32 = 512;
/// Bytes of a request, at most.
pub const BLOCK_BYTES_MAX: u32 = 1 << 20;
/// How long a job may run, in milliseconds: an hour.
pub const MS_MAX: u64 = 3_600_000;
/// Characters of the text that a result is marked with, at most.
pub const ID_CHARS_MAX: usize = 128;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    /// Load on one disk.
    Blk,
    /// Entropy, a request at a time.
    Rng,
    /// A short load on every device, and every disk over rings in every format it has.
    Tour,
    /// What rings, shared memory and the clock cost between processors, without a device.
    Ring,
    /// Round trips of single requests by kick and interrupt.
    Events,
    /// A fault on purpose, to see that it is reported.
    Fault,
}

/// What requests do, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Write instead of read.
    pub write: bool,
    /// Anywhere instead of one block after the other.
    pub random: bool,
}

/// When to notify the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KickMode {
    /// When it asks for it.
    Auto,
    /// After every burst, as a driver that ignores suppression.
    Always,
}

/// The command line, understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// What is to be done.
    pub job: Job,
    /// How many processors drive a queue each.
    pub jobs: u16,
    /// Requests in flight in each queue.
    pub depth: u16,
    /// Bytes of a request.
    pub block_bytes: u32,
    /// What requests do.
    pub access: Access,
    /// How long, in milliseconds.
    pub ms: u64,
    /// Write a pattern first, and read it back.
    pub verify: bool,
    /// Sleep until the interrupt of a completion, instead of polling.
    pub interrupts: bool,
    /// When to notify the device.
    pub kick: KickMode,
    /// The layout of rings.
    pub format: RingFormat,
    /// Indirect descriptor tables; None for: where a queue would be too small without.
    pub indirect: Option<bool>,
    /// Notifications by index; None for: if the device can.
    pub event_idx: Option<bool>,
    /// Which disk, in the order of the bus.
    pub disk: usize,
    /// Where patterns and random numbers begin.
    pub seed: u64,
    /// A text to mark the result with.
    pub id: String,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            job: Job::Tour,
            jobs: 1,
            depth: 32,
            block_bytes: 4096,
            access: Access { write: false, random: true },
            ms: 2000,
            verify: false,
            interrupts: false,
            kick: KickMode::Auto,
            format: RingFormat::Split,
            indirect: None,
            event_idx: None,
            disk: 0,
            seed: 1,
            id: String::new(),
        }
    }
}

/// What is wrong with a command line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are the values named in each message")]
pub enum OptionsError {
    /// No equals sign.
    #[error("`{0}` is not of the form key=value")]
    NoValue(String),
    /// A key that means nothing.
    #[error("unknown key `{0}`")]
    UnknownKey(String),
    /// A value that the key does not have.
    #[error("{key}={value}: allowed is {allowed}")]
    BadValue { key: String, value: String, allowed: &'static str },
}

impl FromStr for Options {
    type Err = OptionsError;

    fn from_str(line: &str) -> Result<Self, OptionsError> {
        let mut options = Self::default();
        for word in line.split_ascii_whitespace() {
            let (key, value) = word.split_once('=').ok_or_else(|| OptionsError::NoValue(word.to_string()))?;
            options.set(key, value)?;
        }
        Ok(options)
    }
}

impl Options {
    fn set(&mut self, key: &str, value: &str) -> Result<(), OptionsError> {
        let allowed = match self.assign(key, value) {
            Ok(()) => return Ok(()),
            Err(allowed) => allowed.ok_or_else(|| OptionsError::UnknownKey(key.to_string()))?,
        };
        Err(OptionsError::BadValue { key: key.to_string(), value: value.to_string(), allowed })
    }

    /// Sets `key`; the error says what is allowed, or None if the key is unknown.
    fn assign(&mut self, key: &str, value: &str) -> Result<(), Option<&'static str>> {
        match key {
            "job" => self.job = job(value).ok_or("blk, rng, tour, ring, events or fault")?,
            "jobs" => self.jobs = number(value, 1, JOBS_MAX.into()).ok_or("1 to 64")? as u16,
            "qd" => self.depth = number(value, 1, DEPTH_MAX.into()).ok_or("1 to 1024")? as u16,
            "bs" => self.block_bytes = block_bytes(value).ok_or("512 to 1m, a multiple of 512")?,
            "rw" => self.access = access(value).ok_or("read, write, randread or randwrite")?,
            "seconds" => self.ms = number(value, 1, MS_MAX / 1000).ok_or("1 to 3600")? * 1000,
            "ms" => self.ms = number(value, 1, MS_MAX).ok_or("1 to 3600000")?,
            "verify" => self.verify = switch(value)?,
            "irq" => self.interrupts = switch(value)?,
            "kick" => self.kick = kick(value).ok_or("auto or always")?,
            "ring" => self.format = format(value).ok_or("split or packed")?,
            "indirect" => self.indirect = Some(switch(value)?),
            "event_idx" => self.event_idx = Some(switch(value)?),
            "disk" => self.disk = number(value, 0, 255).ok_or("0 to 255")? as usize,
            "seed" => self.seed = number(value, 0, u64::MAX).ok_or("a number below 2^64")?,
            "id" if value.chars().count() <= ID_CHARS_MAX => self.id = value.to_string(),
            "id" => return Err(Some("at most 128 characters")),
            _ => return Err(None),
        }
        Ok(())
    }
}

fn number(value: &str, min: u64, max: u64) -> Option<u64> {
    let digits = value.bytes().all(|byte| byte.is_ascii_digit());
    value.parse().ok().filter(|number| digits && (min..=max).contains(number))
}

fn switch(value: &str) -> Result<bool, &'static str> {
    match value {
        "0" => Ok(false),
        "1" => Ok(true),
        _ => Err("0 or 1"),
    }
}

fn block_bytes(value: &str) -> Option<u32> {
    let (digits, unit) = match value.to_ascii_lowercase().as_bytes().last() {
        Some(b'k') => (&value[..value.len() - 1], 1 << 10),
        Some(b'm') => (&value[..value.len() - 1], 1 << 20),
        _ => (value, 1),
    };
    let bytes = number(digits, 1, BLOCK_BYTES_MAX.into())? * unit;
    u32::try_from(bytes).ok().filter(|&bytes| bytes <= BLOCK_BYTES_MAX && bytes.is_multiple_of(SECTOR_BYTES))
}

fn job(value: &str) -> Option<Job> {
    Some(match value {
        "blk" => Job::Blk,
        "rng" => Job::Rng,
        "tour" => Job::Tour,
        "ring" => Job::Ring,
        "events" => Job::Events,
        "fault" => Job::Fault,
        _ => return None,
    })
}

fn access(value: &str) -> Option<Access> {
    let kind = value.strip_prefix("rand");
    let write = match kind.unwrap_or(value) {
        "read" => false,
        "write" => true,
        _ => return None,
    };
    Some(Access { write, random: kind.is_some() })
}

fn kick(value: &str) -> Option<KickMode> {
    match value {
        "auto" => Some(KickMode::Auto),
        "always" => Some(KickMode::Always),
        _ => None,
    }
}

fn format(value: &str) -> Option<RingFormat> {
    match value {
        "split" => Some(RingFormat::Split),
        "packed" => Some(RingFormat::Packed),
        _ => None,
    }
}

impl Access {
    /// As the command line has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match (self.random, self.write) {
            (true, false) => "randread",
            (true, true) => "randwrite",
            (false, false) => "read",
            (false, true) => "write",
        }
    }
}

/// As the command line has it.
#[must_use]
pub fn format_name(format: RingFormat) -> &'static str {
    match format {
        RingFormat::Split => "split",
        RingFormat::Packed => "packed",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(line: &str) -> String {
        line.parse::<Options>().unwrap_err().to_string()
    }

    #[test]
    fn nothing_said_is_the_default() {
        assert_eq!("".parse(), Ok(Options::default()));
        assert_eq!(" \t ".parse(), Ok(Options::default()));
    }

    #[test]
    fn every_key_is_understood() {
        let line = "job=blk jobs=2 qd=128 bs=4k rw=randwrite seconds=3 verify=1 irq=1 kick=always ring=packed \
                    indirect=1 event_idx=0 disk=1 seed=7 id=row-a";
        let expected = Options {
            job: Job::Blk,
            jobs: 2,
            depth: 128,
            block_bytes: 4096,
            access: Access { write: true, random: true },
            ms: 3000,
            verify: true,
            interrupts: true,
            kick: KickMode::Always,
            format: RingFormat::Packed,
            indirect: Some(true),
            event_idx: Some(false),
            disk: 1,
            seed: 7,
            id: "row-a".into(),
        };
        assert_eq!(line.parse(), Ok(expected));
    }

    #[test]
    fn what_is_named_is_read_back() {
        for name in ["read", "write", "randread", "randwrite"] {
            assert_eq!(access(name).unwrap().name(), name);
        }
        for name in ["split", "packed"] {
            assert_eq!(format_name(format(name).unwrap()), name);
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(refused("job=blk depth=3"), "unknown key `depth`");
        assert_eq!(refused("verify"), "`verify` is not of the form key=value");
        assert_eq!(refused("qd=0"), "qd=0: allowed is 1 to 1024");
        assert_eq!(refused("irq=yes"), "irq=yes: allowed is 0 or 1");
        assert_eq!(
            refused("rw=randrandread"),
            "rw=randrandread: allowed is read, write, randread or randwrite"
        );
        for bad in
            ["bs=1000", "bs=0", "bs=2m", "bs=k", "bs=", "jobs=65", "jobs=+1", "ms=0", "seed=-1", "disk=x"]
        {
            assert!(bad.parse::<Options>().is_err(), "{bad}");
        }
        let long = std::format!("id={}", "x".repeat(ID_CHARS_MAX + 1));
        assert!(long.parse::<Options>().is_err());
    }
}

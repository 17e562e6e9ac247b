//! What the guest says: one JSON object a line.

use core::fmt::{self, Display, Formatter, Write};

use crate::histogram::Histogram;
use crate::machine::clock::Clock;
use crate::machine::service;
use crate::options::{Options, format_name};

/// `{"ready":…}`: the machine is known, the job begins.
pub struct Ready {
    /// Processors.
    pub cpus: usize,
    /// virtio-blk devices.
    pub disks: usize,
}

impl Display for Ready {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{{\"ready\":{{\"cpus\":{},\"disks\":{}}}}}", self.cpus, self.disks)
    }
}

/// `{"error":…}`: the end.
pub struct Failed<'a>(
    /// Why.
    pub &'a dyn Display,
);

impl Display for Failed<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("{\"error\":\"")?;
        write!(Escaped(f), "{}", self.0)?;
        f.write_str("\"}")
    }
}

/// `{"result":…}` of a load.
pub struct Load<'a> {
    /// What was asked for.
    pub options: &'a Options,
    /// The name of the job.
    pub job: &'a str,
    /// Time.
    pub clock: Clock,
    /// How long was measured, in ticks.
    pub ticks: u64,
    /// From submission to completion, in ticks.
    pub latency: &'a Histogram,
    /// Requests that were done while measured.
    pub requests: u64,
    /// Notifications to the device.
    pub kicks: u64,
    /// Interrupts by it.
    pub interrupts: u64,
    /// Interrupts that did not come.
    pub lost_interrupts: u64,
    /// Requests that came back, while measured and before and after.
    pub returned: u64,
    /// Of those, requests that failed.
    pub failed: u64,
    /// Bytes that were written and read back before.
    pub verified_bytes: u64,
}

impl Display for Load<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let o = self.options;
        let seconds = self.ticks as f64 / self.clock.hz() as f64;
        let iops = self.requests as f64 / seconds;
        let us = |permille| self.clock.us(self.latency.quantile(permille));
        let mut object = Object::new(f, "result")?;
        object.text("job", self.job)?.text("id", &o.id)?.text("device", "disk")?;
        object.number("disk", o.disk)?.number("jobs", o.jobs)?.number("qd", o.depth)?;
        object.number("bs", o.block_bytes)?.text("rw", o.access.name())?;
        object.text("ring", format_name(o.format))?.number("irq", u8::from(o.interrupts))?;
        object.decimal("seconds", seconds)?.number("requests", self.requests)?;
        object.decimal("iops", iops)?.decimal("bytes_per_s", iops * f64::from(o.block_bytes))?;
        object.decimal("p50_us", us(500))?.decimal("p99_us", us(990))?.decimal("p999_us", us(999))?;
        object.number("kicks", self.kicks)?.number("interrupts", self.interrupts)?;
        object.number("lost_interrupts", self.lost_interrupts)?;
        object.number("returned", self.returned)?.number("errors", self.failed)?;
        object.number("verified_bytes", self.verified_bytes)?;
        cut_short(&mut object)?;
        object.end()
    }
}

/// Adds `cut_short` to the result of a job that was not left to its end.
pub(crate) fn cut_short(object: &mut Object<'_, '_>) -> fmt::Result {
    if service::asked_to_end() { object.number("cut_short", 1).map(drop) } else { Ok(()) }
}

/// A JSON object inside of another one, under a name.
pub struct Object<'a, 'b> {
    out: &'a mut Formatter<'b>,
    first: bool,
}

impl<'a, 'b> Object<'a, 'b> {
    /// `{"name":{`
    ///
    /// # Errors
    /// The output is full, here and below.
    pub fn new(out: &'a mut Formatter<'b>, name: &str) -> Result<Self, fmt::Error> {
        write!(out, "{{\"{name}\":{{")?;
        Ok(Self { out, first: true })
    }

    /// A whole number.
    ///
    /// # Errors
    /// See [`Object::new`].
    pub fn number(&mut self, name: &str, value: impl Display) -> Result<&mut Self, fmt::Error> {
        self.key(name)?;
        write!(self.out, "{value}")?;
        Ok(self)
    }

    /// A number with three decimals; 0 for what is none.
    ///
    /// # Errors
    /// See [`Object::new`].
    pub fn decimal(&mut self, name: &str, value: f64) -> Result<&mut Self, fmt::Error> {
        self.key(name)?;
        write!(self.out, "{:.3}", if value.is_finite() { value } else { 0.0 })?;
        Ok(self)
    }

    /// A text.
    ///
    /// # Errors
    /// See [`Object::new`].
    pub fn text(&mut self, name: &str, value: &str) -> Result<&mut Self, fmt::Error> {
        self.key(name)?;
        self.out.write_char('"')?;
        Escaped(self.out).write_str(value)?;
        self.out.write_char('"')?;
        Ok(self)
    }

    /// `}}`
    ///
    /// # Errors
    /// See [`Object::new`].
    pub fn end(self) -> fmt::Result {
        self.out.write_str("}}")
    }

    fn key(&mut self, name: &str) -> fmt::Result {
        let comma = if core::mem::take(&mut self.first) { "" } else { "," };
        write!(self.out, "{comma}\"{name}\":")
    }
}

/// Text inside a JSON string.
struct Escaped<'a, 'b>(&'a mut Formatter<'b>);

impl Write for Escaped<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.chars().try_for_each(|c| match c {
            '"' | '\\' => write!(self.0, "\\{c}"),
            c if c.is_ascii_control() => write!(self.0, "\\u{:04x}", c as u32),
            c => self.0.write_char(c),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::*;

    #[test]
    fn lines_are_as_they_are_promised() {
        assert_eq!(Ready { cpus: 2, disks: 1 }.to_string(), r#"{"ready":{"cpus":2,"disks":1}}"#);
        let failed = Failed(&"a \"b\" \\ c\n").to_string();
        assert_eq!(failed, r#"{"error":"a \"b\" \\ c\u000a"}"#);

        let options = "job=blk qd=4 id=a\"b".parse().unwrap();
        let mut latency = Histogram::default();
        (0..10).for_each(|_| latency.record(100));
        let load = Load {
            options: &options,
            job: "blk",
            clock: Clock::of_hz(100_000_000),
            ticks: 50_000_000,
            latency: &latency,
            requests: 10,
            kicks: 3,
            interrupts: 2,
            lost_interrupts: 0,
            returned: 12,
            failed: 1,
            verified_bytes: 4096,
        };
        let expected = r#"{"result":{"job":"blk","id":"a\"b","device":"disk","disk":0,"jobs":1,"qd":4,"bs":4096,"rw":"randread","ring":"split","irq":0,"seconds":0.500,"requests":10,"iops":20.000,"bytes_per_s":81920.000,"p50_us":1.000,"p99_us":1.000,"p999_us":1.000,"kicks":3,"interrupts":2,"lost_interrupts":0,"returned":12,"errors":1,"verified_bytes":4096}}"#;
        assert_eq!(load.to_string(), expected);
        assert!(
            Load { ticks: 0, ..load }.to_string().contains("\"iops\":0.000"),
            "nothing that is no number"
        );
    }
}

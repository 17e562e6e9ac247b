//! Prometheus' text exposition format, version 0.0.4: families of samples, each a name, labels and a number.
//!
//! <https://prometheus.io/docs/instrumenting/exposition_formats/>

use std::fmt::{Display, Write};

/// A page of metrics. A family is added once, with all its samples.
#[derive(Debug, Default)]
pub(super) struct Text(String);

impl Text {
    /// A family of numbers that only grow; by convention its name ends in `_total`.
    pub(super) fn counter<'a>(&'a mut self, name: &'a str, help: &str) -> Family<'a> {
        self.family(name, "counter", help)
    }

    /// A family of numbers that go up and down.
    pub(super) fn gauge<'a>(&'a mut self, name: &'a str, help: &str) -> Family<'a> {
        self.family(name, "gauge", help)
    }

    /// `help` is one line without backslashes.
    fn family<'a>(&'a mut self, name: &'a str, kind: &str, help: &str) -> Family<'a> {
        // A string takes what is written to it.
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
        Family { text: &mut self.0, name }
    }

    pub(super) fn into_string(self) -> String {
        self.0
    }
}

/// A family that samples are added to.
pub(super) struct Family<'a> {
    text: &'a mut String,
    name: &'a str,
}

impl Family<'_> {
    /// Adds a sample.
    pub(super) fn add(&mut self, labels: &[(&str, &dyn Display)], value: impl Display) {
        self.text.push_str(self.name);
        for (index, (name, label)) in labels.iter().enumerate() {
            let before = if index == 0 { '{' } else { ',' };
            let _ = write!(self.text, "{before}{name}=\"{}\"", escaped(&label.to_string()));
        }
        if !labels.is_empty() {
            self.text.push('}');
        }
        let _ = writeln!(self.text, " {value}");
    }
}

fn escaped(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// Nanoseconds in the base unit of time.
pub(super) fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_written_as_the_format_says() {
        let mut text = Text::default();
        let mut family = text.counter("a_total", "What it is.");
        family.add(&[], 3);
        family.add(&[("device", &"a\"\\\n"), ("queue", &1)], seconds(1_500_000_000));
        text.gauge("b_ratio", "Another.").add(&[], 0.25);
        assert_eq!(
            text.into_string(),
            "# HELP a_total What it is.\n# TYPE a_total counter\na_total 3\n\
             a_total{device=\"a\\\"\\\\\\n\",queue=\"1\"} 1.5\n\
             # HELP b_ratio Another.\n# TYPE b_ratio gauge\nb_ratio 0.25\n"
        );
    }
}

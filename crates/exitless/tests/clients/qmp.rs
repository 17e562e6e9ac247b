//! The part of QEMU's control protocol (docs/interop/qmp-spec) that migration needs: one JSON object per line.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

const ANSWER: Duration = Duration::from_secs(120);

pub(crate) struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects once QEMU listens, and leaves its negotiation mode.
    pub(crate) fn connect(path: &Path) -> Self {
        let deadline = Instant::now() + ANSWER;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < deadline, "no QMP at {}: {error}", path.display()),
            }
            thread::sleep(Duration::from_millis(10));
        };
        stream.set_read_timeout(Some(ANSWER)).expect("limit the wait for QEMU's answers");
        let mut qmp = Self { stream: BufReader::new(stream) };
        qmp.read();
        qmp.run("qmp_capabilities", json!({}));
        qmp
    }

    /// Runs a command and returns what it returned.
    pub(crate) fn run(&mut self, command: &str, arguments: Value) -> Value {
        let line = json!({ "execute": command, "arguments": arguments });
        writeln!(self.stream.get_mut(), "{line}").expect("write to QMP");
        loop {
            let mut answer = self.read();
            if answer.get("event").is_some() {
                continue;
            }
            match answer.get_mut("return") {
                Some(value) => return value.take(),
                None => panic!("QMP command {line} failed: {answer}"),
            }
        }
    }

    /// How the migration stands: `setup`, `active`, `completed`, `failed`, … and the whole report.
    pub(crate) fn migration(&mut self) -> (String, Value) {
        let report = self.run("query-migrate", json!({}));
        (report["status"].as_str().unwrap_or("none").to_owned(), report)
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).expect("read from QMP");
        assert!(!line.is_empty(), "QEMU closed its QMP socket");
        serde_json::from_str(&line).expect("QMP speaks JSON")
    }
}

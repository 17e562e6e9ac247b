//! The serial port of the machine: lines of the embedded guest, or a kernel's console on this program's own streams.

use std::io::{self, Read, Write};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use vmm::Machine;

use super::{Said, guest};

/// The longest line that is kept, in bytes; what follows on it is dropped.
const LINE_BYTES_MAX: usize = 4096;
/// The most lines that are kept: a job prints one or two.
const LINES_MAX: usize = 10_000;
/// The guest's serial port takes so few bytes at a time that it may have to catch up.
const FULL: Duration = Duration::from_millis(5);

/// Understands what the embedded guest prints, and passes on to stderr what is not for the program.
pub(super) struct Lines {
    tell: Sender<Said>,
    line: Vec<u8>,
    told: usize,
}

impl Lines {
    pub(super) fn new(tell: Sender<Said>) -> Self {
        Self { tell, line: Vec::new(), told: 0 }
    }

    fn end_line(&mut self) {
        let line = String::from_utf8_lossy(&self.line);
        match guest::parse(&line) {
            Some(_) if self.told == LINES_MAX => {}
            Some(said) => {
                self.told += 1;
                let _ = self.tell.send(Said::Line(said));
            }
            None if line.trim().is_empty() => {}
            None => {
                let _ = writeln!(io::stderr(), "guest: {}", line.trim_end().escape_debug());
            }
        }
        self.line.clear();
    }
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            if byte == b'\n' {
                self.end_line();
            } else if self.line.len() < LINE_BYTES_MAX {
                self.line.push(byte);
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where a kernel's console goes: stdout, or stderr where stdout is for the result.
pub(super) fn sink(json: bool) -> vmm::Sink {
    if json { Box::new(io::stderr()) } else { Box::new(Flushed(io::stdout())) }
}

/// Shows every byte at once: a prompt ends in no newline.
struct Flushed(io::Stdout);

impl Write for Flushed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.0.write(bytes)?;
        self.0.flush().map(|()| written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Types what comes on stdin on the machine's console, for as long as there is a machine.
pub(super) fn type_from_stdin(machine: &Arc<Machine>) -> anyhow::Result<()> {
    let machine = Arc::downgrade(machine);
    let run = move || {
        let mut bytes = [0; 256];
        while let Ok(count @ 1..) = io::stdin().read(&mut bytes) {
            if !type_all(&machine, &bytes[..count]) {
                return;
            }
        }
    };
    thread::Builder::new().name("console".into()).spawn(run).context("cannot start a thread")?;
    Ok(())
}

fn type_all(machine: &Weak<Machine>, mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        let Some(machine) = machine.upgrade() else { return false };
        let taken = machine.input(bytes);
        bytes = &bytes[taken..];
        drop(machine);
        if taken == 0 {
            thread::sleep(FULL);
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::super::guest::Line;
    use super::*;

    #[test]
    fn lines_arrive_whole_however_they_are_cut() {
        let (tell, said) = mpsc::channel();
        let mut lines = Lines::new(tell);
        lines.write_all(b"{\"error\":\"a").unwrap();
        lines.write_all(b"b\"}\r\nnoise\n").unwrap();
        let Ok(Said::Line(Line::Error(error))) = said.try_recv() else { panic!("no line") };
        assert_eq!(error, "ab");
        assert!(said.try_recv().is_err());
    }

    #[test]
    fn lines_without_end_take_no_memory() {
        let (tell, said) = mpsc::channel();
        let mut lines = Lines::new(tell);
        (0..2 * LINES_MAX).for_each(|_| lines.write_all(b"{\"error\":\"\"}\n").unwrap());
        assert_eq!(said.try_iter().count(), LINES_MAX);
    }

    #[test]
    fn a_line_without_end_takes_no_memory() {
        let mut lines = Lines::new(mpsc::channel().0);
        for _ in 0..100 {
            lines.write_all(&[b'x'; 1000]).unwrap();
        }
        assert!(lines.line.len() <= LINE_BYTES_MAX);
    }
}

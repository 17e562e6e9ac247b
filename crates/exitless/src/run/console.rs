//! What the machine prints on its serial port: lines of the embedded guest, or a kernel's console on this program's own
//! streams.

use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::Sender;

use rustix::fs::fstat;

use super::{Said, guest};

/// The longest line that is kept, in bytes; what follows on it is dropped.
const LINE_BYTES_MAX: usize = 4096;
/// The most lines that are kept: a job prints one or two.
const LINES_MAX: usize = 10_000;

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

/// A stream of this program's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stream {
    Stdout,
    Stderr,
}

/// Where a kernel's console goes: stdout, or stderr where stdout is for the result.
pub(super) fn stream(json: bool) -> Stream {
    if json { Stream::Stderr } else { Stream::Stdout }
}

impl Stream {
    /// What a console is printed to.
    pub(super) fn sink(self) -> vmm::Sink {
        match self {
            Self::Stdout => Box::new(Flushed(io::stdout())),
            Self::Stderr => Box::new(io::stderr()),
        }
    }

    /// Whether what is printed on it is among what is printed on stderr: the same terminal, file or pipe.
    pub(super) fn is_stderr(self) -> bool {
        let (stdout, stderr) = (io::stdout(), io::stderr());
        if self == Self::Stderr || stdout.is_terminal() && stderr.is_terminal() {
            return true;
        }
        let identity = |fd: BorrowedFd<'_>| fstat(fd).map(|found| (found.st_dev, found.st_ino));
        matches!((identity(stdout.as_fd()), identity(stderr.as_fd())), (Ok(a), Ok(b)) if a == b)
    }
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

//! Lines on the serial port, and the ports that end the machine or mark a moment.

use core::fmt::{self, Write};
use core::hint::spin_loop;
use core::sync::atomic::{AtomicBool, Ordering};

use super::service;

const SERIAL: u16 = 0x3F8;
const MARK: u16 = 0x502;
const EXIT: u16 = 0x501;
/// The longest line, in bytes.
const LINE_BYTES_MAX: usize = 2048;
/// Looks at the lock before a line is written over another one: better than none.
const PATIENCE: u32 = 100_000_000;

static WRITING: AtomicBool = AtomicBool::new(false);

/// A line that is written as a whole. What does not fit is cut off.
pub struct Line {
    bytes: [u8; LINE_BYTES_MAX],
    len: usize,
}

impl Line {
    /// An empty line.
    #[must_use]
    pub const fn new() -> Self {
        Self { bytes: [0; LINE_BYTES_MAX], len: 0 }
    }

    fn send(&mut self) {
        let len = self.len.min(LINE_BYTES_MAX - 1);
        self.bytes[len] = b'\n';
        let mut looks = 0;
        while WRITING.swap(true, Ordering::Acquire) && looks < PATIENCE {
            looks += 1;
            spin_loop();
        }
        service::out_bytes(SERIAL, &self.bytes[..=len]);
        WRITING.store(false, Ordering::Release);
    }
}

impl Default for Line {
    fn default() -> Self {
        Self::new()
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = (self.len + text.len()).min(LINE_BYTES_MAX);
        self.bytes[self.len..end].copy_from_slice(&text.as_bytes()[..end - self.len]);
        self.len = end;
        Ok(())
    }
}

/// Writes one line.
pub fn print(what: &dyn fmt::Display) {
    let mut line = Line::new();
    let _ = write!(line, "{what}");
    line.send();
}

/// Ends the machine with a status: 0 if all went well.
pub fn exit(status: u8) -> ! {
    service::out8(EXIT, status);
    super::rest()
}

/// A moment that a monitor can take its counters at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// The measured part begins.
    Begin = 1,
    /// It has ended.
    End = 2,
}

/// Tells the monitor.
pub fn mark(mark: Mark) {
    service::out8(MARK, mark as u8);
}

//! The last words of a kernel on its console, and whether they tell of a panic.
//!
//! A kernel tells the machine's panic device when it panics, if it has a driver for that; one that has not come far has
//! none, resets the machine, and is told from one that was rebooted by what it printed.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm::Sink;

/// What Linux says. A trace of what was called follows, and perhaps that it will reboot.
const PANIC: &[u8] = b"Kernel panic - not syncing";
/// Enough for that. What a user read on the console a while ago is no panic of this kernel.
const TAIL_BYTES: usize = 16 << 10;

/// The end of what was printed.
#[derive(Default)]
pub(super) struct ConsoleTail(Mutex<VecDeque<u8>>);

impl ConsoleTail {
    /// A sink for a console that remembers the end of what it passes on.
    pub(super) fn behind(self: Arc<Self>, sink: Sink) -> Sink {
        Box::new(Remembering { sink, tail: self })
    }

    /// Whether it tells of a panic.
    pub(super) fn tells_of_panic(&self) -> bool {
        self.lock().make_contiguous().windows(PANIC.len()).any(|bytes| bytes == PANIC)
    }

    fn push(&self, bytes: &[u8]) {
        let mut tail = self.lock();
        tail.extend(bytes);
        let before = tail.len().saturating_sub(TAIL_BYTES);
        tail.drain(..before);
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Remembering {
    sink: Sink,
    tail: Arc<ConsoleTail>,
}

impl Write for Remembering {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.tail.push(bytes);
        self.sink.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_found_at_the_end_of_a_console_and_only_there() {
        let tail = Arc::new(ConsoleTail::default());
        let mut sink = tail.clone().behind(Box::new(io::sink()));
        sink.write_all(b"[    0.5] Kernel panic - not syn").unwrap();
        assert!(!tail.tells_of_panic());
        sink.write_all(b"cing: VFS: Unable to mount root fs\n").unwrap();
        sink.write_all(&[b'x'; TAIL_BYTES / 2]).unwrap();
        assert!(tail.tells_of_panic());
        sink.write_all(&[b'x'; TAIL_BYTES]).unwrap();
        assert!(!tail.tells_of_panic() && tail.lock().len() == TAIL_BYTES);
    }
}

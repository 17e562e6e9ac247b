//! COM1: a 16550, the guest's console. What it prints goes to a sink, what it is typed comes from whoever calls.

use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::Handler;

/// Where the guest's console goes. A sink that blocks blocks the virtual CPU that prints.
pub type Sink = Box<dyn Write + Send>;

/// An interrupt line that an event raises for a moment.
struct Line(EventFd);

impl Trigger for Line {
    type E = std::io::Error;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.write(1)
    }
}

/// A serial port.
pub(crate) struct Console(Mutex<Serial<Line, vm_superio::serial::NoEvents, Sink>>);

impl Console {
    /// `line` is what raises its interrupt.
    pub(crate) fn new(line: EventFd, sink: Sink) -> Self {
        Self(Mutex::new(Serial::new(Line(line), sink)))
    }

    /// Types as much of `bytes` as its buffer takes, and says how much that was.
    pub(crate) fn input(&self, bytes: &[u8]) -> usize {
        let mut serial = self.lock();
        let room = serial.fifo_capacity();
        serial.enqueue_raw_bytes(&bytes[..bytes.len().min(room)]).unwrap_or(0)
    }

    fn lock(&self) -> MutexGuard<'_, Serial<Line, vm_superio::serial::NoEvents, Sink>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Handler for Console {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut serial = self.lock();
        data.iter_mut().for_each(|byte| *byte = serial.read(offset as u8));
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut serial = self.lock();
        for &byte in data {
            // A sink that fails or an interrupt that is pending anyway: nothing a serial port could do about it.
            let _ = serial.write(offset as u8, byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn console(sink: &Shared) -> Console {
        Console::new(EventFd::new(0).unwrap(), Box::new(sink.clone()))
    }

    #[test]
    fn what_the_guest_prints_reaches_the_sink_in_order() {
        let sink = Shared::default();
        let console = console(&sink);
        console.write(0, b"by string instruction\n");
        console.write(0, b"x");
        assert_eq!(*sink.0.lock().unwrap(), b"by string instruction\nx");
    }

    #[test]
    fn what_is_typed_can_be_read_and_no_more_than_fits_is_taken() {
        let console = console(&Shared::default());
        let mut byte = [0];
        console.read(5, &mut byte);
        assert_eq!(byte[0] & 1, 0, "no data");
        let taken = console.input(&[b'a'; 1000]);
        assert!((1..1000).contains(&taken));
        assert_eq!(console.input(b"b"), 0);
        console.read(5, &mut byte);
        assert_eq!(byte[0] & 1, 1, "data ready");
        console.read(0, &mut byte);
        assert_eq!(byte, *b"a");
    }
}

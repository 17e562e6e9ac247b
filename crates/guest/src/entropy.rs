//! virtio-rng, driver side (virtio 1.2, section 5.4): one request at a time, polled.

use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use virtio::memory::{Area, MemoryError};
use virtio::ring::Buffer;
use virtio::{GuestAddr, RingError, RingFormat};

use crate::machine::clock::Clock;
use crate::machine::patience::{DEVICE_SECONDS, Patience};
use crate::machine::{Machine, heap};
use crate::pci::Function;
use crate::virtio_pci::{self, Queue, RingFeatures, Transport, TransportError};

const DEVICE_ID: u16 = 4;
/// Few descriptors do for one request.
const RING_SIZE_MAX: u16 = 16;
const WORD_BYTES: usize = 8;
/// Bytes of a request.
pub const REQUEST_BYTES: u32 = 4096;

/// Why there is no entropy.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are the values named in each message")]
pub enum EntropyError {
    /// The device does not work.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// Not mapped.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The device broke the ring.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// It gives nothing.
    #[error("a request did not come back for {DEVICE_SECONDS} s")]
    Stuck,
    /// It says that it wrote what it did not write, or nothing.
    #[error("of {said} bytes that it says it wrote, those from {from} on are zeros")]
    Zeros { said: u32, from: usize },
}

/// An entropy device that is running.
pub struct EntropySource {
    transport: Transport,
    queue: Queue,
    data: Area,
    at: GuestAddr,
    clock: Clock,
    kicks: u64,
}

/// The entropy devices of this machine, in the order of the bus.
#[must_use]
pub fn find() -> Vec<Function> {
    virtio_pci::find(DEVICE_ID)
}

impl EntropySource {
    /// Resets the device and starts it.
    ///
    /// # Errors
    /// See [`EntropyError`].
    pub fn open(machine: &Machine, function: Function) -> Result<Self, EntropyError> {
        let transport = Transport::new(function, machine.clock)?;
        transport.negotiate(0)?;
        let features = RingFeatures { format: RingFormat::Split, event_idx: false, indirect: false };
        let queue = transport.queue(&machine.memory, 0, RING_SIZE_MAX, features, None)?;
        transport.start();
        let at = heap::take(REQUEST_BYTES as usize, 4096);
        let data = machine.memory.area(at, REQUEST_BYTES as usize, WORD_BYTES)?;
        Ok(Self { transport, queue, data, at, clock: machine.clock, kicks: 0 })
    }

    /// Asks for [`REQUEST_BYTES`] and waits for them; how many there were.
    ///
    /// # Errors
    /// See [`EntropyError`].
    pub fn fill(&mut self) -> Result<u32, EntropyError> {
        let words = (0..REQUEST_BYTES as usize).step_by(WORD_BYTES);
        words.for_each(|at| self.data.u64(at).store(0, Ordering::Relaxed));
        let ring = &mut self.queue.ring;
        // The ring is empty: there is room.
        let _ = ring.add(&[Buffer { addr: self.at, len: REQUEST_BYTES, writable: true }]);
        ring.publish();
        if ring.needs_kick() {
            self.kicks += 1;
            self.queue.kick();
        }
        let mut done = Ok(None);
        let came = Patience::with_device(self.clock).spin_until(|| {
            done = self.queue.ring.reap();
            !matches!(done, Ok(None))
        });
        let done = done?.filter(|_| came).ok_or(EntropyError::Stuck)?;
        self.check(done.written)
    }

    /// Eight random bytes are all zero once in 10^19 times; a device that writes nothing leaves them so.
    fn check(&self, said: u32) -> Result<u32, EntropyError> {
        let written = said.min(REQUEST_BYTES) as usize;
        let mut words = (0..written / WORD_BYTES * WORD_BYTES).step_by(WORD_BYTES);
        let zeros = words.find(|&at| self.data.u64(at).load(Ordering::Relaxed) == 0);
        match zeros {
            None if written > 0 => Ok(said),
            zeros => Err(EntropyError::Zeros { said, from: zeros.unwrap_or(0) }),
        }
    }

    /// Notifications so far.
    #[must_use]
    pub fn kicks(&self) -> u64 {
        self.kicks
    }

    /// Stops the device.
    ///
    /// # Errors
    /// It does not stop.
    pub fn close(self) -> Result<(), EntropyError> {
        Ok(self.transport.reset()?)
    }
}

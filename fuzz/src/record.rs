//! A front end that writes the record of requests in flight and a driver that writes the ring, while a device takes and
//! gives back chains, dies, and is followed by another.

use std::sync::Arc;

use virtio::fake::{FakeDriver, FakeOptions};
use virtio::memory::{Area, Backing, Mapping};
use virtio::ring::{RingFormat, Token, Used};
use virtio::{Inflight, Queue};

use crate::input::Input;
use crate::ring::{MEMORY_BYTES, take, write};

/// Runs one input: options, then a program of writes, device steps and deaths.
///
/// # Panics
/// A chain is lost, or a buffer lies outside guest memory: a bug.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let choice = input.u8();
    let (format, size) = match choice & 1 {
        0 => (RingFormat::Split, 1 << (choice >> 5)),
        _ => (RingFormat::Packed, 1 + u16::from(choice >> 4)),
    };
    let options = FakeOptions {
        format,
        size,
        event_idx: choice & 2 != 0,
        in_order: choice & 4 != 0,
        memory_bytes: MEMORY_BYTES,
        ..FakeOptions::default()
    };
    let mut fake = FakeDriver::new(options);
    let bytes = Inflight::bytes(format, size);
    let record = Arc::new(Mapping::anonymous("fuzz-record", bytes as u64).expect("memory for a record").0);
    let buffers = [fake.readable(&[1; 16]), fake.writable(16)];
    let mut held: Vec<Token> = Vec::new();
    let mut queue = open(&fake, &record, format);
    while !input.is_empty() {
        match (input.u8() % 10, &mut queue) {
            (0, _) => write(&fake, input.u16() % 1024, &mut input),
            (1 | 2, _) => spoil(&record, &mut input),
            (3 | 4, _) => {
                fake.ring.add(&buffers[usize::from(input.u8()) % 2..]);
                fake.ring.publish();
            }
            (5, Some(queue)) => take(queue, input.u8().into(), &mut held, &fake),
            (6, Some(queue)) if !held.is_empty() => {
                let token = held.swap_remove(usize::from(input.u8()) % held.len());
                queue.complete(std::iter::once(Used { token, written: input.u16().into() }));
            }
            (7, Some(queue)) => queue.publish(),
            (8, _) => {
                held.clear();
                queue = open(&fake, &record, format);
            }
            // What a broken device gives back the driver refuses.
            _ => drop(fake.ring.reap()),
        }
    }
    if let Some(mut queue) = queue {
        queue.complete(held.drain(..).map(|token| Used { token, written: 0 }));
        queue.publish();
        assert_eq!(queue.in_flight(), 0);
    }
}

/// A device with what the last one left; None if it refuses that.
fn open(fake: &FakeDriver, record: &Arc<Mapping>, format: RingFormat) -> Option<Queue> {
    let mut config = fake.queue_config();
    config.inflight = Some(Inflight::new(format, record.clone(), 0, config.ring.size).ok()?);
    Queue::new(config).ok().map(|(queue, _)| queue)
}

/// The front end writes a byte or two of the record.
fn spoil(record: &Arc<Mapping>, input: &mut Input<'_>) {
    let area = Area::new(record.clone(), 0, record.len(), 8).expect("the record's own bytes");
    let at = usize::from(input.u16()) % record.len();
    area.u8(at).store(input.u8(), std::sync::atomic::Ordering::Relaxed);
}

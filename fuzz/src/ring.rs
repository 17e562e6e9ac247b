//! A driver that writes anything anywhere in its memory while a device takes and gives back chains.

use virtio::fake::{FakeDriver, FakeOptions, MEMORY_START};
use virtio::memory::total_len;
use virtio::ring::{RingFormat, Token, Used};
use virtio::{GuestAddr, Queue};

use crate::input::Input;

pub(crate) const MEMORY_BYTES: u64 = 64 << 10;

/// Runs one input: options, then a program of driver writes and device steps.
///
/// # Panics
/// A chain is lost, or a buffer lies outside guest memory: a bug.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let choice = input.u8();
    let packed = choice & 1 != 0;
    let options = FakeOptions {
        format: if packed { RingFormat::Packed } else { RingFormat::Split },
        size: if packed { 1 + u16::from(choice >> 4) } else { 1 << (choice >> 5) },
        event_idx: choice & 2 != 0,
        in_order: choice & 4 != 0,
        memory_bytes: MEMORY_BYTES,
        regions: if choice & 8 != 0 { 2 } else { 1 },
        device_features: 0,
    };
    let fake = FakeDriver::new(options);
    let (mut queue, handle) = fake.queue();
    let mut held: Vec<Token> = Vec::new();
    while !input.is_empty() {
        match input.u8() % 8 {
            // The driver writes into the ring, or anywhere.
            0..=2 => write(&fake, input.u16() % 1024, &mut input),
            3 => write(&fake, input.u16(), &mut input),
            4 => take(&mut queue, input.u8().into(), &mut held, &fake),
            5 if !held.is_empty() => {
                let token = held.swap_remove(usize::from(input.u8()) % held.len());
                queue.complete(std::iter::once(Used { token, written: input.u16().into() }));
            }
            6 => queue.publish(),
            _ => {
                queue.arm();
                queue.disarm();
            }
        }
    }
    queue.complete(held.drain(..).map(|token| Used { token, written: 0 }));
    queue.publish();
    assert_eq!(queue.in_flight(), 0);
    assert_eq!(handle.error().is_some(), queue.is_broken());
    drop(queue);
    assert!(handle.stopped_at().is_some());
}

pub(crate) fn write(fake: &FakeDriver, offset: u16, input: &mut Input<'_>) {
    let len = usize::from(input.u8() % 32).min((MEMORY_BYTES - u64::from(offset)) as usize);
    fake.write(GuestAddr(MEMORY_START + u64::from(offset)), input.bytes(len));
}

pub(crate) fn take(queue: &mut Queue, max: usize, held: &mut Vec<Token>, fake: &FakeDriver) {
    let before = held.len();
    queue.pop(max, held);
    assert!(queue.in_flight() <= usize::from(queue.size()));
    for token in &held[before..] {
        let chain = queue.chain(token);
        assert!(total_len(chain.readable) + total_len(chain.writable) <= 1024 * MEMORY_BYTES);
        for segment in chain.readable.iter().chain(chain.writable) {
            let inside = fake.memory().regions().iter().any(|region| {
                let start = region.backing().base().as_ptr().addr();
                let at = segment.as_ptr().addr();
                at >= start && at + segment.len() <= start + region.len() as usize
            });
            assert!(inside, "a buffer outside guest memory");
        }
        for segment in chain.writable {
            segment.write(segment.len() - 1, &[0xa5]);
        }
    }
}

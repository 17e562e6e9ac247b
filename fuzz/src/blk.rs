//! A driver that sends any request to a disk that keeps nothing, or sound ones to a slow disk (`ranges`).

use std::sync::Arc;

use blk::backends::null::Null;
use blk::{Blk, Options};
use reactor::{Budget, Ticks};
use virtio::Device;
use virtio::fake::{FakeDriver, FakeOptions};
use virtio::ring::{Buffer, RingFormat};

use crate::input::Input;
use crate::ranges;

/// Runs one input: features, then requests of any header, data and cut into buffers.
///
/// # Panics
/// A request does not come back, or the device breaks its own ring: a bug.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let choice = input.u8();
    if choice & 0x80 != 0 {
        return ranges::run(&mut input);
    }
    let options = Options { read_only: choice & 1 != 0, serial: "fuzz".to_owned(), ..Options::default() };
    let disk = Blk::new(Arc::new(Null::new(1 << 20)), options).expect("the options are allowed");
    let mut fake = FakeDriver::new(FakeOptions {
        format: if choice & 2 != 0 { RingFormat::Packed } else { RingFormat::Split },
        size: 16,
        // 64 requests of at most 4 buffers of 2 KiB.
        memory_bytes: 1 << 20,
        device_features: if choice & 4 != 0 { disk.features() } else { 0 },
        ..FakeOptions::default()
    });
    let _ = disk.write_config(u32::from(input.u8()), input.bytes(1));
    let (queue, handle) = fake.queue();
    let mut poller = (disk.start_queue(queue).expect("it needs nothing"))();
    let mut requests = 0;
    while !input.is_empty() && requests < 64 {
        let buffers = buffers(&mut fake, &mut input);
        fake.offer(&buffers, input.u8() & 1 != 0);
        fake.run(&mut *poller, 1);
        requests += 1;
    }
    assert_eq!(handle.error(), None, "the ring was sound");
    while !poller.drain(Ticks(u64::MAX)) {
        poller.poll(Ticks(u64::MAX), Budget { requests: 1, bytes: 1 });
    }
}

/// One to four readable and writable buffers; the readable ones begin with what the input says.
fn buffers(fake: &mut FakeDriver, input: &mut Input<'_>) -> Vec<Buffer> {
    let cut = input.u8();
    let mut buffers = Vec::new();
    for _ in 0..cut & 3 {
        let len = usize::from(input.u8() % 49);
        let data = input.bytes(len);
        if !data.is_empty() {
            buffers.push(fake.readable(data));
        }
    }
    for _ in 0..1 + (cut >> 2 & 3) {
        let len = usize::from(input.u8()) * if cut & 0x80 != 0 { 8 } else { 1 };
        buffers.push(fake.writable(len.max(1)));
    }
    buffers
}

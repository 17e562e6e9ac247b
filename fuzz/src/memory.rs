//! Memory tables of many regions, some of a few bytes, and chains whose buffers lie across them.

use std::sync::Arc;

use virtio::fake::{FakeDriver, FakeOptions, MEMORY_START};
use virtio::memory::{DirtyLog, Mapping, Memory, Region};
use virtio::ring::{RingFormat, SEGMENTS_PER_CHAIN_MAX, Used};
use virtio::{GuestAddr, UsedLog};

use crate::input::Input;

/// The first region: a ring, a table and more than the driver's end asks for.
const FIRST_BYTES: u64 = 0x4000;
const TABLE_AT: u64 = MEMORY_START + 0x2000;
const REGIONS_MAX: usize = 509;

/// Runs one input: the regions behind the first, then a table of descriptors.
///
/// # Panics
/// A chain has more segments than are allowed, or a segment is not where its guest address says: a bug.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let choice = input.u8();
    let format = if choice & 1 != 0 { RingFormat::Packed } else { RingFormat::Split };
    let regions = 1 + usize::from(input.u16()) % REGIONS_MAX;
    let mut end = MEMORY_START;
    let regions = (0..regions).map(|index| {
        let bytes = match (index, input.u8()) {
            (0, _) => FIRST_BYTES,
            (_, byte) if choice & 2 != 0 => 1 + u64::from(byte),
            (_, byte) => 4096 << (byte & 1),
        };
        let mapping = Mapping::anonymous("fuzz-region", bytes).expect("memory for a region").0;
        let region = Region::new(GuestAddr(end), Arc::new(mapping)).expect("a region");
        end += bytes;
        region
    });
    let memory = Memory::new(regions.collect()).expect("regions side by side");
    let options = FakeOptions { format, size: 8, memory_bytes: FIRST_BYTES, ..FakeOptions::default() };
    let mut fake = FakeDriver::in_memory(options, memory);
    let mut config = fake.queue_config();
    let bits = Mapping::anonymous("fuzz-log", 4096).expect("memory for a log").0;
    let log = DirtyLog::new(Arc::new(bits), 0, 4096).expect("a log");
    config.log = Some(UsedLog { log, used_ring: Some(config.ring.device) });
    let (mut queue, _) = virtio::Queue::new(config).expect("the fake guest's ring is sound");

    let descriptors = 1 + u64::from(input.u16()) % 512;
    let pieces: Vec<[u8; 16]> = (0..descriptors)
        .map(|index| {
            let at = MEMORY_START + u64::from(input.u16()) * 32 % (end - MEMORY_START);
            let (len, last) = (u32::from(input.u16()) << (input.u8() % 8), index + 1 == descriptors);
            let flags = u64::from(!last) | u64::from(input.u8() & 0x80 != 0) << 1;
            let high = match format {
                RingFormat::Split => u64::from(len) | flags << 32 | (index + 1) << 48,
                RingFormat::Packed => u64::from(len) | flags << 48,
            };
            (u128::from(at) | u128::from(high) << 64).to_le_bytes()
        })
        .collect();
    fake.write(GuestAddr(TABLE_AT), pieces.as_flattened());
    // The device's end alone looks at the table: the driver's writes one of its own, which is replaced.
    let whole = virtio::ring::Buffer { addr: GuestAddr(TABLE_AT), len: 16, writable: false };
    let table = fake.area(GuestAddr(TABLE_AT), 16 * pieces.len());
    fake.ring.add_indirect(&table, GuestAddr(TABLE_AT), &vec![whole; pieces.len()]);
    fake.write(GuestAddr(TABLE_AT), pieces.as_flattened());
    fake.ring.publish();
    let mut tokens = Vec::new();
    queue.pop(1, &mut tokens);
    for token in &tokens {
        let chain = queue.chain(token);
        assert!(chain.readable.len() + chain.writable.len() <= SEGMENTS_PER_CHAIN_MAX as usize);
        for segment in chain.readable.iter().chain(chain.writable) {
            let at = fake.memory().guest_addr(segment.as_ptr()).expect("a buffer in guest memory");
            assert!(at.0 + segment.len() as u64 <= end, "a buffer outside guest memory");
        }
    }
    queue.complete(tokens.into_iter().map(|token| Used { token, written: 0 }));
    queue.publish();
}

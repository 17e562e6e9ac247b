//! KVM's binary statistics of one virtual CPU: exits by reason, counted by the kernel.
//!
//! The kernel describes what it counts: a header, a descriptor per statistic, the values (Documentation/virt/kvm/api.rst,
//! 4.133). The description is read once, the values in one read as often as somebody asks. The file is the kernel's,
//! but it is parsed like anybody's: sizes and offsets are checked, and what makes no sense is left out.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// `flags`, `name_size`, `num_desc`, `id_offset`, `desc_offset`, `data_offset`: six 32-bit words.
const HEADER_BYTES: usize = 24;
/// A descriptor without its name: `flags` (32), `exponent`, `size` (16 each), `offset`, `bucket_size` (32 each).
const DESCRIPTOR_BYTES: usize = 16;
/// Far more than any kernel has.
const STATISTICS_MAX: u32 = 4096;
const NAME_BYTES_MAX: u32 = 256;
const DATA_BYTES_MAX: usize = 1 << 20;
/// `KVM_STATS_TYPE_MASK`, and the type of numbers that only grow.
const TYPE_MASK: u32 = 0xF;
const TYPE_CUMULATIVE: u32 = 0;

/// Values by name.
pub type Values = BTreeMap<Arc<str>, u64>;

/// A counter, and which of the 64-bit words it is.
struct Counter {
    name: Arc<str>,
    word: usize,
}

/// The counters of one virtual CPU.
pub(crate) struct Binary {
    file: File,
    data_offset: u64,
    words: usize,
    counters: Vec<Counter>,
}

impl Binary {
    /// Reads the description. None if it cannot be made sense of.
    pub(crate) fn open(file: File) -> Option<Self> {
        let mut header = [0; HEADER_BYTES];
        file.read_exact_at(&mut header, 0).ok()?;
        let word = |index: usize| u32_at(&header, index * 4);
        let (name_size, count) = (word(1)?, word(2)?);
        let (desc_offset, data_offset) = (u64::from(word(4)?), u64::from(word(5)?));
        if count > STATISTICS_MAX || name_size > NAME_BYTES_MAX {
            return None;
        }
        let size = DESCRIPTOR_BYTES + name_size as usize;
        let mut descriptors = vec![0; size * count as usize];
        file.read_exact_at(&mut descriptors, desc_offset).ok()?;
        let counters: Vec<_> = descriptors.chunks_exact(size).filter_map(counter).collect();
        let words = counters.iter().map(|counter| counter.word + 1).max().unwrap_or(0);
        Some(Self { file, data_offset, words, counters })
    }

    /// The counters now. None if the kernel does not say.
    pub(crate) fn read(&self) -> Option<Values> {
        let mut data = vec![0; self.words * 8];
        self.file.read_exact_at(&mut data, self.data_offset).ok()?;
        let value =
            |word: usize| Some(u64::from_le_bytes(data.get(word * 8..word * 8 + 8)?.try_into().ok()?));
        let pair = |counter: &Counter| Some((counter.name.clone(), value(counter.word)?));
        Some(self.counters.iter().filter_map(pair).collect())
    }
}

/// The counter that a descriptor describes, if it is one: a single number that only grows.
fn counter(descriptor: &[u8]) -> Option<Counter> {
    let flags = u32_at(descriptor, 0)?;
    let values = u16::from_le_bytes(descriptor.get(6..8)?.try_into().ok()?);
    let offset = u32_at(descriptor, 8)? as usize;
    let name = descriptor.get(DESCRIPTOR_BYTES..)?;
    let name = std::str::from_utf8(name.split(|&byte| byte == 0).next()?).ok()?;
    let plain = flags & TYPE_MASK == TYPE_CUMULATIVE && values == 1 && !name.is_empty();
    let placed = offset.is_multiple_of(8) && offset < DATA_BYTES_MAX;
    (plain && placed).then(|| Counter { name: name.into(), word: offset / 8 })
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    fn file(bytes: &[u8]) -> File {
        let fd = rustix::fs::memfd_create("statistics", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(fd);
        file.write_all(bytes).unwrap();
        file
    }

    fn descriptor(flags: u32, values: u16, offset: u32, name: &[u8; 16]) -> Vec<u8> {
        let mut bytes = flags.to_le_bytes().to_vec();
        bytes.extend([0; 2]);
        bytes.extend(values.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(name);
        bytes
    }

    #[test]
    fn counters_are_found_by_name_and_other_statistics_left_out() {
        let descriptors = [
            descriptor(0, 1, 8, b"exits\0\0\0\0\0\0\0\0\0\0\0"),
            descriptor(1, 1, 0, b"instant\0\0\0\0\0\0\0\0\0"),
            descriptor(0, 2, 0, b"histogram\0\0\0\0\0\0\0"),
            descriptor(0, 1, 4, b"unaligned\0\0\0\0\0\0\0"),
            descriptor(0, 1, 16, b"sixteen_letters_"),
        ];
        let mut bytes = Vec::new();
        for word in [0u32, 16, descriptors.len() as u32, 24, 24, 24 + 5 * 32] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(descriptors.concat());
        for value in [7u64, 11, 13] {
            bytes.extend(value.to_le_bytes());
        }
        let values = Binary::open(file(&bytes)).unwrap().read().unwrap();
        let expected: Values = [("exits".into(), 11), ("sixteen_letters_".into(), 13)].into();
        assert_eq!(values, expected);
    }

    proptest! {
        #[test]
        fn no_file_is_too_strange(mut bytes in prop::collection::vec(any::<u8>(), 0..400), small in any::<bool>()) {
            if small {
                // Numbers that are small enough to get past the first checks.
                bytes.iter_mut().take(24).enumerate().for_each(|(i, b)| if i % 4 > 0 { *b = 0 });
            }
            if let Some(binary) = Binary::open(file(&bytes)) {
                let _ = binary.read();
            }
        }
    }
}

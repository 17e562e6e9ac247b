//! Memory by physical address. The first 4 GiB are mapped where they are, so an address is a pointer.
//!
//! All of it may be read and written at any time: the image maps it before Rust code runs, and never takes it away. What
//! of it belongs to the program is reached by addresses only that `heap` gave out for devices, or the image names.
#![allow(unsafe_code)]

use alloc::sync::Arc;
use alloc::vec;
use core::ptr::{NonNull, with_exposed_provenance_mut};
use core::sync::atomic::Ordering;

use virtio::memory::{Area, Backing};
use virtio::{GuestAddr, Memory, MemoryError, Region};

/// The first bytes are left out: no pointer may be null. Loaders do put tables into the rest of page 0.
const FIRST: u64 = 16;
/// Where the identity map ends, as `image/boot.s` lays it out.
pub(super) const IDENTITY_END: u64 = 1 << 32;

struct Identity;

// SAFETY: see the header.
unsafe impl Backing for Identity {
    fn base(&self) -> NonNull<u8> {
        NonNull::new(with_exposed_provenance_mut(FIRST as usize)).unwrap_or(NonNull::dangling())
    }

    fn len(&self) -> usize {
        (IDENTITY_END - FIRST) as usize
    }
}

/// All memory below 4 GiB, for rings and buffers.
///
/// # Errors
/// None that can happen: one region that is not empty.
pub fn memory() -> Result<Memory, MemoryError> {
    Memory::new(vec![Region::new(GuestAddr(FIRST), Arc::new(Identity))?])
}

/// Tables in memory that others wrote: words at any address, or None outside of what is mapped.
pub struct Tables {
    area: Area,
    first: u64,
}

impl Tables {
    /// The tables below 4 GiB.
    ///
    /// # Errors
    /// None that can happen.
    pub fn new(memory: &Memory) -> Result<Self, MemoryError> {
        let region = memory.regions().first().ok_or(MemoryError::TooManyRegions(0))?;
        let (start, len) = (region.start(), region.len() as usize);
        Ok(Self { area: memory.area(start, len, 1)?, first: start.0 })
    }

    /// The byte at an address.
    #[must_use]
    pub fn byte(&self, at: u64) -> Option<u8> {
        let offset = usize::try_from(at.checked_sub(self.first)?).ok()?;
        (offset < self.area.len()).then(|| self.area.u8(offset).load(Ordering::Relaxed))
    }

    /// A little-endian number of up to 8 bytes at an address.
    #[must_use]
    pub fn number(&self, at: u64, bytes: u32) -> Option<u64> {
        (0..bytes).try_fold(0, |number, i| {
            let byte = self.byte(at.checked_add(i.into())?)?;
            Some(number | u64::from(byte) << (8 * i))
        })
    }

    /// Four bytes, as most fields of tables have.
    #[must_use]
    pub fn word(&self, at: u64) -> Option<u32> {
        self.number(at, 4).map(|word| word as u32)
    }
}

/// Tables for tests, at a physical address.
#[cfg(test)]
pub(crate) fn sample(start: u64, bytes: &[u8]) -> Tables {
    struct Bytes(std::boxed::Box<[u64]>, usize);
    // SAFETY: the words live as long as the value, and nothing but tables is read there.
    unsafe impl Backing for Bytes {
        fn base(&self) -> NonNull<u8> {
            NonNull::from(&*self.0).cast()
        }
        fn len(&self) -> usize {
            self.1
        }
    }
    let words = bytes.chunks(8).map(|chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_le_bytes(word)
    });
    let backing = Bytes(words.collect(), bytes.len());
    let memory = Memory::new(vec![Region::new(GuestAddr(start), Arc::new(backing)).unwrap()]).unwrap();
    Tables::new(&memory).unwrap()
}

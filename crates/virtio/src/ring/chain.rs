//! Descriptor chains, from the ring's descriptors to checked segments.
//!
//! A chain taken from the ring occupies a slot of [`Chains`] until it is completed. The [`Token`] that names the slot
//! cannot be copied: whoever holds it owns the request, and giving it back is completing it.

#[cfg(all(test, feature = "std"))]
mod tests;

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

use smallvec::SmallVec;

use crate::memory::{Memory, Segment, Translator, gather};

use super::descriptor::{Descriptor, INDIRECT, NEXT, WRITE};
use super::layout::DESC_BYTES;
use super::{RingConfig, RingError};

/// The most chains taken from a ring at once.
pub const CHAINS_PER_BURST_MAX: usize = 64;

/// The most descriptors in one chain, indirect ones included. The same limit as QEMU's (`VIRTQUEUE_MAX_SIZE`) and
/// the kernel's for one vectored request (`UIO_MAXIOV`), so a chain is always one system call's worth.
pub const DESCRIPTORS_PER_CHAIN_MAX: u32 = 1024;

/// The most segments in one chain. A buffer that crosses from one memory region into the next is two, so a chain with as
/// many descriptors as are allowed can have no such buffer; drivers that keep to a device's `seg_max` are far below.
/// Without the limit, 1024 descriptors over 509 regions each would be half a million.
pub const SEGMENTS_PER_CHAIN_MAX: u32 = 1024;

/// Segments that each slot has room for from the start.
const SEGMENTS_START: usize = 4;
/// The most segments that a slot keeps room for when its chain is completed. A request of 256 KiB in single pages still
/// finds room; the longest chains in all slots leave none behind (they take 16 KiB each).
const SEGMENTS_KEPT_MAX: usize = 64;

/// The right and the duty to complete one chain. Dropping it instead leaves the chain in flight for good.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a chain stays in flight until its token is completed"]
pub struct Token(u16);

impl Token {
    /// The slot, below the ring's size: an index for a table of what the device knows about the request.
    #[inline(always)]
    #[must_use]
    pub fn slot(&self) -> usize {
        usize::from(self.0)
    }
}

/// A chain given back to the driver.
#[derive(Debug)]
pub struct Used {
    /// The chain.
    pub token: Token,
    /// Bytes written to its device-writable part, from the start.
    pub written: u32,
}

/// The buffers of one chain.
#[derive(Clone, Copy, Debug)]
pub struct Chain<'a> {
    /// What the device reads, in order.
    pub readable: &'a [Segment],
    /// What the device writes, in order.
    pub writable: &'a [Segment],
}

/// One chain in flight.
#[derive(Default)]
pub(super) struct Slot {
    /// What names the chain to the driver: head index (split) or buffer id (packed).
    pub(super) id: u16,
    /// Ring descriptors it occupies; only packed rings ask.
    pub(super) descriptors: u16,
    readable: u16,
    segments: Vec<Segment>,
}

impl Slot {
    #[cold]
    #[inline(never)]
    fn shrink(&mut self) {
        self.segments = Vec::with_capacity(SEGMENTS_START);
    }
}

/// The chains of one queue that are in flight, and the memory their segments point into.
pub struct Chains {
    slots: Box<[Slot]>,
    free: Vec<u16>,
    translator: Translator,
    indirect: bool,
}

impl Chains {
    /// Room for as many chains as the ring has descriptors.
    #[must_use]
    pub fn new(config: &RingConfig, memory: Arc<Memory>) -> Self {
        Self {
            slots: (0..config.size)
                .map(|_| Slot { segments: Vec::with_capacity(SEGMENTS_START), ..Slot::default() })
                .collect(),
            free: (0..config.size).rev().collect(),
            translator: Translator::new(memory),
            indirect: config.indirect,
        }
    }

    /// The buffers of a chain.
    #[inline(always)]
    #[must_use]
    pub fn get(&self, token: &Token) -> Chain<'_> {
        self.at(token.slot())
    }

    /// The buffers of the chain in a slot, for a part of a device that its owner has given work on that chain; nothing that
    /// can be relied on if no chain is in flight there.
    #[inline(always)]
    #[must_use]
    pub fn at(&self, slot: usize) -> Chain<'_> {
        let slot = &self.slots[slot];
        let (readable, writable) = slot.segments.split_at(usize::from(slot.readable));
        Chain { readable, writable }
    }

    /// Chains taken and not yet completed.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// The memory map in use.
    #[must_use]
    pub fn memory(&self) -> &Arc<Memory> {
        self.translator.memory()
    }

    /// What names the chain to the driver: head index (split) or buffer id (packed).
    #[inline(always)]
    #[must_use]
    pub fn id(&self, token: &Token) -> u16 {
        self.slot(token).id
    }

    #[inline(always)]
    pub(super) fn slot(&self, token: &Token) -> &Slot {
        &self.slots[token.slot()]
    }

    /// Gives the slot back.
    #[inline(always)]
    pub(super) fn release(&mut self, token: Token) {
        let slot = &mut self.slots[token.slot()];
        if slot.segments.capacity() > SEGMENTS_KEPT_MAX {
            slot.shrink();
        }
        self.free.push(token.0);
    }

    /// Fills a free slot by `walk`, which pushes the chain's descriptors.
    #[inline(always)]
    pub(super) fn take(
        &mut self,
        head: u16,
        walk: impl FnOnce(&mut ChainBuilder<'_>) -> Result<(), RingError>,
    ) -> Result<Token, RingError> {
        let index = self.free.pop().ok_or(RingError::TooManyChains { size: self.slots.len() as u16 })?;
        let slot = &mut self.slots[usize::from(index)];
        slot.segments.clear();
        slot.id = head;
        slot.descriptors = 1;
        slot.readable = 0;
        let mut builder = ChainBuilder {
            slot,
            translator: &mut self.translator,
            indirect: self.indirect,
            head,
            progress: Progress { descriptors: 0, writable: false },
        };
        if let Err(error) = walk(&mut builder) {
            self.release(Token(index));
            return Err(error);
        }
        if let Some(first) = slot.segments.first() {
            first.prefetch();
        }
        Ok(Token(index))
    }
}

/// Collects the descriptors of one chain into its slot, with every check the two formats share.
pub(super) struct ChainBuilder<'a> {
    pub(super) slot: &'a mut Slot,
    translator: &'a mut Translator,
    indirect: bool,
    head: u16,
    progress: Progress,
}

/// How far a chain was followed.
#[derive(Clone, Copy)]
struct Progress {
    descriptors: u32,
    /// Only device-writable buffers may follow.
    writable: bool,
}

impl ChainBuilder<'_> {
    /// Adds a descriptor's buffer, or the table it points to.
    #[inline(always)]
    pub(super) fn push(&mut self, descriptor: Descriptor, flags: u16, packed: bool) -> Result<(), RingError> {
        if flags & INDIRECT != 0 {
            // By value, not by reference: the address of the builder stays unknown, and it in registers.
            let Self { slot, translator, indirect, head, progress } = self;
            let table =
                ChainBuilder { slot, translator, indirect: *indirect, head: *head, progress: *progress };
            *progress = table.push_table(descriptor, flags, packed)?;
            return Ok(());
        }
        self.push_buffer(descriptor, flags & WRITE != 0)
    }

    #[inline(always)]
    fn push_buffer(&mut self, descriptor: Descriptor, writable: bool) -> Result<(), RingError> {
        let head = self.head;
        self.progress.descriptors += 1;
        if self.progress.descriptors > DESCRIPTORS_PER_CHAIN_MAX {
            return Err(RingError::ChainTooLong { head, limit: DESCRIPTORS_PER_CHAIN_MAX });
        }
        if self.progress.writable && !writable {
            return Err(RingError::ReadableAfterWritable { head });
        }
        self.progress.writable = writable;
        let segments = &mut self.slot.segments;
        self.translator
            .translate(descriptor.addr, descriptor.len, |segment| segments.push(segment))
            .map_err(|source| RingError::BadBuffer { head, source })?;
        if segments.len() > SEGMENTS_PER_CHAIN_MAX as usize {
            return Err(RingError::TooManySegments { head, limit: SEGMENTS_PER_CHAIN_MAX });
        }
        if !writable {
            self.slot.readable = self.slot.segments.len() as u16;
        }
        Ok(())
    }

    #[inline(never)]
    fn push_table(mut self, table: Descriptor, flags: u16, packed: bool) -> Result<Progress, RingError> {
        let head = self.head;
        if !self.indirect || flags & NEXT != 0 {
            return Err(RingError::BadIndirect { head });
        }
        let max = DESCRIPTORS_PER_CHAIN_MAX * DESC_BYTES as u32;
        if table.len == 0 || table.len > max || !table.len.is_multiple_of(DESC_BYTES as u32) {
            return Err(RingError::BadIndirectLen { len: table.len, max });
        }
        let mut pieces: SmallVec<[Segment; 2]> = SmallVec::new();
        self.translator
            .translate(table.addr, table.len, |piece| pieces.push(piece))
            .map_err(|source| RingError::BadBuffer { head, source })?;
        let entries = table.len / DESC_BYTES as u32;
        let mut index = 0;
        // Each round adds a descriptor to the count that `push_buffer` limits, so a loop in the table ends.
        loop {
            let entry = read_entry(&pieces, index);
            let flags = if packed { entry.fourth } else { entry.third };
            if flags & INDIRECT != 0 {
                return Err(RingError::BadIndirect { head });
            }
            self.push_buffer(entry, flags & WRITE != 0)?;
            // In a packed ring's table the entries follow each other and NEXT means nothing (section 2.8.8).
            index = match (packed, flags & NEXT != 0) {
                (true, _) if index + 1 == entries => return Ok(self.progress),
                (true, _) => index + 1,
                (false, false) => return Ok(self.progress),
                (false, true) if u32::from(entry.fourth) < entries => u32::from(entry.fourth),
                (false, true) => return Err(RingError::BadNext { head, next: entry.fourth, size: entries }),
            };
        }
    }
}

#[inline(always)]
fn read_entry(pieces: &[Segment], index: u32) -> Descriptor {
    let mut raw = [0; DESC_BYTES];
    let copied = gather(pieces, index as usize * DESC_BYTES, &mut raw);
    debug_assert_eq!(copied, DESC_BYTES, "the caller keeps the index within the table");
    let word = |at: usize| u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|i| raw[at + i]));
    Descriptor::from_words(word(0), word(8))
}

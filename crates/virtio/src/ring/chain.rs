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

use crate::memory::{GuestAddr, Memory, Segment, Translator, gather};

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
    /// To be asked after a buffer of several segments and at the end of a chain. In between, each descriptor adds one, and
    /// their number is limited.
    #[inline(always)]
    fn check(&self, head: u16) -> Result<(), RingError> {
        if self.segments.len() > SEGMENTS_PER_CHAIN_MAX as usize {
            return Err(RingError::TooManySegments { head, limit: SEGMENTS_PER_CHAIN_MAX });
        }
        Ok(())
    }

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

    /// The same by slot, also of a chain that was given back last in it.
    #[cfg(feature = "std")]
    #[inline(always)]
    pub(crate) fn id_in(&self, slot: u16) -> u16 {
        self.slots[usize::from(slot)].id
    }

    #[inline(always)]
    pub(super) fn slot(&self, token: &Token) -> &Slot {
        &self.slots[token.slot()]
    }

    /// Gives the slot back. Returns what names the chain to the driver and how many ring descriptors it occupies.
    #[inline(always)]
    pub(super) fn release(&mut self, token: Token) -> (u16, u16) {
        let slot = &mut self.slots[token.slot()];
        if slot.segments.capacity() > SEGMENTS_KEPT_MAX {
            slot.shrink();
        }
        self.free.push(token.0);
        (slot.id, slot.descriptors)
    }

    /// The slots given back last, `count` of them, the latest last.
    #[cfg(feature = "std")]
    #[inline(always)]
    pub(crate) fn released(&self, count: usize) -> &[u16] {
        &self.free[self.free.len() - count..]
    }

    /// Fills a free slot by `walk`.
    #[inline(always)]
    pub(super) fn take(&mut self, head: u16, walk: impl Walk) -> Result<Token, RingError> {
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
            writable: false,
        };
        if let Err(error) = walk.walk(&mut builder).and_then(|()| slot.check(head)) {
            self.release(Token(index));
            return Err(error);
        }
        if let Some(first) = slot.segments.first() {
            first.prefetch();
        }
        Ok(Token(index))
    }
}

/// Pushes the descriptors of one chain. A closure does, too, but cannot be told to be inlined.
pub(super) trait Walk {
    /// # Errors
    /// The chain is malformed.
    fn walk(self, chain: &mut ChainBuilder<'_>) -> Result<(), RingError>;
}

impl<F: FnOnce(&mut ChainBuilder<'_>) -> Result<(), RingError>> Walk for F {
    fn walk(self, chain: &mut ChainBuilder<'_>) -> Result<(), RingError> {
        self(chain)
    }
}

/// Collects the descriptors of one chain into its slot, with every check the two formats share.
pub(super) struct ChainBuilder<'a> {
    pub(super) slot: &'a mut Slot,
    translator: &'a mut Translator,
    indirect: bool,
    head: u16,
    /// Only device-writable buffers may follow.
    writable: bool,
}

impl ChainBuilder<'_> {
    /// Adds a descriptor's buffer, or the table it points to. `before` counts the chain's descriptors before this one, of
    /// which the caller allows less than [`DESCRIPTORS_PER_CHAIN_MAX`].
    #[inline(always)]
    pub(super) fn push(
        &mut self,
        descriptor: Descriptor,
        flags: u16,
        packed: bool,
        before: u32,
    ) -> Result<(), RingError> {
        if flags & INDIRECT != 0 {
            // By value, not by reference: the address of the builder stays unknown, and it in registers.
            let Self { slot, translator, indirect, head, writable } = self;
            let table =
                ChainBuilder { slot, translator, indirect: *indirect, head: *head, writable: *writable };
            return table.push_table(descriptor.addr, descriptor.len, flags & NEXT != 0, packed, before);
        }
        self.push_buffer(descriptor, flags & WRITE != 0)
    }

    #[inline(always)]
    fn push_buffer(
        &mut self,
        Descriptor { addr, len, .. }: Descriptor,
        writable: bool,
    ) -> Result<(), RingError> {
        let head = self.head;
        if self.writable && !writable {
            return Err(RingError::ReadableAfterWritable { head });
        }
        self.writable = writable;
        match self.translator.translate_whole(addr, len) {
            Some(segment) => self.slot.segments.push(segment),
            None => push_pieces(self.slot, self.translator, addr, len, head)?,
        }
        if !writable {
            self.slot.readable = self.slot.segments.len() as u16;
        }
        Ok(())
    }

    /// Adds the buffers of a table, which must be the end of the chain.
    #[inline(never)]
    fn push_table(
        mut self,
        addr: GuestAddr,
        len: u32,
        continues: bool,
        packed: bool,
        before: u32,
    ) -> Result<(), RingError> {
        let head = self.head;
        if !self.indirect || continues {
            return Err(RingError::BadIndirect { head });
        }
        let max = DESCRIPTORS_PER_CHAIN_MAX * DESC_BYTES as u32;
        if len == 0 || len > max || !len.is_multiple_of(DESC_BYTES as u32) {
            return Err(RingError::BadIndirectLen { len, max });
        }
        let mut pieces: SmallVec<[Segment; 2]> = SmallVec::new();
        self.translator
            .translate(addr, len, |piece| pieces.push(piece))
            .map_err(|source| RingError::BadBuffer { head, source })?;
        let entries = len / DESC_BYTES as u32;
        let mut index = 0;
        for _ in before..DESCRIPTORS_PER_CHAIN_MAX {
            let entry = read_entry(&pieces, index);
            let flags = if packed { entry.fourth } else { entry.third };
            if flags & INDIRECT != 0 {
                return Err(RingError::BadIndirect { head });
            }
            self.push_buffer(entry, flags & WRITE != 0)?;
            // In a packed ring's table the entries follow each other and NEXT means nothing (section 2.8.8).
            index = match (packed, flags & NEXT != 0) {
                (true, _) if index + 1 == entries => return Ok(()),
                (true, _) => index + 1,
                (false, false) => return Ok(()),
                (false, true) if u32::from(entry.fourth) < entries => u32::from(entry.fourth),
                (false, true) => return Err(RingError::BadNext { head, next: entry.fourth, size: entries }),
            };
        }
        Err(RingError::ChainTooLong { head, limit: DESCRIPTORS_PER_CHAIN_MAX })
    }
}

/// Adds a buffer that need not be one segment.
#[cold]
#[inline(never)]
fn push_pieces(
    slot: &mut Slot,
    translator: &mut Translator,
    addr: GuestAddr,
    len: u32,
    head: u16,
) -> Result<(), RingError> {
    let push = |segment| slot.segments.push(segment);
    translator.translate(addr, len, push).map_err(|source| RingError::BadBuffer { head, source })?;
    slot.check(head)
}

#[inline(always)]
fn read_entry(pieces: &[Segment], index: u32) -> Descriptor {
    let at = index as usize * DESC_BYTES;
    let whole = pieces.first().and_then(|piece| piece.words(at));
    let [low, high] = whole.unwrap_or_else(|| gather_words(pieces, at));
    Descriptor::from_words(low, high)
}

#[cold]
fn gather_words(pieces: &[Segment], at: usize) -> [u64; 2] {
    let mut raw = [0; DESC_BYTES];
    let copied = gather(pieces, at, &mut raw);
    debug_assert_eq!(copied, DESC_BYTES, "the caller keeps the index within the table");
    [0, 8].map(|at: usize| u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|i| raw[at + i])))
}

//! The driver end of a packed ring (virtio 1.2, section 2.8).

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{Ordering, fence};

use crate::memory::{Area, GuestAddr, Memory};

use super::descriptor::{AVAIL, Descriptor, INDIRECT, NEXT, USED, WRITE};
use super::event::need_packed_event;
use super::layout::{DESC_BYTES, EVENT_BYTES};
use super::packed_device::{EVENT_DESC, EVENT_DISABLE, EVENT_ENABLE, Position};
use super::{Buffer, Completion, RING_SIZE_MAX, RingConfig, RingError};

/// The driver end of a packed ring.
pub struct PackedDriver {
    size: u16,
    ring: Area,
    driver_event: Area,
    device_event: Area,
    event_idx: bool,
    avail: Position,
    used: Position,
    ids: Vec<u16>,
    /// For a chain in flight, by id: how many ring descriptors it has; 0 for none.
    lengths: Box<[u16]>,
    free: u16,
    /// Where the first descriptor that is not published yet has its second word, and that word, which is written last.
    first: Option<(usize, u64)>,
    unkicked: u16,
}

impl PackedDriver {
    /// Lays out a new, empty ring in zeroed memory.
    ///
    /// # Errors
    /// The size is 0 or above 32768, or an area is unaligned or not in `memory`.
    pub fn new(config: &RingConfig, memory: &Memory) -> Result<Self, RingError> {
        let size = config.size;
        if size == 0 || size > RING_SIZE_MAX {
            return Err(RingError::BadSize(size));
        }
        Ok(Self {
            size,
            ring: memory.area(config.desc, usize::from(size) * DESC_BYTES, DESC_BYTES)?,
            driver_event: memory.area(config.driver, EVENT_BYTES, 4)?,
            device_event: memory.area(config.device, EVENT_BYTES, 4)?,
            event_idx: config.event_idx,
            avail: Position { offset: 0, wrap: true },
            used: Position { offset: 0, wrap: true },
            ids: (0..size).rev().collect(),
            lengths: (0..size).map(|_| 0).collect(),
            free: size,
            first: None,
            unkicked: 0,
        })
    }

    pub(super) fn free(&self) -> usize {
        self.free.into()
    }

    #[inline(always)]
    pub(super) fn add(&mut self, buffers: &[Buffer]) -> Option<u16> {
        if buffers.is_empty() || buffers.len() > self.free() {
            return None;
        }
        let id = self.ids.pop()?;
        self.lengths[usize::from(id)] = buffers.len() as u16;
        for (i, buffer) in buffers.iter().enumerate() {
            let next = if i + 1 == buffers.len() { 0 } else { NEXT };
            self.put(buffer.addr, buffer.len, id, if buffer.writable { WRITE } else { 0 } | next);
        }
        Some(id)
    }

    #[inline(always)]
    pub(super) fn add_indirect(&mut self, table: &Area, addr: GuestAddr, buffers: &[Buffer]) -> Option<u16> {
        if buffers.is_empty() || table.len() < buffers.len() * DESC_BYTES || self.free == 0 {
            return None;
        }
        let id = self.ids.pop()?;
        self.lengths[usize::from(id)] = 1;
        for (i, buffer) in buffers.iter().enumerate() {
            let flags = if buffer.writable { WRITE } else { 0 };
            Descriptor { addr: buffer.addr, len: buffer.len, third: 0, fourth: flags }.store(table, i as u16);
        }
        self.put(addr, (buffers.len() * DESC_BYTES) as u32, id, INDIRECT);
        Some(id)
    }

    /// Writes the descriptor at the next position; only its address, if it is the first since the last publication.
    #[inline(always)]
    fn put(&mut self, addr: GuestAddr, len: u32, id: u16, flags: u16) {
        let at = usize::from(self.avail.offset) * DESC_BYTES;
        let flags = flags | if self.avail.wrap { AVAIL } else { USED };
        let (low, high) = Descriptor { addr, len, third: id, fourth: flags }.to_words();
        self.ring.u64(at).store(low, Ordering::Relaxed);
        if self.first.is_none() {
            self.first = Some((at + 8, high));
        } else {
            self.ring.u64(at + 8).store(high, Ordering::Release);
        }
        self.avail.advance(1, self.size);
        self.free -= 1;
        self.unkicked = self.unkicked.saturating_add(1);
    }

    #[inline(always)]
    pub(super) fn publish(&mut self) {
        if let Some((at, high)) = self.first.take() {
            self.ring.u64(at).store(high, Ordering::Release);
        }
    }

    #[inline(always)]
    pub(super) fn needs_kick(&mut self) -> bool {
        let count = core::mem::take(&mut self.unkicked);
        fence(Ordering::SeqCst);
        let event = self.device_event.u32(0).load(Ordering::Relaxed);
        let (off_wrap, flags) = (event as u16, (event >> 16) as u16 & 3);
        match flags {
            EVENT_DISABLE => false,
            EVENT_DESC if self.event_idx => {
                need_packed_event(off_wrap, self.avail.offset, self.avail.wrap, count, self.size)
            }
            _ => true,
        }
    }

    #[inline(always)]
    pub(super) fn reap(&mut self) -> Result<Option<Completion>, RingError> {
        if !self.is_used() {
            return Ok(None);
        }
        let at = usize::from(self.used.offset) * DESC_BYTES;
        let written = self.ring.u32(at + 8).load(Ordering::Relaxed);
        let id = self.ring.u16(at + 12).load(Ordering::Relaxed);
        let descriptors = self
            .lengths
            .get_mut(usize::from(id))
            .map(core::mem::take)
            .filter(|&n| n > 0)
            .ok_or(RingError::BadUsed { id: id.into() })?;
        self.ids.push(id);
        self.free += descriptors;
        self.used.advance(descriptors, self.size);
        Ok(Some(Completion { id, written }))
    }

    pub(super) fn arm_calls(&mut self) -> bool {
        let (off_wrap, flags) =
            if self.event_idx { (self.used.to_event(), EVENT_DESC) } else { (0, EVENT_ENABLE) };
        self.driver_event.u32(0).store(u32::from(off_wrap) | u32::from(flags) << 16, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.is_used()
    }

    pub(super) fn disarm_calls(&mut self) {
        self.driver_event.u32(0).store(u32::from(EVENT_DISABLE) << 16, Ordering::Relaxed);
    }

    #[inline(always)]
    fn is_used(&self) -> bool {
        let flags = self.ring.u16(usize::from(self.used.offset) * DESC_BYTES + 14).load(Ordering::Acquire);
        (flags & AVAIL != 0) == self.used.wrap && (flags & USED != 0) == self.used.wrap
    }
}

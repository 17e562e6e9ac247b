//! The driver end of a split ring (virtio 1.2, section 2.7).

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{Ordering, fence};

use crate::memory::{Area, GuestAddr, Memory};

use super::descriptor::{Descriptor, INDIRECT, NEXT, WRITE};
use super::layout::{DESC_BYTES, avail_bytes, used_bytes};
use super::{Buffer, Completion, RING_SIZE_MAX, RingConfig, RingError, need_event};

/// The driver end of a split ring. A chain's id is the index of its first descriptor.
pub struct SplitDriver {
    size: u16,
    desc: Area,
    avail: Area,
    used: Area,
    event_idx: bool,
    free: Vec<u16>,
    /// For a chain in flight, by id: how many ring descriptors it has; 0 for none.
    lengths: Box<[u16]>,
    /// The descriptor after this one in its chain. Our own copy: the device can write the one in memory.
    next: Box<[u16]>,
    avail_next: u16,
    avail_kicked: u16,
    /// The next used entry to take, and the device's index when last read.
    used_next: u16,
    used_seen: u16,
}

impl SplitDriver {
    /// Lays out a new, empty ring in zeroed memory.
    ///
    /// # Errors
    /// The size is not a power of two up to 32768, or an area is unaligned or not in `memory`.
    pub fn new(config: &RingConfig, memory: &Memory) -> Result<Self, RingError> {
        let size = config.size;
        if !size.is_power_of_two() || size > RING_SIZE_MAX {
            return Err(RingError::BadSize(size));
        }
        Ok(Self {
            size,
            desc: memory.area(config.desc, usize::from(size) * DESC_BYTES, DESC_BYTES)?,
            avail: memory.area(config.driver, avail_bytes(size), 2)?,
            used: memory.area(config.device, used_bytes(size), 4)?,
            event_idx: config.event_idx,
            free: (0..size).rev().collect(),
            lengths: (0..size).map(|_| 0).collect(),
            next: (0..size).collect(),
            avail_next: 0,
            avail_kicked: 0,
            used_next: 0,
            used_seen: 0,
        })
    }

    pub(super) fn free(&self) -> usize {
        self.free.len()
    }

    #[inline(always)]
    pub(super) fn add(&mut self, buffers: &[Buffer]) -> Option<u16> {
        if buffers.is_empty() || buffers.len() > self.free.len() {
            return None;
        }
        let head = *self.free.last()?;
        for (i, buffer) in buffers.iter().enumerate() {
            let index = self.free.pop()?;
            let last = i + 1 == buffers.len();
            let next = if last { 0 } else { *self.free.last()? };
            let flags = if buffer.writable { WRITE } else { 0 } | if last { 0 } else { NEXT };
            self.next[usize::from(index)] = next;
            Descriptor { addr: buffer.addr, len: buffer.len, third: flags, fourth: next }
                .store(&self.desc, index);
        }
        self.offer(head, buffers.len() as u16);
        Some(head)
    }

    #[inline(always)]
    pub(super) fn add_indirect(&mut self, table: &Area, addr: GuestAddr, buffers: &[Buffer]) -> Option<u16> {
        if buffers.is_empty() || table.len() < buffers.len() * DESC_BYTES {
            return None;
        }
        let head = self.free.pop()?;
        for (i, buffer) in buffers.iter().enumerate() {
            let next = if i + 1 == buffers.len() { 0 } else { NEXT };
            let flags = if buffer.writable { WRITE } else { 0 } | next;
            Descriptor { addr: buffer.addr, len: buffer.len, third: flags, fourth: i as u16 + 1 }
                .store(table, i as u16);
        }
        let len = (buffers.len() * DESC_BYTES) as u32;
        Descriptor { addr, len, third: INDIRECT, fourth: 0 }.store(&self.desc, head);
        self.offer(head, 1);
        Some(head)
    }

    #[inline(always)]
    fn offer(&mut self, head: u16, descriptors: u16) {
        self.lengths[usize::from(head)] = descriptors;
        let entry = usize::from(self.avail_next & (self.size - 1));
        self.avail.u16(4 + 2 * entry).store(head, Ordering::Relaxed);
        self.avail_next = self.avail_next.wrapping_add(1);
    }

    #[inline(always)]
    pub(super) fn publish(&mut self) {
        self.avail.u16(2).store(self.avail_next, Ordering::Release);
    }

    #[inline(always)]
    pub(super) fn needs_kick(&mut self) -> bool {
        let old = core::mem::replace(&mut self.avail_kicked, self.avail_next);
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.used.u16(4 + 8 * usize::from(self.size)).load(Ordering::Relaxed);
            return need_event(event, self.avail_next, old);
        }
        self.used.u16(0).load(Ordering::Relaxed) & 1 == 0
    }

    #[inline(always)]
    pub(super) fn reap(&mut self) -> Result<Option<Completion>, RingError> {
        if self.used_seen == self.used_next {
            // Only when nothing is left from the last look: the device writes this line all the time.
            self.used_seen = self.used.u16(2).load(Ordering::Acquire);
            if self.used_seen == self.used_next {
                return Ok(None);
            }
        }
        let at = 4 + 8 * usize::from(self.used_next & (self.size - 1));
        let id = self.used.u32(at).load(Ordering::Relaxed);
        let written = self.used.u32(at + 4).load(Ordering::Relaxed);
        let descriptors = self
            .lengths
            .get_mut(id as usize)
            .map(core::mem::take)
            .filter(|&n| n > 0)
            .ok_or(RingError::BadUsed { id })?;
        let id = id as u16;
        let mut index = id;
        for _ in 0..descriptors {
            self.free.push(index);
            index = self.next[usize::from(index)];
        }
        self.used_next = self.used_next.wrapping_add(1);
        Ok(Some(Completion { id, written }))
    }

    pub(super) fn arm_calls(&mut self) -> bool {
        if self.event_idx {
            self.avail.u16(4 + 2 * usize::from(self.size)).store(self.used_next, Ordering::Relaxed);
        }
        self.avail.u16(0).store(0, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.used.u16(2).load(Ordering::Relaxed) != self.used_next
    }

    pub(super) fn disarm_calls(&mut self) {
        if self.event_idx {
            // Half the index range away; renewed by whoever polls that long (each arm sets it anew).
            let far = self.used_next.wrapping_add(0x8000);
            self.avail.u16(4 + 2 * usize::from(self.size)).store(far, Ordering::Relaxed);
        }
        self.avail.u16(0).store(1, Ordering::Relaxed);
    }
}

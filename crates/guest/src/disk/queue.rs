//! One queue of a disk, and the memory of its requests.
//!
//! Requests are numbered from 0 to the depth, less one. Each has a header, a status, a table for an indirect chain,
//! and a block of data, at fixed places.

use alloc::boxed::Box;
use core::sync::atomic::Ordering;

use virtio::GuestAddr;
use virtio::memory::{Area, MemoryError, Translator};
use virtio::ring::Buffer;

use super::DiskError;
use crate::machine::clock::Clock;
use crate::machine::interrupts::Interrupt;
use crate::machine::patience::{DEVICE_SECONDS, Patience};
use crate::machine::service::ticks;
use crate::machine::{Machine, heap};
use crate::options::SECTOR_BYTES;
use crate::virtio_pci::Queue;

/// Header and status share a cache line; the table follows.
const CONTROL_BYTES: usize = 256;
const SECTOR_AT: usize = 8;
const STATUS_AT: usize = 16;
const TABLE_AT: usize = 64;
const HEADER_BYTES: u32 = 16;
/// Data begin at a page, for storage that is particular about it.
const DATA_ALIGN: usize = 4096;
/// What no device answers.
const STATUS_NONE: u8 = 0xFF;
/// Calls are put off by half of the index range; this often, again.
const DISARM_AFTER: u32 = 1 << 14;
/// An interrupt is lost if it has not come so long after a request was seen to have come back. Before that it may be
/// late: the thread that is about to send it can have been put aside.
const LATE_MS: u64 = 500;
/// Nor is it lost before the timer came so often: where time went by and nothing ran, it is late.
const LATE_WAKES_MIN: u32 = 5;
/// With more of them than that, a job would last.
const LOST_MAX: u64 = 16;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Disk to memory.
    Read = 0,
    /// Memory to disk.
    Write = 1,
    /// What was written stays.
    Flush = 4,
}

/// How requests are laid out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// How many there are.
    pub(super) depth: u16,
    /// Bytes of data.
    pub(super) block_bytes: u32,
    /// Chains are indirect tables.
    pub(super) indirect: bool,
    /// Data may be in so many pieces.
    pub(super) pieces_max: usize,
    /// Whether the disk knows flushes.
    pub(super) flushes: bool,
    /// Kick whatever the device asks for.
    pub(super) always_kick: bool,
}

/// A queue that runs.
pub struct DiskQueue {
    queue: Queue,
    interrupt: Option<Interrupt>,
    layout: Layout,
    control: Area,
    control_at: GuestAddr,
    tables: Box<[Area]>,
    data_at: GuestAddr,
    stride: u64,
    translator: Translator,
    /// The request of each chain in flight.
    request_of: Box<[u16]>,
    kicks: u64,
    until_disarm: u32,
    clock: Clock,
    lost: u64,
}

impl DiskQueue {
    pub(super) fn new(
        machine: &Machine,
        queue: Queue,
        interrupt: Option<Interrupt>,
        layout: Layout,
    ) -> Result<Self, MemoryError> {
        let depth = usize::from(layout.depth);
        let control_at = heap::take(depth * CONTROL_BYTES, 4096);
        let table = |request: usize| {
            let at = control_at.0 + (request * CONTROL_BYTES + TABLE_AT) as u64;
            machine.memory.area(GuestAddr(at), CONTROL_BYTES - TABLE_AT, 16)
        };
        let stride = (layout.block_bytes as usize).next_multiple_of(DATA_ALIGN);
        Ok(Self {
            control: machine.memory.area(control_at, depth * CONTROL_BYTES, 64)?,
            control_at,
            tables: (0..depth).map(table).collect::<Result<_, _>>()?,
            data_at: heap::take(stride * depth, DATA_ALIGN),
            stride: stride as u64,
            translator: Translator::new(machine.memory.clone().into()),
            request_of: (0..queue.size).map(|_| 0).collect(),
            queue,
            interrupt,
            layout,
            kicks: 0,
            until_disarm: DISARM_AFTER,
            clock: machine.clock,
            lost: 0,
        })
    }

    /// How many requests it has.
    #[must_use]
    pub fn depth(&self) -> u16 {
        self.layout.depth
    }

    /// Bytes of data in a request.
    #[must_use]
    pub fn block_bytes(&self) -> u32 {
        self.layout.block_bytes
    }

    /// Into how many pieces data may be cut.
    #[must_use]
    pub fn pieces_max(&self) -> usize {
        self.layout.pieces_max.min((self.layout.block_bytes / SECTOR_BYTES) as usize)
    }

    /// Whether flushes can be asked for.
    #[must_use]
    pub fn flushes(&self) -> bool {
        self.layout.flushes
    }

    /// Notifications so far.
    #[must_use]
    pub fn kicks(&self) -> u64 {
        self.kicks
    }

    /// Its interrupt, if it has one.
    #[must_use]
    pub fn interrupt(&self) -> Option<&Interrupt> {
        self.interrupt.as_ref()
    }

    /// Adds `request`, which is not in flight: the block at `sector`, its data in one piece, or a flush.
    #[inline(always)]
    pub fn add(&mut self, request: u16, operation: Operation, sector: u64) -> bool {
        if operation == Operation::Flush {
            return self.add_chain(request, operation, 0, &[]);
        }
        let (addr, len) = (self.data(request), self.layout.block_bytes);
        let data = Buffer { addr, len, writable: operation == Operation::Read };
        self.add_chain(request, operation, sector, &[data])
    }

    /// The same with data in `pieces`, the last of which is the first in memory.
    pub fn add_in_pieces(&mut self, request: u16, operation: Operation, sector: u64, pieces: usize) -> bool {
        let cut = self.pieces(request, pieces);
        let buffers = cut.map(|(addr, len)| Buffer { addr, len, writable: operation == Operation::Read });
        self.add_chain(request, operation, sector, &buffers[..pieces])
    }

    #[inline(always)]
    fn add_chain(&mut self, request: u16, operation: Operation, sector: u64, data: &[Buffer]) -> bool {
        let at = usize::from(request) * CONTROL_BYTES;
        self.control.u64(at).store(operation as u64, Ordering::Relaxed);
        self.control.u64(at + SECTOR_AT).store(sector, Ordering::Relaxed);
        self.control.u8(at + STATUS_AT).store(STATUS_NONE, Ordering::Relaxed);

        let header = GuestAddr(self.control_at.0 + at as u64);
        let status = GuestAddr(header.0 + STATUS_AT as u64);
        let mut chain = [Buffer { addr: header, len: HEADER_BYTES, writable: false }; 2 + super::PIECES_MAX];
        chain[1..=data.len()].copy_from_slice(data);
        chain[1 + data.len()] = Buffer { addr: status, len: 1, writable: true };
        let chain = &chain[..2 + data.len()];
        let ring = &mut self.queue.ring;
        let id = if self.layout.indirect {
            let table = GuestAddr(header.0 + TABLE_AT as u64);
            ring.add_indirect(&self.tables[usize::from(request)], table, chain)
        } else {
            ring.add(chain)
        };
        let Some(id) = id else { return false };
        self.request_of[usize::from(id)] = request;
        true
    }

    /// Shows the device what was added, and notifies it if it asks for that.
    #[inline(always)]
    pub fn publish(&mut self) {
        self.queue.ring.publish();
        if self.queue.ring.needs_kick() || self.layout.always_kick {
            self.kicks += 1;
            self.queue.kick();
        }
    }

    /// The next request that came back. How it went is on a cache line of the device's, which is asked for.
    ///
    /// # Errors
    /// The device broke the ring.
    #[inline(always)]
    pub fn take(&mut self) -> Result<Option<u16>, DiskError> {
        let done = self.queue.ring.reap();
        let Some(done) = done.map_err(|source| DiskError::Ring { queue: self.queue.index, source })? else {
            return Ok(None);
        };
        let request = self.request_of[usize::from(done.id)];
        self.control.prefetch_for_write(usize::from(request) * CONTROL_BYTES);
        self.until_disarm -= 1;
        if self.until_disarm == 0 {
            self.until_disarm = DISARM_AFTER;
            self.queue.ring.disarm_calls();
        }
        Ok(Some(request))
    }

    /// Whether a request that came back went well.
    #[inline(always)]
    #[must_use]
    pub fn is_fine(&self, request: u16) -> bool {
        let at = usize::from(request) * CONTROL_BYTES + STATUS_AT;
        self.control.u8(at).load(Ordering::Relaxed) == 0
    }

    /// The next request that came back, and whether it went well.
    ///
    /// # Errors
    /// The device broke the ring.
    pub fn reap(&mut self) -> Result<Option<(u16, bool)>, DiskError> {
        let request = self.take()?;
        Ok(request.map(|request| (request, self.is_fine(request))))
    }

    /// Where nothing came back: sleeps until something has, if the queue has an interrupt. May return early.
    ///
    /// # Errors
    /// Too many interrupts were lost.
    #[inline(always)]
    pub fn idle(&mut self) -> Result<(), DiskError> {
        let Some(interrupt) = &self.interrupt else {
            core::hint::spin_loop();
            return Ok(());
        };
        let seen = interrupt.count();
        if !self.queue.ring.arm_calls() {
            self.wait(seen)?;
        }
        self.queue.ring.disarm_calls();
        Ok(())
    }

    /// Sleeps until the interrupt that [`DiskQueue::arm_calls`] asked for, if it has not come since `seen` was read; may
    /// return early. True if it has come.
    ///
    /// # Errors
    /// Too many interrupts were lost.
    #[inline(always)]
    pub fn wait(&mut self, seen: u64) -> Result<bool, DiskError> {
        let Some(interrupt) = &self.interrupt else { return Ok(false) };
        interrupt.wait(seen);
        if interrupt.count() == seen { self.is_late(seen) } else { Ok(true) }
    }

    /// Something else than its interrupt ended the sleep. Is the device slow, or has it announced nothing?
    #[cold]
    fn is_late(&mut self, seen: u64) -> Result<bool, DiskError> {
        // As before: calls are still asked for where they were.
        if !self.queue.ring.arm_calls() {
            return Ok(false);
        }
        let Some(interrupt) = &self.interrupt else { return Ok(false) };
        let (mut patience, mut wakes) = (Patience::of_ms(self.clock, LATE_MS), 0);
        while interrupt.count() == seen {
            wakes += 1;
            if patience.is_over(ticks()) && wakes > LATE_WAKES_MIN {
                self.lost += 1;
                let (queue, lost) = (self.queue.index, self.lost);
                let too_many = DiskError::LostInterrupts { queue, lost, ms: LATE_MS };
                return if lost < LOST_MAX { Ok(false) } else { Err(too_many) };
            }
            interrupt.wait(seen);
        }
        Ok(true)
    }

    /// How many interrupts were lost so far.
    #[must_use]
    pub fn lost_interrupts(&self) -> u64 {
        self.lost
    }

    /// What is to be said when so many requests do not come back.
    #[must_use]
    pub fn stuck(&self, in_flight: usize) -> DiskError {
        DiskError::Stuck { queue: self.queue.index, in_flight, seconds: DEVICE_SECONDS }
    }

    /// Asks for a call for the next request that comes back; true if one has already.
    pub fn arm_calls(&mut self) -> bool {
        self.queue.ring.arm_calls()
    }

    /// Writes the data of a request, as its pieces will be on the disk.
    ///
    /// # Errors
    /// None that can happen: its memory is not mapped.
    pub fn write_data(&mut self, request: u16, pieces: usize, block: &[u8]) -> Result<(), MemoryError> {
        let mut at = 0;
        for (addr, len) in self.pieces(request, pieces).into_iter().take(pieces) {
            self.translator.translate(addr, len, |segment| at += segment.write(0, &block[at..]))?;
        }
        Ok(())
    }

    /// Reads them.
    ///
    /// # Errors
    /// As for writing.
    pub fn read_data(&mut self, request: u16, pieces: usize, block: &mut [u8]) -> Result<(), MemoryError> {
        let mut at = 0;
        for (addr, len) in self.pieces(request, pieces).into_iter().take(pieces) {
            self.translator.translate(addr, len, |segment| at += segment.read(0, &mut block[at..]))?;
        }
        Ok(())
    }

    #[inline(always)]
    fn data(&self, request: u16) -> GuestAddr {
        GuestAddr(self.data_at.0 + u64::from(request) * self.stride)
    }

    fn pieces(&self, request: u16, pieces: usize) -> [(GuestAddr, u32); super::PIECES_MAX] {
        cut(self.data(request), self.layout.block_bytes, pieces)
    }
}

/// Cuts a block into pieces of whole sectors, the last of which is the first in memory.
fn cut(block: GuestAddr, bytes: u32, pieces: usize) -> [(GuestAddr, u32); super::PIECES_MAX] {
    let sectors = bytes / SECTOR_BYTES;
    let piece = sectors / pieces as u32 * SECTOR_BYTES;
    let mut end = block.0 + u64::from(bytes);
    core::array::from_fn(|i| match i + 1 {
        n if n < pieces => {
            end -= u64::from(piece);
            (GuestAddr(end), piece)
        }
        n if n == pieces => (block, (end - block.0) as u32),
        _ => (block, 0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_a_block_once_and_in_reverse() {
        for (bytes, pieces) in [(512, 1), (4096, 1), (4096, 3), (4096, 4), (1536, 2), (1 << 20, 4)] {
            let cut = cut(GuestAddr(0x1000), bytes, pieces);
            let mut end = 0x1000 + u64::from(bytes);
            for (i, (addr, len)) in cut.into_iter().enumerate() {
                assert_eq!(len == 0, i >= pieces);
                if len > 0 {
                    assert_eq!((addr.0 + u64::from(len), len % SECTOR_BYTES), (end, 0));
                    end = addr.0;
                }
            }
            assert_eq!(end, 0x1000, "{bytes} bytes in {pieces} pieces");
        }
    }
}

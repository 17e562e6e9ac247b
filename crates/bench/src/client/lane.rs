//! One queue: its ring, the slots for its requests, and the hot path that fills and empties them.
//!
//! Nothing is allocated after [`Lane::new`]. A slot is a request header with its status byte on one cache line, as in
//! Linux's driver and in the embedded guest; an indirect table on the next; and a buffer. Descriptors are written anew
//! for every request, as every driver does.

use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail, ensure};
use virtio::memory::Area;
use virtio::ring::{Buffer, DriverRing, RingConfig};
use virtio::{GuestAddr, RingFormat};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::guest::Guest;

/// `VIRTIO_BLK_T_IN` and `VIRTIO_BLK_T_OUT` (virtio 1.2, section 5.2.6).
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const SECTOR_BYTES: u64 = 512;
const HEADER_BYTES: u32 = 16;
const CACHE_LINE_BYTES: usize = 64;
/// Of a slot: two lines, which processors like to fetch together. The header is followed by the status byte, the
/// table of up to three descriptors is on the second.
const SLOT_BYTES: usize = 2 * CACHE_LINE_BYTES;
const STATUS_AT: usize = HEADER_BYTES as usize;
const TABLE_AT: u64 = CACHE_LINE_BYTES as u64;
const TABLE_BYTES: u64 = 48;
const PAGE_BYTES: u64 = 4096;
/// What a status byte holds before the device writes it, where that is checked.
const STATUS_UNWRITTEN: u8 = 0xff;
/// Calls are turned off again after so many requests: with `EVENT_IDX` off means half the index range ahead.
const DISARM_AFTER: u32 = 8192;

/// The shape of a queue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) format: RingFormat,
    pub(crate) ring_size: u16,
    pub(crate) depth: u16,
    pub(crate) block_bytes: u32,
    pub(crate) indirect: bool,
    pub(crate) event_idx: bool,
}

impl Shape {
    /// Guest memory that one queue of this shape takes, in bytes.
    pub(crate) fn memory_bytes(&self) -> u64 {
        let ring: usize = DriverRing::layout(self.format, self.ring_size).iter().sum();
        let slots = u64::from(self.depth) * (SLOT_BYTES as u64 + u64::from(self.block_bytes));
        ring as u64 + slots + 4 * PAGE_BYTES
    }
}

/// One queue of the client.
pub(crate) struct Lane {
    ring: DriverRing,
    config: RingConfig,
    kick: EventFd,
    shape: Shape,
    front: Area,
    front_addr: GuestAddr,
    data_addr: GuestAddr,
    tables: Box<[Area]>,
    /// The slot of a chain in flight, by the ring's id for it.
    slot_of: Box<[u16]>,
    submitted_ns: Box<[u64]>,
    kicks: u64,
    until_disarm: u32,
}

impl Lane {
    pub(crate) fn new(shape: Shape, guest: &mut Guest) -> Result<Self> {
        let [desc, driver, device] = DriverRing::layout(shape.format, shape.ring_size);
        // Each area on a page of its own, so that two queues never share a cache line or its neighbour.
        let config = RingConfig {
            format: shape.format,
            size: shape.ring_size,
            desc: guest.alloc(desc as u64, PAGE_BYTES),
            driver: guest.alloc(driver as u64, CACHE_LINE_BYTES as u64),
            device: guest.alloc(device as u64, CACHE_LINE_BYTES as u64),
            event_idx: shape.event_idx,
            indirect: shape.indirect,
            in_order: false,
        };
        let mut ring = DriverRing::new(&config, guest.memory()).context("the client's ring")?;
        ring.disarm_calls();
        let depth = usize::from(shape.depth);
        let front_bytes = (depth * SLOT_BYTES) as u64;
        let front_addr = guest.alloc(front_bytes, SLOT_BYTES as u64);
        let data_addr = guest.alloc(u64::from(shape.block_bytes) * u64::from(shape.depth), PAGE_BYTES);
        let table = |slot: usize| {
            let addr = GuestAddr(front_addr.0 + (slot * SLOT_BYTES) as u64 + TABLE_AT);
            guest.area(addr, TABLE_BYTES)
        };
        Ok(Self {
            ring,
            config,
            kick: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).context("cannot make an eventfd")?,
            shape,
            front: guest.area(front_addr, front_bytes)?,
            front_addr,
            data_addr,
            tables: (0..depth).map(table).collect::<Result<_>>()?,
            slot_of: vec![0; shape.ring_size.into()].into_boxed_slice(),
            submitted_ns: vec![0; depth].into_boxed_slice(),
            kicks: 0,
            until_disarm: DISARM_AFTER,
        })
    }

    pub(crate) fn config(&self) -> &RingConfig {
        &self.config
    }

    pub(crate) fn shape(&self) -> &Shape {
        &self.shape
    }

    pub(crate) fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Kicks sent so far.
    pub(crate) fn kicks(&self) -> u64 {
        self.kicks
    }

    /// When the request in `slot` was submitted.
    #[inline(always)]
    pub(crate) fn submitted_ns(&self, slot: u16) -> u64 {
        self.submitted_ns[usize::from(slot)]
    }

    /// The buffer of `slot`.
    pub(crate) fn data(&self, slot: u16) -> GuestAddr {
        GuestAddr(self.data_addr.0 + u64::from(slot) * u64::from(self.shape.block_bytes))
    }

    /// Queues a request for block number `block`. The server sees it after [`Lane::publish`].
    #[inline(always)]
    pub(crate) fn submit(&mut self, slot: u16, write: bool, block: u64, now_ns: u64) -> Result<()> {
        let at = usize::from(slot) * SLOT_BYTES;
        let kind = if write { T_OUT } else { T_IN };
        let sector = block * (u64::from(self.shape.block_bytes) / SECTOR_BYTES);
        self.front.u64(at).store(kind.into(), Ordering::Relaxed);
        self.front.u64(at + 8).store(sector, Ordering::Relaxed);
        let front = self.front_addr.0 + at as u64;
        let chain = [
            Buffer { addr: GuestAddr(front), len: HEADER_BYTES, writable: false },
            Buffer { addr: self.data(slot), len: self.shape.block_bytes, writable: !write },
            Buffer { addr: GuestAddr(front + STATUS_AT as u64), len: 1, writable: true },
        ];
        let id = if self.shape.indirect {
            let table = &self.tables[usize::from(slot)];
            self.ring.add_indirect(table, GuestAddr(front + TABLE_AT), &chain)
        } else {
            self.ring.add(&chain)
        };
        let Some(id) = id else { bail!("the client's ring is full") };
        self.slot_of[usize::from(id)] = slot;
        self.submitted_ns[usize::from(slot)] = now_ns;
        Ok(())
    }

    /// Shows the server what was submitted, and kicks it if it wants that.
    #[inline(always)]
    pub(crate) fn publish(&mut self) -> Result<()> {
        self.ring.publish();
        if self.ring.needs_kick() {
            self.kicks += 1;
            self.kick.write(1).context("cannot kick the server")?;
        }
        Ok(())
    }

    /// Takes back what the server has finished: the slots go to the front of `slots`; returns how many.
    #[inline(always)]
    pub(crate) fn reap(&mut self, slots: &mut [u16]) -> Result<usize> {
        let mut count = 0;
        while count < slots.len() {
            let Some(completion) = self.ring.reap().context("the server broke the ring")? else { break };
            let slot = self.slot_of[usize::from(completion.id)];
            self.front.prefetch_for_write(usize::from(slot) * SLOT_BYTES);
            slots[count] = slot;
            count += 1;
        }
        for &slot in &slots[..count] {
            let status = self.front.u8(usize::from(slot) * SLOT_BYTES + STATUS_AT).load(Ordering::Relaxed);
            ensure!(status == 0, "a request ended with status {status}: it must be 0");
        }
        Ok(count)
    }

    /// Makes a server that forgets the status byte noticed. The measured loop does without: it costs a cache line
    /// transfer that no driver pays.
    pub(crate) fn clear_status(&mut self, slot: u16) {
        self.front.u8(usize::from(slot) * SLOT_BYTES + STATUS_AT).store(STATUS_UNWRITTEN, Ordering::Relaxed);
    }

    /// Asks for a call; true if there is something to reap already.
    pub(crate) fn arm(&mut self) -> bool {
        self.ring.arm_calls()
    }

    /// Asks for no calls.
    pub(crate) fn disarm(&mut self) {
        self.ring.disarm_calls();
    }

    /// Keeps calls off in a polled run that lasts longer than the ring's indices.
    #[inline(always)]
    pub(crate) fn renew_disarm(&mut self, completed: u32) {
        self.until_disarm = self.until_disarm.saturating_sub(completed);
        if self.until_disarm == 0 {
            self.until_disarm = DISARM_AFTER;
            self.ring.disarm_calls();
        }
    }
}

//! The page map, beyond the first 4 GiB that the image brings mapped.
//!
//! Pages of 2 MiB, at virtual addresses equal to physical ones. A mapping is added by writing entries that were not
//! present, which needs no privilege and no invalidation.

use core::sync::atomic::{AtomicU64, Ordering};

use virtio::memory::Area;
use virtio::{GuestAddr, Memory, MemoryError};

use super::heap;
use super::physical::IDENTITY_END;
use super::sync::Spin;

const PRESENT: u64 = 1;
/// Present, writable, for ring 3 too.
const TABLE: u64 = 7;
/// The same for a page of 2 MiB.
const PAGE: u64 = 0x87;
const PAGE_BYTES: u64 = 2 << 20;
const TABLE_BYTES: usize = 4096;
/// The lower half of the address space.
const ADDRESS_END: u64 = 1 << 47;
/// The most that one mapping may have: 1 GiB.
const MAPPING_BYTES_MAX: u64 = 1 << 30;

/// Why a range was not mapped.
#[derive(Clone, Copy, Debug, thiserror::Error)]
pub enum PagingError {
    /// It cannot be in the page map.
    #[error("cannot map {1:#x} bytes at physical address {0:#x}: at most 1 GiB below 2^47 is supported")]
    Range(u64, u64),
    /// The page map is not in memory that is mapped.
    #[error("cannot change the page map: {0}")]
    Memory(#[from] MemoryError),
}

static ROOT: AtomicU64 = AtomicU64::new(0);
static CHANGE: Spin<()> = Spin::new(());

/// Remembers where the page map is.
pub(super) fn init(root: usize) {
    ROOT.store(root as u64, Ordering::Relaxed);
}

/// Maps the `len` bytes at a physical address.
///
/// # Errors
/// The range is empty, too large, or too high.
pub(super) fn map(physical: u64, len: u64) -> Result<(), PagingError> {
    let end = physical.checked_add(len).filter(|&end| end <= ADDRESS_END);
    let end =
        end.filter(|_| len != 0 && len <= MAPPING_BYTES_MAX).ok_or(PagingError::Range(physical, len))?;
    if end <= IDENTITY_END {
        return Ok(());
    }
    let _change = CHANGE.lock();
    let memory = super::physical::memory()?;
    let mut at = physical - physical % PAGE_BYTES;
    while at < end {
        let directories = descend(&memory, ROOT.load(Ordering::Relaxed), at >> 39)?;
        let directory = descend(&memory, directories, at >> 30)?;
        let entry = (at >> 21) as usize % 512 * 8;
        table(&memory, directory)?.u64(entry).store(at | PAGE, Ordering::Release);
        at += PAGE_BYTES;
    }
    Ok(())
}

/// The table that entry `index` of a table points to; a new one if there is none.
fn descend(memory: &Memory, at: u64, index: u64) -> Result<u64, PagingError> {
    let table = table(memory, at)?;
    let entry = table.u64(index as usize % 512 * 8);
    if entry.load(Ordering::Relaxed) & PRESENT == 0 {
        let next = heap::take(TABLE_BYTES, TABLE_BYTES);
        entry.store(next.0 | TABLE, Ordering::Release);
    }
    Ok(entry.load(Ordering::Relaxed) & !0xFFF)
}

fn table(memory: &Memory, at: u64) -> Result<Area, MemoryError> {
    memory.area(GuestAddr(at), TABLE_BYTES, TABLE_BYTES)
}

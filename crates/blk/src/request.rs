//! From a chain of untrusted bytes to a checked request (virtio 1.2, section 5.2.6).
//!
//! A request is a 16-byte header in the first readable bytes, data, and a status byte that is the last writable one.
//! Nothing is assumed about how these are cut into buffers (virtio 1.2, section 2.6.4). The header is copied once and
//! the copy is checked; what the driver does to its memory meanwhile does not matter.
//!
//! A chain that is too short for a header is answered with an error, one without room for a status byte is given
//! back with 0 bytes written. QEMU breaks the whole device on either; but the ring is sound, the buffers have gone back
//! where they came from, and a driver with one bad request loses one request.

use virtio::Segment;
use virtio::memory::{gather, total_len};
use virtio::ring::Chain;

use crate::backend::{Geometry, Op, OpKind, Status};

/// The unit of virtio-blk's offsets and lengths.
pub(crate) const SECTOR_BYTES: u64 = 512;
/// The most data in one request. Linux stays below 2 GiB per request whatever the disk; nobody sends a tenth of it.
pub(crate) const REQUEST_BYTES_MAX: u64 = 1 << 30;
/// The longest range to discard, zero or erase.
pub(crate) const RANGE_BYTES_MAX: u64 = 1 << 30;
/// The most ranges in one request.
pub(crate) const RANGES_MAX: usize = 32;
/// Bytes of the answer to `GET_ID`.
pub(crate) const SERIAL_BYTES: usize = 20;

const HEADER_BYTES: usize = Op::DATA_OFFSET;
/// `struct virtio_blk_discard_write_zeroes`.
const RANGE_BYTES: usize = 16;
/// Its only flag: zeroed space may be given back.
const UNMAP: u32 = 1;

/// Request types (section 5.2.6).
mod kind {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
    pub(super) const SECURE_ERASE: u32 = 14;
}

/// What requests are checked against.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Disk {
    /// Capacity in sectors.
    pub(crate) sectors: u64,
    /// What the storage can do. Its `bytes` are not looked at.
    pub(crate) geometry: Geometry,
}

/// A part of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    /// Start in bytes.
    pub(crate) offset: u64,
    /// Length in bytes, not 0.
    pub(crate) len: u64,
}

/// A checked request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// One operation.
    Op { kind: OpKind, range: Range },
    /// An operation on each of `count` ranges; [`ranges`] reads and checks them.
    Ranges { kind: RangeKind, count: usize },
    /// The serial number is asked for.
    GetId,
    /// It is over before it began.
    Over(Status),
}

/// An operation on ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RangeKind {
    Discard,
    WriteZeroes,
    SecureErase,
}

/// Reads the header of `chain` and checks all that it says.
#[inline(always)]
pub(crate) fn parse(chain: &Chain<'_>, disk: &Disk) -> Request {
    let header = chain.readable.first().and_then(|first| first.words(0));
    let Some([kind, sector]) = header.or_else(|| scattered_header(chain.readable)) else {
        return Request::Over(Status::IoError);
    };
    // The second half of the first word is the priority, which means nothing here.
    let kind = kind as u32;
    match kind {
        // Without a status byte the subtraction makes the length too large, and the request is refused.
        kind::IN => transfer(OpKind::Read, sector, total_len(chain.writable).wrapping_sub(1), disk),
        kind::OUT if disk.geometry.read_only || chain.writable.is_empty() => Request::Over(Status::IoError),
        kind::OUT => transfer(OpKind::Write, sector, total_len(chain.readable) - HEADER_BYTES as u64, disk),
        _ => rare(kind, chain, disk),
    }
}

#[inline(always)]
fn transfer(kind: OpKind, sector: u64, len: u64, disk: &Disk) -> Request {
    if sector > disk.sectors
        || len > REQUEST_BYTES_MAX
        || !len.is_multiple_of(SECTOR_BYTES)
        || len / SECTOR_BYTES > disk.sectors - sector
    {
        return Request::Over(Status::IoError);
    }
    if len == 0 {
        return Request::Over(Status::Ok);
    }
    Request::Op { kind, range: Range { offset: sector * SECTOR_BYTES, len } }
}

#[cold]
fn scattered_header(segments: &[Segment]) -> Option<[u64; 2]> {
    let mut header = [0; HEADER_BYTES];
    let word = |at: usize, header: &[u8; HEADER_BYTES]| {
        u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|i| header[at + i]))
    };
    (gather(segments, 0, &mut header) == HEADER_BYTES).then(|| [word(0, &header), word(8, &header)])
}

#[cold]
fn rare(kind: u32, chain: &Chain<'_>, disk: &Disk) -> Request {
    if chain.writable.is_empty() {
        return Request::Over(Status::IoError);
    }
    let Geometry { read_only, flush, discard, write_zeroes, secure_erase, .. } = disk.geometry;
    let (kind, possible) = match kind {
        kind::FLUSH if flush => {
            return Request::Op { kind: OpKind::Flush, range: Range { offset: 0, len: 0 } };
        }
        kind::GET_ID => return Request::GetId,
        kind::DISCARD => (RangeKind::Discard, discard),
        kind::WRITE_ZEROES => (RangeKind::WriteZeroes, write_zeroes),
        kind::SECURE_ERASE => (RangeKind::SecureErase, secure_erase),
        _ => return Request::Over(Status::Unsupported),
    };
    if !possible {
        return Request::Over(Status::Unsupported);
    }
    let bytes = total_len(chain.readable) - HEADER_BYTES as u64;
    let count = bytes / RANGE_BYTES as u64;
    if read_only || !bytes.is_multiple_of(RANGE_BYTES as u64) || count == 0 || count > RANGES_MAX as u64 {
        return Request::Over(Status::IoError);
    }
    Request::Ranges { kind, count: count as usize }
}

/// Reads and checks the `count` ranges of a request; appends those that are not empty to `out`. All or none: if one
/// is refused, so is the request, and `out` is as it was.
///
/// # Errors
/// The status to answer with.
#[cold]
pub(crate) fn ranges(
    kind: RangeKind,
    count: usize,
    chain: &Chain<'_>,
    disk: &Disk,
    out: &mut Vec<(OpKind, Range)>,
) -> Result<(), Status> {
    let before = out.len();
    for i in 0..count.min(RANGES_MAX) {
        let mut raw = [0; RANGE_BYTES];
        let checked = match gather(chain.readable, HEADER_BYTES + i * RANGE_BYTES, &mut raw) {
            RANGE_BYTES => range(kind, &raw, disk),
            _ => Err(Status::IoError),
        };
        match checked {
            Ok((_, Range { len: 0, .. })) => {}
            Ok(range) => out.push(range),
            Err(status) => {
                out.truncate(before);
                return Err(status);
            }
        }
    }
    Ok(())
}

fn range(kind: RangeKind, raw: &[u8; RANGE_BYTES], disk: &Disk) -> Result<(OpKind, Range), Status> {
    let sector = u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|i| raw[i]));
    let sectors = u64::from(u32::from_le_bytes([8, 9, 10, 11].map(|i| raw[i])));
    let flags = u32::from_le_bytes([12, 13, 14, 15].map(|i| raw[i]));
    let kind = match kind {
        RangeKind::WriteZeroes if flags & !UNMAP == 0 => OpKind::WriteZeroes { unmap: flags & UNMAP != 0 },
        RangeKind::Discard if flags == 0 => OpKind::Discard,
        RangeKind::SecureErase if flags == 0 => OpKind::SecureErase,
        _ => return Err(Status::Unsupported),
    };
    if sector > disk.sectors || sectors > disk.sectors - sector || sectors > RANGE_BYTES_MAX / SECTOR_BYTES {
        return Err(Status::IoError);
    }
    Ok((kind, Range { offset: sector * SECTOR_BYTES, len: sectors * SECTOR_BYTES }))
}

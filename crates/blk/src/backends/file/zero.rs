//! Ranges that are to read as zeros, or need not be kept.
//!
//! The system does that best where it can: by `fallocate(2)`, in whole units of the storage (on a device with sectors of
//! 4 KiB, a guest may ask for less). What it cannot do is written.

use rustix::fs::FallocateFlags;

use super::Opened;
use super::transfer::Transfer;
use crate::backend::OpKind;

/// The most zeros that are written in one go.
const ZEROS_BYTES: usize = 256 << 10;
const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
const ZERO: FallocateFlags = FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE);

/// Aligned as any storage wants it.
#[repr(align(4096))]
struct Zeros([u8; ZEROS_BYTES]);

static ZEROS: Zeros = Zeros([0; ZEROS_BYTES]);

/// What to write.
pub(super) fn zeros(len: u64) -> &'static [u8] {
    &ZEROS.0[..ZEROS_BYTES.min(len as usize)]
}

/// The next thing to do about a range, for its first `len` bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Allocate {
        mode: FallocateFlags,
        len: u64,
    },
    Write {
        len: u64,
    },
    /// Nothing: nothing need be done.
    Skip {
        len: u64,
    },
}

impl Opened {
    /// What to do about the rest of a transfer on a range, of which `progress` bytes are done, after `refusals` ways that
    /// the system turned out not to know.
    pub(super) fn zero_step(&self, transfer: &Transfer, progress: u64, refusals: usize) -> Step {
        let (offset, left) = (transfer.offset + progress, transfer.len - progress);
        step(self.zero_unit, transfer.kind, offset, left, refusals)
    }
}

fn step(unit: u64, kind: OpKind, offset: u64, left: u64, refusals: usize) -> Step {
    let modes: &[FallocateFlags] = match kind {
        OpKind::WriteZeroes { unmap: false } => &[ZERO, PUNCH],
        OpKind::WriteZeroes { unmap: true } => &[PUNCH, ZERO],
        _ => &[PUNCH],
    };
    let before = (offset.next_multiple_of(unit) - offset).min(left);
    let whole = (left - before) / unit * unit;
    match modes.get(refusals) {
        Some(&mode) if before == 0 && whole > 0 => Step::Allocate { mode, len: whole },
        // Up to where whole units begin, or from where they end.
        Some(_) if kind == OpKind::Discard => Step::Skip { len: if before > 0 { before } else { left } },
        Some(_) => Step::Write { len: if before > 0 { before } else { left } },
        None if kind == OpKind::Discard => Step::Skip { len: left },
        None => Step::Write { len: left },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRITE: OpKind = OpKind::WriteZeroes { unmap: false };
    const UNMAP: OpKind = OpKind::WriteZeroes { unmap: true };

    /// All steps of an operation on a range, if the system knows no way until `refusals` are through.
    fn steps(unit: u64, kind: OpKind, offset: u64, len: u64, refusals: usize) -> Vec<Step> {
        let (mut progress, mut steps) = (0, Vec::new());
        while progress < len {
            let next = step(unit, kind, offset + progress, len - progress, refusals);
            let (Step::Allocate { len, .. } | Step::Write { len } | Step::Skip { len }) = next;
            progress += len;
            steps.push(next);
        }
        assert_eq!(progress, len);
        steps
    }

    #[test]
    fn whole_units_are_left_to_the_system() {
        let (zero, punch) =
            (|len| Step::Allocate { mode: ZERO, len }, |len| Step::Allocate { mode: PUNCH, len });
        let (write, skip) = (|len| Step::Write { len }, |len| Step::Skip { len });
        assert_eq!(steps(1, WRITE, 512, 1536, 0), [zero(1536)]);
        assert_eq!(steps(4096, WRITE, 4096, 8192, 0), [zero(8192)]);
        assert_eq!(steps(4096, UNMAP, 3584, 9216, 0), [write(512), punch(8192), write(512)]);
        assert_eq!(steps(4096, OpKind::Discard, 3584, 9216, 0), [skip(512), punch(8192), skip(512)]);
        assert_eq!(steps(4096, WRITE, 512, 1024, 0), [write(1024)]);
        assert_eq!(steps(4096, WRITE, 3584, 1024, 0), [write(512), write(512)]);
        assert_eq!(steps(4096, OpKind::Discard, 512, 1024, 0), [skip(1024)]);
    }

    #[test]
    fn what_the_system_does_not_know_is_written() {
        assert_eq!(steps(1, WRITE, 0, 4096, 1), [Step::Allocate { mode: PUNCH, len: 4096 }]);
        assert_eq!(steps(1, UNMAP, 0, 4096, 1), [Step::Allocate { mode: ZERO, len: 4096 }]);
        assert_eq!(steps(4096, WRITE, 512, 8192, 2), [Step::Write { len: 8192 }]);
        assert_eq!(steps(1, OpKind::Discard, 0, 4096, 1), [Step::Skip { len: 4096 }]);
    }
}

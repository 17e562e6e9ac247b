//! Aligned memory that stands in for guest buffers which are not.

use std::os::fd::AsFd;

use virtio::Segment;
use virtio::memory::gather;

pub(super) const PAGE_BYTES: usize = 4096;
/// The most that one transfer through it moves.
pub(super) const BOUNCE_BYTES: u64 = 128 << 10;

#[repr(C, align(4096))]
struct Pages<const BYTES: usize>([u8; BYTES]);

/// A buffer of [`BOUNCE_BYTES`], aligned to pages.
pub(super) struct Bounce(Box<Pages<{ BOUNCE_BYTES as usize }>>);

impl Bounce {
    pub(super) fn new() -> Self {
        Self(Box::new(Pages([0; BOUNCE_BYTES as usize])))
    }

    pub(super) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.0.0.as_mut_ptr()
    }

    /// The first `len` bytes.
    pub(super) fn bytes(&mut self, len: usize) -> &mut [u8] {
        &mut self.0.0[..len]
    }

    /// Fills the `len` bytes from `at` on with the segments' bytes from `from` on.
    pub(super) fn gather(&mut self, at: usize, segments: &[Segment], from: usize, len: usize) {
        gather(segments, from, &mut self.0.0[at..at + len]);
    }

    /// Fills the `len` bytes from `at` on with zeros.
    pub(super) fn clear(&mut self, at: usize, len: usize) {
        self.0.0[at..at + len].fill(0);
    }

    /// Whether a read from `file`, which is `bytes` long, succeeds at that alignment of offset, length and address.
    pub(super) fn probe(file: impl AsFd, align: usize, bytes: u64) -> bool {
        let mut pages = Pages([0; 2 * PAGE_BYTES]);
        let offset = if bytes >= 2 * align as u64 { align as u64 } else { 0 };
        // One page is aligned to all that is tried, so the buffer starts `align` bytes into one.
        let at = align % PAGE_BYTES;
        let end = if at == 0 { PAGE_BYTES } else { at + align };
        rustix::io::pread(file, &mut pages.0[at..end], offset).is_ok()
    }
}

/// The whole blocks that the next part of a transfer lies in, and where in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    /// Where the blocks are, in bytes.
    pub(super) start: u64,
    /// Their bytes.
    pub(super) len: usize,
    /// Bytes before the part.
    pub(super) head: usize,
    /// Bytes of the part.
    pub(super) data: usize,
}

impl Span {
    /// The blocks of `unit` bytes, at most [`BOUNCE_BYTES`] of them, from the one that holds the byte at `offset` on, for
    /// up to `left` bytes.
    pub(super) fn new(unit: u64, offset: u64, left: u64) -> Self {
        let start = offset / unit * unit;
        let head = offset - start;
        let data = left.min(BOUNCE_BYTES - head);
        let len = (head + data).next_multiple_of(unit);
        Self { start, len: len as usize, head: head as usize, data: data as usize }
    }

    /// Whether the part is all of the blocks.
    pub(super) fn is_whole(&self) -> bool {
        self.data == self.len
    }

    /// How many bytes of the part are among the first `moved` ones of the blocks.
    pub(super) fn part_of(&self, moved: usize) -> usize {
        moved.saturating_sub(self.head).min(self.data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_has_whole_blocks() {
        let span = |offset, left| {
            let Span { start, len, head, data } = Span::new(4096, offset, left);
            (start, len, head, data)
        };
        assert_eq!(span(512, 512), (0, 4096, 512, 512));
        assert_eq!(span(7680, 1024), (4096, 8192, 3584, 1024));
        assert_eq!(span(8192, 4096), (8192, 4096, 0, 4096));
        assert_eq!(span(512, 1 << 20), (0, 128 << 10, 512, (128 << 10) - 512));
        assert_eq!(span(4096, 1 << 20), (4096, 128 << 10, 0, 128 << 10));
        assert!(Span::new(4096, 0, 8192).is_whole() && !Span::new(4096, 0, 512).is_whole());
        let span = Span::new(4096, 1024, 512);
        assert_eq!([0, 1024, 1100, 1536, 4096].map(|moved| span.part_of(moved)), [0, 0, 76, 512, 512]);
    }
}

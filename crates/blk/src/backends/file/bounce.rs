//! Aligned memory that stands in for guest buffers which are not.

use std::os::fd::AsFd;

use virtio::Segment;
use virtio::memory::{gather, scatter};

const PAGE_BYTES: usize = 4096;
/// Pages of one buffer; longer transfers go in several.
const PAGES: usize = 32;
/// The most that one transfer through it moves.
pub(super) const BOUNCE_BYTES: u64 = (PAGES * PAGE_BYTES) as u64;

#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u8; PAGE_BYTES]);

/// A buffer of [`BOUNCE_BYTES`], aligned to pages.
pub(super) struct Bounce(Box<[Page]>);

impl Bounce {
    pub(super) fn new() -> Self {
        Self(vec![Page([0; PAGE_BYTES]); PAGES].into_boxed_slice())
    }

    pub(super) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.0.as_mut_ptr().cast()
    }

    /// Fills the first `len` bytes from the segments' bytes at `from`.
    pub(super) fn gather(&mut self, segments: &[Segment], from: usize, len: usize) {
        for (i, page) in self.0.iter_mut().enumerate().take(len.div_ceil(PAGE_BYTES)) {
            let here = (len - i * PAGE_BYTES).min(PAGE_BYTES);
            gather(segments, from + i * PAGE_BYTES, &mut page.0[..here]);
        }
    }

    /// Copies the first `len` bytes to the segments' bytes at `to`.
    pub(super) fn scatter(&self, segments: &[Segment], to: usize, len: usize) {
        for (i, page) in self.0.iter().enumerate().take(len.div_ceil(PAGE_BYTES)) {
            let here = (len - i * PAGE_BYTES).min(PAGE_BYTES);
            scatter(segments, to + i * PAGE_BYTES, &page.0[..here]);
        }
    }

    /// Whether a read from `file`, which is `bytes` long, succeeds at that alignment of offset, length and address.
    pub(super) fn probe(file: impl AsFd, align: usize, bytes: u64) -> bool {
        let mut pages = vec![Page([0; PAGE_BYTES]); 2];
        let offset = if bytes >= 2 * align as u64 { align as u64 } else { 0 };
        // One page is aligned to all that is tried, so the buffer starts `align` bytes into one.
        let at = align % PAGE_BYTES;
        let page = &mut pages[0].0;
        let end = if at == 0 { PAGE_BYTES } else { at + align };
        rustix::io::pread(file, &mut page[at..end], offset).is_ok()
    }
}

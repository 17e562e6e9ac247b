//! The host's entropy, fetched a block at a time: a system call costs more than the bytes of a small request.

use rustix::io;
use rustix::rand::{GetRandomFlags, getrandom};

/// Bytes fetched at once.
const BLOCK_BYTES: usize = 4096;

/// Fills some of the buffer and returns how much. Must not block.
type Source = fn(&mut [u8]) -> io::Result<usize>;

/// Random bytes, each of which is given away once.
pub(crate) struct Entropy {
    block: Box<[u8; BLOCK_BYTES]>,
    /// How many at the block's start have not been given away.
    left: usize,
    source: Source,
}

impl Entropy {
    /// The kernel's generator, the one behind `/dev/urandom`. It has nothing only before the host has seeded it.
    pub(crate) fn of_host() -> Self {
        Self::new(|bytes| getrandom(bytes, GetRandomFlags::NONBLOCK))
    }

    fn new(source: Source) -> Self {
        Self { block: Box::new([0; BLOCK_BYTES]), left: 0, source }
    }

    /// Fetches a block if there is nothing left; false if there still is nothing.
    pub(crate) fn refill(&mut self) -> bool {
        if self.left == 0 {
            self.left = (self.source)(self.block.as_mut_slice()).unwrap_or(0);
        }
        self.left > 0
    }

    /// Gives `give` at most `wanted` bytes, those that are left, and forgets them.
    pub(crate) fn take(&mut self, wanted: u64, give: impl FnOnce(&[u8]) -> usize) -> usize {
        let len = usize::try_from(wanted).map_or(self.left, |wanted| wanted.min(self.left));
        let bytes = &mut self.block[self.left - len..self.left];
        let given = give(bytes);
        bytes.fill(0);
        self.left -= len;
        given
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_given_once_and_forgotten() {
        let mut entropy = Entropy::new(|bytes| {
            bytes[..3].copy_from_slice(&[7, 8, 9]);
            Ok(3)
        });
        let mut seen = Vec::new();
        let mut take = |entropy: &mut Entropy, wanted| {
            entropy.take(wanted, |bytes| {
                seen.extend_from_slice(bytes);
                bytes.len()
            })
        };
        assert!(entropy.refill());
        assert_eq!(take(&mut entropy, 2), 2);
        assert!(entropy.refill());
        assert_eq!(take(&mut entropy, u64::MAX), 1, "what is left, not what is wanted");
        assert_eq!(seen, [8, 9, 7]);
        assert!(entropy.block.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn a_host_without_entropy_is_no_error() {
        let mut entropy = Entropy::new(|_| Err(io::Errno::AGAIN));
        assert!(!entropy.refill());
        assert_eq!(entropy.take(5, <[u8]>::len), 0);
    }
}

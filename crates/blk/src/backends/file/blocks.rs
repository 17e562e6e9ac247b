//! Claims on blocks: keep a part of a block from being written while the rest of it changes.
//!
//! Where storage takes only whole blocks, a write of a part of one reads the block, changes the part and writes it back.
//! A write of any other part that comes between the two would be undone. So such a write has its blocks to itself
//! (*exclusive*), and writes of whole blocks have theirs together with others of their kind (*shared*): whoever cannot
//! have all of its blocks takes none and waits. Reads need no permission, since bytes that are written back do not change.
//!
//! There is one table for all queues of a disk, of one atomic word per block; blocks whose numbers differ by a multiple of
//! its size share a word. Nothing here blocks: a queue asks again in its next turn, and before its thread sleeps it leaves
//! an eventfd that is written to when blocks are given back.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Words in the table. So many that even long writes seldom meet the blocks of others by chance.
const WORDS: u64 = 1 << 16;
/// One has it to itself.
const EXCLUSIVE: u16 = 1 << 15;
/// One wants it so: no further ones get it together until it was free once.
const WANTED: u16 = 1 << 14;
/// Those that have it together.
const SHARED_MAX: u16 = WANTED - 1;

/// How a write needs its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    Shared,
    Exclusive,
}

/// Blocks that a write has. They are given back by [`Blocks::release`].
#[derive(Debug)]
pub(super) struct Claim {
    first: u64,
    count: u64,
    need: Need,
}

/// The table of a disk.
#[derive(Debug)]
pub(super) struct Blocks {
    block_bytes: u64,
    words: Box<[AtomicU16]>,
    /// Somebody is in `waiters`.
    awaited: AtomicBool,
    waiters: Mutex<Vec<Arc<OwnedFd>>>,
}

impl Blocks {
    /// A table for a disk of blocks of `block_bytes`.
    pub(super) fn new(block_bytes: u64) -> Self {
        Self {
            block_bytes,
            words: (0..WORDS).map(|_| AtomicU16::new(0)).collect(),
            awaited: AtomicBool::new(false),
            waiters: Mutex::default(),
        }
    }

    /// Takes all blocks of a range, or, if one of them is not to be had now, none.
    pub(super) fn claim(&self, offset: u64, len: u64, need: Need) -> Option<Claim> {
        let first = offset / self.block_bytes;
        let count = ((offset + len).div_ceil(self.block_bytes) - first).min(WORDS);
        // What is taken and given back again wakes those who wait, this one among them.
        if count > 1 && !self.look_free(first, count, need) {
            return None;
        }
        for block in first..first + count {
            let word = self.word(block);
            let taken = match need {
                Need::Shared => take_shared(word),
                Need::Exclusive => take_exclusive(word),
            };
            if !taken {
                if block > first {
                    self.release(Claim { first, count: block - first, need });
                }
                return None;
            }
        }
        Some(Claim { first, count, need })
    }

    /// Whether blocks may be had. Those that others have together are marked as wanted.
    fn look_free(&self, first: u64, count: u64, need: Need) -> bool {
        let is_free = |block| {
            let word = self.word(block);
            match (need, word.load(Ordering::SeqCst)) {
                (_, 0 | WANTED) => true,
                (Need::Shared, state) => state < SHARED_MAX,
                (Need::Exclusive, _) => {
                    want(word);
                    false
                }
            }
        };
        // All of them are looked at: each is to be marked.
        (first..first + count).filter(|&block| !is_free(block)).count() == 0
    }

    /// Gives blocks back.
    pub(super) fn release(&self, claim: Claim) {
        for block in claim.first..claim.first + claim.count {
            let word = self.word(block);
            match claim.need {
                Need::Shared => word.fetch_sub(1, Ordering::SeqCst),
                Need::Exclusive => word.swap(0, Ordering::SeqCst),
            };
        }
        // Sequentially consistent, as is `wait_for_release`: either this sees who waits, or that one sees free blocks.
        if self.awaited.load(Ordering::SeqCst) {
            self.wake();
        }
    }

    /// Has `event` written to when blocks are given back the next time. To be called before the last attempt to claim
    /// blocks, and not after it.
    pub(super) fn wait_for_release(&self, event: &Arc<OwnedFd>) {
        let mut waiters = self.waiters.lock().unwrap_or_else(PoisonError::into_inner);
        if !waiters.iter().any(|waiter| Arc::ptr_eq(waiter, event)) {
            waiters.push(event.clone());
        }
        self.awaited.store(true, Ordering::SeqCst);
    }

    #[cold]
    fn wake(&self) {
        let mut waiters = self.waiters.lock().unwrap_or_else(PoisonError::into_inner);
        self.awaited.store(false, Ordering::SeqCst);
        for waiter in waiters.drain(..) {
            // It does not block, and where it is full it is readable.
            let _ = rustix::io::write(waiter, &1u64.to_ne_bytes());
        }
    }

    fn word(&self, block: u64) -> &AtomicU16 {
        &self.words[(block % WORDS) as usize]
    }
}

fn take_shared(word: &AtomicU16) -> bool {
    let next = |state: u16| match state {
        // Whoever wanted it had a chance when it became free, or is gone.
        WANTED => Some(1),
        state if state < SHARED_MAX => Some(state + 1),
        _ => None,
    };
    word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, next).is_ok()
}

fn take_exclusive(word: &AtomicU16) -> bool {
    let next = |state: u16| match state {
        0 | WANTED => Some(EXCLUSIVE),
        EXCLUSIVE => None,
        shared => Some(shared | WANTED),
    };
    // What was there before tells what became of it.
    matches!(word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, next), Ok(0 | WANTED))
}

/// Marks what others have together as wanted by one alone.
fn want(word: &AtomicU16) {
    let next = |state: u16| (0 < state && state < WANTED).then_some(state | WANTED);
    let _ = word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, next);
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    #[test]
    fn whole_blocks_are_written_together_and_parts_alone() {
        let blocks = Blocks::new(4096);
        let whole = |at: u64, count: u64| blocks.claim(at * 4096, count * 4096, Need::Shared);
        let part = |offset: u64, len: u64| blocks.claim(offset, len, Need::Exclusive);
        let (a, b) = (whole(1, 2).unwrap(), whole(2, 2).unwrap());
        assert!(part(8192, 512).is_none() && part(512, 4096).is_none());
        let c = part(512, 512).unwrap();
        assert!(part(1024, 512).is_none() && whole(0, 1).is_none() && whole(0, 9).is_none());
        assert!(whole(2, 1).is_none(), "it is wanted");
        blocks.release(a);
        blocks.release(b);
        let d = part(8192 + 512, 4096).unwrap();
        assert!(whole(3, 1).is_none());
        let e = whole(4, 1).unwrap();
        for claim in [c, d, e] {
            blocks.release(claim);
        }
        let all = whole(0, 1 << 20).unwrap();
        blocks.release(all);
        assert!(blocks.words.iter().all(|word| word.load(Ordering::SeqCst) == 0));
    }

    /// One who wanted blocks and is gone keeps nobody from them.
    #[test]
    fn a_wish_ends_when_the_block_is_free() {
        let blocks = Blocks::new(4096);
        let shared = || blocks.claim(0, 4096, Need::Shared);
        let a = shared().unwrap();
        assert!(blocks.claim(0, 512, Need::Exclusive).is_none());
        assert!(shared().is_none());
        blocks.release(a);
        blocks.release(shared().unwrap());
        assert!(blocks.claim(0, 512, Need::Exclusive).is_some());
    }

    #[test]
    fn who_waits_is_told() {
        let blocks = Blocks::new(4096);
        let event = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        let rung = || rustix::io::read(&event, &mut [0; 8]).is_ok();
        blocks.release(blocks.claim(0, 512, Need::Exclusive).unwrap());
        assert!(!rung());
        blocks.wait_for_release(&event);
        blocks.release(blocks.claim(0, 512, Need::Exclusive).unwrap());
        assert!(rung());
        blocks.release(blocks.claim(0, 512, Need::Shared).unwrap());
        assert!(!rung(), "once");
    }

    /// Else a thread that waits would wake itself for as long as the block is taken.
    #[test]
    fn an_attempt_in_vain_wakes_nobody() {
        let blocks = Blocks::new(4096);
        let event = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        for need in [Need::Exclusive, Need::Shared] {
            let second = blocks.claim(4096, 512, Need::Exclusive).unwrap();
            blocks.wait_for_release(&event);
            assert!(blocks.claim(512, 8192, need).is_none());
            assert!(rustix::io::read(&event, &mut [0; 8]).is_err(), "{need:?}");
            blocks.release(second);
            assert!(rustix::io::read(&event, &mut [0; 8]).is_ok());
        }
        let shared = blocks.claim(4096, 4096, Need::Shared).unwrap();
        assert!(blocks.claim(512, 8192, Need::Exclusive).is_none());
        assert!(blocks.claim(4096, 4096, Need::Shared).is_none(), "it is wanted");
        blocks.release(shared);
        assert!(blocks.claim(512, 8192, Need::Exclusive).is_some());
    }

    #[test]
    fn threads_have_parts_of_a_block_one_after_the_other() {
        let blocks = Blocks::new(4096);
        let (inside, most) = (AtomicU16::new(0), AtomicU16::new(0));
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (blocks, inside, most) = (&blocks, &inside, &most);
                scope.spawn(move || {
                    for round in 0..2000 {
                        let need = if (thread + round) % 3 == 0 { Need::Exclusive } else { Need::Shared };
                        let claim = loop {
                            match blocks.claim(512, 4096, need) {
                                Some(claim) => break claim,
                                None => std::thread::yield_now(),
                            }
                        };
                        let add = if need == Need::Exclusive { 256 } else { 1 };
                        most.fetch_max(inside.fetch_add(add, Ordering::SeqCst) + add, Ordering::SeqCst);
                        std::hint::spin_loop();
                        inside.fetch_sub(add, Ordering::SeqCst);
                        blocks.release(claim);
                    }
                });
            }
        });
        let most = most.into_inner();
        assert!(most <= 256, "{most:#x}: others beside an exclusive one");
    }
}

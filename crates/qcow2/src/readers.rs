//! Guards of host clusters that threads may be reading or writing on the word of an older map.
//!
//! A thread looks a cluster up, and some time later its data arrive there. A cluster that was freed meanwhile must not be
//! given to other data before that. Each thread announces the epoch in which its oldest operation began; a cluster freed
//! in an epoch may be used again when no thread has an operation of that epoch or an older one.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};

/// Announced by a thread without operations.
const IDLE: u64 = u64::MAX;

/// The epochs of an image.
#[derive(Debug, Default)]
pub struct Readers {
    epoch: AtomicU64,
    oldest: Mutex<Vec<Arc<AtomicU64>>>,
}

impl Readers {
    /// For a thread that looks clusters up.
    #[must_use]
    pub fn register(self: &Arc<Self>) -> Reader {
        let oldest = Arc::new(AtomicU64::new(IDLE));
        self.oldest.lock().unwrap_or_else(PoisonError::into_inner).push(oldest.clone());
        Reader { readers: self.clone(), oldest, begun: VecDeque::new() }
    }

    /// Ends the epoch in which something was freed, after the mapping to it is gone from the map; returns the epoch.
    pub(crate) fn end_epoch(&self) -> u64 {
        self.epoch.fetch_add(1, Ordering::SeqCst)
    }

    /// The oldest epoch of which an operation is under way; `u64::MAX` if there is none.
    pub(crate) fn oldest(&self) -> u64 {
        // The mappings that are gone were seen to be gone by every thread whose announcement is not seen here.
        fence(Ordering::SeqCst);
        let oldest = self.oldest.lock().unwrap_or_else(PoisonError::into_inner);
        oldest.iter().map(|epoch| epoch.load(Ordering::Relaxed)).min().unwrap_or(IDLE)
    }
}

/// A thread that looks clusters up.
#[derive(Debug)]
pub struct Reader {
    readers: Arc<Readers>,
    oldest: Arc<AtomicU64>,
    /// Epochs with their operations under way, oldest first.
    begun: VecDeque<(u64, usize)>,
}

impl Reader {
    /// Begins an operation, before its clusters are looked up. Returns its epoch.
    #[inline]
    pub fn begin(&mut self) -> u64 {
        let epoch = self.readers.epoch.load(Ordering::Relaxed);
        match self.begun.back_mut() {
            Some((last, count)) if *last == epoch => *count += 1,
            _ => {
                if self.begun.is_empty() {
                    self.oldest.store(epoch, Ordering::Relaxed);
                    // The announcement is visible before anything is looked up.
                    fence(Ordering::SeqCst);
                }
                self.begun.push_back((epoch, 1));
            }
        }
        epoch
    }

    /// Ends an operation of `epoch`, whose data have arrived.
    #[inline]
    pub fn end(&mut self, epoch: u64) {
        if let Some((_, count)) = self.begun.iter_mut().find(|(begun, _)| *begun == epoch) {
            *count -= 1;
        }
        while let Some((_, 0)) = self.begun.front() {
            self.begun.pop_front();
            let oldest = self.begun.front().map_or(IDLE, |&(epoch, _)| epoch);
            self.oldest.store(oldest, Ordering::Release);
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut all = self.readers.oldest.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|oldest| !Arc::ptr_eq(oldest, &self.oldest));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_is_over_when_its_last_operation_is() {
        let readers = Arc::new(Readers::default());
        let (mut a, mut b) = (readers.register(), readers.register());
        assert_eq!(readers.oldest(), IDLE);
        let first = a.begin();
        let freed = readers.end_epoch();
        let (second, other) = (a.begin(), b.begin());
        assert!(readers.oldest() <= freed);
        a.end(first);
        assert!(readers.oldest() > freed, "operations that began later do not count");
        let freed = readers.end_epoch();
        a.end(second);
        assert!(readers.oldest() <= freed);
        b.end(other);
        assert_eq!(readers.oldest(), IDLE);
        drop((a, b));
        assert!(readers.oldest.lock().unwrap().is_empty());
    }
}

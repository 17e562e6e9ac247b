//! Shares of the mappings that this process can have, one for each device.
//!
//! Memory is mapped as peers ask for it, and both the kernel and the table of [`super::sigbus`] have a limit for the whole
//! process. With a share for each device no peer can take what another one needs.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{MappingError, REGIONS_MAX, sigbus};

/// The most mappings for one device: a whole memory table, once more while another replaces it, and the logs and records
/// beside them.
pub const MAPPINGS_PER_DEVICE_MAX: usize = 2 * REGIONS_MAX + 6;

/// Devices that have a share.
static DEVICES: AtomicUsize = AtomicUsize::new(0);

/// The share of one device. Clones are the same share.
#[derive(Clone, Debug)]
pub struct Quota(Arc<Held>);

/// Mappings made within the share and not gone yet.
#[derive(Debug, Default)]
struct Held(AtomicUsize);

/// A place in the share, for as long as it lives.
#[derive(Debug)]
pub(super) struct Place(Arc<Held>);

impl Quota {
    /// The share of one more device.
    #[must_use]
    pub fn new() -> Self {
        DEVICES.fetch_add(1, Ordering::Relaxed);
        Self(Arc::default())
    }

    /// Mappings that it allows now: [`MAPPINGS_PER_DEVICE_MAX`], or an equal part of what there is for very many devices.
    ///
    /// Such a part shrinks with every device that comes, but nothing is taken back: until those that came before have let
    /// go of what is beyond it, the table may be full before a device has all of its part. That is so with more than 60
    /// devices, each of which has many regions.
    #[must_use]
    pub fn max(&self) -> usize {
        let devices = DEVICES.load(Ordering::Relaxed).max(1);
        MAPPINGS_PER_DEVICE_MAX.min(sigbus::MAPPINGS_MAX / devices)
    }

    /// A place for one more mapping.
    pub(super) fn take(&self) -> Result<Place, MappingError> {
        let max = self.max();
        let take = |held| (held < max).then_some(held + 1);
        match self.0.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take) {
            Ok(_) => Ok(Place(self.0.clone())),
            Err(_) => Err(MappingError::Quota { max }),
        }
    }
}

impl Default for Quota {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        DEVICES.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_takes_all_it_can_leaves_others_theirs() {
        // More than one table of the whole process ever had.
        let quotas: Vec<Quota> = (0..12).map(|_| Quota::new()).collect();
        let all: Vec<Vec<Place>> = quotas
            .iter()
            .map(|quota| {
                let places = std::iter::from_fn(|| quota.take().ok()).collect::<Vec<_>>();
                assert_eq!(places.len(), MAPPINGS_PER_DEVICE_MAX);
                places
            })
            .collect();
        assert!(
            matches!(quotas[0].take(), Err(MappingError::Quota { max }) if max == MAPPINGS_PER_DEVICE_MAX)
        );
        drop(all);
        let many: Vec<Quota> = (0..500).map(|_| Quota::new()).collect();
        let part = many[0].max();
        assert!(part < MAPPINGS_PER_DEVICE_MAX && part * many.len() <= sigbus::MAPPINGS_MAX);
        assert_eq!(sigbus::MAPPINGS_MAX / MAPPINGS_PER_DEVICE_MAX, 60, "as documented");
        drop(many);
        assert!(quotas[0].take().is_ok(), "what is gone counts no more");
    }
}

//! Shares of the mappings that this process can have, one for each device.
//!
//! Memory is mapped as peers ask for it, and both the kernel and the table of [`super::sigbus`] have a limit for the whole
//! process. So has the address space: a file of any length costs its owner nothing. With a share for each device no peer
//! can take what another one needs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::{MappingError, REGIONS_MAX, sigbus};

/// The most mappings for one device: a whole memory table, once more while another replaces it, and the logs and records
/// beside them.
pub const MAPPINGS_PER_DEVICE_MAX: usize = 2 * REGIONS_MAX + 6;

/// The most bytes mapped for one device: twice the largest guest while its memory table is replaced.
pub const MAPPED_BYTES_PER_DEVICE_MAX: u64 = 16 << 40;
/// The most for all of them: half of the address space.
const MAPPED_BYTES_MAX: u64 = 64 << 40;

/// Devices that have a share.
static DEVICES: AtomicUsize = AtomicUsize::new(0);

/// The share of one device. Clones are the same share.
#[derive(Clone, Debug)]
pub struct Quota(Arc<Held>);

/// Mappings made within the share and not gone yet.
#[derive(Debug, Default)]
struct Held {
    mappings: AtomicUsize,
    bytes: AtomicU64,
}

/// A place in the share, for as long as it lives.
#[derive(Debug)]
pub(super) struct Place {
    held: Arc<Held>,
    bytes: u64,
}

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

    /// Bytes that it allows now: [`MAPPED_BYTES_PER_DEVICE_MAX`], or an equal part of what there is.
    #[must_use]
    pub fn max_bytes(&self) -> u64 {
        let devices = DEVICES.load(Ordering::Relaxed).max(1) as u64;
        MAPPED_BYTES_PER_DEVICE_MAX.min(MAPPED_BYTES_MAX / devices)
    }

    /// A place for one more mapping of this many bytes.
    pub(super) fn take(&self, bytes: u64) -> Result<Place, MappingError> {
        let (max, max_bytes) = (self.max(), self.max_bytes());
        let take = |held| (held < max).then_some(held + 1);
        let taken = self.0.mappings.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        taken.map_err(|_| MappingError::Quota { max })?;
        // From here on it is given back with the place.
        let mut place = Place { held: self.0.clone(), bytes: 0 };
        let take = |held: u64| held.checked_add(bytes).filter(|&held| held <= max_bytes);
        let taken = self.0.bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        taken.map_err(|_| MappingError::QuotaBytes { len: bytes, max_bytes })?;
        place.bytes = bytes;
        Ok(place)
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
        self.held.mappings.fetch_sub(1, Ordering::Relaxed);
        self.held.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
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
                let places = std::iter::from_fn(|| quota.take(4096).ok()).collect::<Vec<_>>();
                assert_eq!(places.len(), MAPPINGS_PER_DEVICE_MAX);
                places
            })
            .collect();
        assert!(
            matches!(quotas[0].take(4096), Err(MappingError::Quota { max }) if max == MAPPINGS_PER_DEVICE_MAX)
        );
        drop(all);
        let many: Vec<Quota> = (0..500).map(|_| Quota::new()).collect();
        let part = many[0].max();
        assert!(part < MAPPINGS_PER_DEVICE_MAX && part * many.len() <= sigbus::MAPPINGS_MAX);
        assert_eq!(sigbus::MAPPINGS_MAX / MAPPINGS_PER_DEVICE_MAX, 60, "as documented");
        drop(many);
        assert!(quotas[0].take(4096).is_ok(), "what is gone counts no more");
    }

    /// A peer's files may have any length.
    #[test]
    fn a_device_cannot_take_all_of_the_address_space() {
        let (one, other) = (Quota::new(), Quota::new());
        let places: Vec<Place> = (12..=46).rev().filter_map(|bits| one.take(1 << bits).ok()).collect();
        let bytes: u64 = places.iter().map(|place| place.bytes).sum();
        assert!(bytes <= MAPPED_BYTES_PER_DEVICE_MAX && bytes > MAPPED_BYTES_PER_DEVICE_MAX / 2);
        let full = std::iter::from_fn(|| one.take(1 << 40).ok()).collect::<Vec<_>>();
        assert!(matches!(one.take(1 << 40), Err(MappingError::QuotaBytes { .. })));
        assert!(other.take(1 << 40).is_ok());
        drop((places, full));
        assert!(one.take(1 << 43).is_ok(), "what is gone counts no more");
    }
}

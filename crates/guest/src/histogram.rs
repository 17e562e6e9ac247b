//! Durations counted in buckets, because a run has millions of them.
//!
//! Every power of two is cut into 64 equal buckets, so what is read back is off by less than 1/64 of itself. The unit
//! is the tick: nothing is converted while requests are in flight.

use alloc::boxed::Box;
use alloc::vec;

/// Buckets per power of two: 2^6.
const FINE_BITS: u32 = 6;
const FINE: usize = 1 << FINE_BITS;
/// Durations from 2^40 ticks on (minutes) share the last bucket.
const TICKS_BITS: u32 = 40;
const BUCKETS: usize = FINE * (TICKS_BITS - FINE_BITS + 1) as usize;

/// Counts of durations, in ticks.
#[derive(Clone)]
pub struct Histogram {
    counts: Box<[u64]>,
    total: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; BUCKETS].into_boxed_slice(), total: 0 }
    }
}

impl Histogram {
    /// Counts one.
    #[inline(always)]
    pub fn record(&mut self, ticks: u64) {
        self.counts[bucket(ticks)] += 1;
        self.total += 1;
    }

    /// How many were counted.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.counts.fill(0);
        self.total = 0;
    }

    /// Counts what `other` has counted.
    pub fn merge(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.total += other.total;
    }

    /// What `permille` of a thousand durations do not exceed, in ticks: the middle of its bucket. 0 without any.
    #[must_use]
    pub fn quantile(&self, permille: u32) -> f64 {
        let rank = (u128::from(self.total) * u128::from(permille)).div_ceil(1000).max(1);
        let mut seen = 0;
        let found = self.counts.iter().position(|&count| {
            seen += u128::from(count);
            seen >= rank
        });
        found.map_or(0.0, middle)
    }
}

#[inline(always)]
fn bucket(ticks: u64) -> usize {
    let octave = (63 - (ticks | 1).leading_zeros()).saturating_sub(FINE_BITS);
    let index = ((octave as usize) << FINE_BITS) + (ticks >> octave) as usize;
    index.min(BUCKETS - 1)
}

/// From the second octave on, `ticks >> octave` is 64 to 127: a bucket's octave is its index's, less one.
fn middle(index: usize) -> f64 {
    if index < 2 * FINE {
        return index as f64;
    }
    let octave = (index >> FINE_BITS) - 1;
    let low = (index - (octave << FINE_BITS)) << octave;
    low as f64 + (1_u64 << octave) as f64 / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_duration_is_read_back_within_a_64th() {
        let mut ticks = 1_u64;
        while ticks < 1 << TICKS_BITS {
            let back = middle(bucket(ticks));
            assert!((back - ticks as f64).abs() <= ticks as f64 / 64.0, "{ticks} came back as {back}");
            ticks += ticks / 97 + 1;
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn quantiles_are_ranks() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.quantile(500), 0.0);
        (1..=100).for_each(|ticks| histogram.record(ticks));
        assert_eq!([1, 10, 500, 990, 1000].map(|q| histogram.quantile(q)), [1.0, 1.0, 50.0, 99.0, 100.0]);
        let mut other = Histogram::default();
        other.record(7);
        other.merge(&histogram);
        assert_eq!((other.total(), other.quantile(0)), (101, 1.0));
        other.clear();
        assert_eq!((other.total(), other.quantile(500)), (0, 0.0));
    }
}

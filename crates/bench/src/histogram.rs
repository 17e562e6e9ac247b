//! Latencies counted in buckets, because a run has millions of them.
//!
//! Log-linear: every power of two is cut into 64 equal buckets, so a value read back is off by less than 1/64 of
//! itself, and recording one is a shift and an increment.

/// Buckets per power of two: 2^6.
const SUB_BITS: u32 = 6;
const SUB: usize = 1 << SUB_BITS;
/// Values from 2^38 ns (4.5 minutes) on share the last bucket.
const VALUE_BITS: u32 = 38;
const BUCKETS: usize = SUB * (VALUE_BITS - SUB_BITS + 1) as usize;

/// Counts of nanosecond values.
#[derive(Clone, Debug)]
pub(crate) struct Histogram {
    counts: Box<[u64]>,
    total: u64,
}

impl Histogram {
    pub(crate) fn new() -> Self {
        Self { counts: vec![0; BUCKETS].into_boxed_slice(), total: 0 }
    }

    #[inline(always)]
    pub(crate) fn record(&mut self, ns: u64) {
        self.counts[bucket(ns)] += 1;
        self.total += 1;
    }

    /// How many values were recorded.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    pub(crate) fn clear(&mut self) {
        self.counts.fill(0);
        self.total = 0;
    }

    /// The value that a fraction of all values does not exceed, as the middle of its bucket; `None` without values.
    pub(crate) fn quantile(&self, fraction: f64) -> Option<f64> {
        let rank = ((fraction * self.total as f64).ceil() as u64).clamp(1, self.total.max(1));
        let mut seen = 0;
        self.counts.iter().enumerate().find_map(|(index, &count)| {
            seen += count;
            (count > 0 && seen >= rank).then(|| middle(index))
        })
    }
}

/// Below 64 a value is its own bucket; above, the 6 bits after the leading one choose it.
#[inline(always)]
fn bucket(ns: u64) -> usize {
    let octave = (63 - (ns | 1).leading_zeros()).saturating_sub(SUB_BITS);
    let index = ((octave as usize) << SUB_BITS) + (ns >> octave) as usize;
    index.min(BUCKETS - 1)
}

/// The middle of a bucket. From the second octave on, `ns >> octave` lies in 64..128, so bucket indices overlap by
/// one octave: index `(octave << 6) + 64..128`.
fn middle(index: usize) -> f64 {
    if index < 2 * SUB {
        return index as f64;
    }
    let octave = (index >> SUB_BITS) - 1;
    let low = (index - (octave << SUB_BITS)) as u64;
    (low << octave) as f64 + (1_u64 << octave) as f64 / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_values_are_exact() {
        for ns in 0..128 {
            assert_eq!(middle(bucket(ns)), ns as f64);
        }
    }

    #[test]
    fn every_value_is_read_back_within_a_64th() {
        let mut ns = 1_u64;
        while ns < 1 << VALUE_BITS {
            let back = middle(bucket(ns));
            assert!((back - ns as f64).abs() <= ns as f64 / 64.0, "{ns} came back as {back}");
            ns += ns / 97 + 1;
        }
    }

    #[test]
    fn buckets_are_in_order_and_without_gaps() {
        let mut last = 0;
        for ns in 0..1 << 16 {
            let at = bucket(ns);
            assert!(at == last || at == last + 1, "{ns} fell into bucket {at} after {last}");
            last = at;
        }
    }

    #[test]
    fn enormous_values_share_the_last_bucket() {
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
        assert_eq!(bucket((1 << VALUE_BITS) - 1), BUCKETS - 1);
    }

    #[test]
    fn quantiles_count_from_below() {
        let mut histogram = Histogram::new();
        assert_eq!(histogram.quantile(0.5), None);
        (1..=100).for_each(|ns| histogram.record(ns));
        assert_eq!(histogram.quantile(0.0), Some(1.0));
        assert_eq!(histogram.quantile(0.5), Some(50.0));
        assert_eq!(histogram.quantile(0.99), Some(99.0));
        assert_eq!(histogram.quantile(1.0), Some(100.0));
        histogram.clear();
        assert_eq!(histogram.quantile(0.5), None);
    }
}

//! What is written to disks, and in which order: functions of a seed, so that nothing needs to be remembered to check
//! what comes back.

use crate::options::SECTOR_BYTES;

/// A sequence of numbers without a visible pattern (the generator of `java.util.SplittableRandom`, by Steele, Lea and
/// Flood).
#[derive(Clone, Debug)]
pub struct Random {
    state: u64,
}

const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

impl Random {
    /// The sequence of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// The next number.
    #[inline(always)]
    pub fn draw(&mut self) -> u64 {
        self.state = self.state.wrapping_add(STEP);
        mix(self.state)
    }

    /// The next number below `end`, which is not 0.
    #[inline(always)]
    pub fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.draw()) * u128::from(end)) >> 64) as u64
    }
}

#[inline(always)]
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Fills `sectors` with what belongs on the disk from sector `first` on.
pub fn fill(seed: u64, first: u64, sectors: &mut [u8]) {
    for (sector, bytes) in (first..).zip(sectors.chunks_mut(SECTOR_BYTES as usize)) {
        let mut random = Random::new(mix(seed ^ STEP) ^ mix(sector));
        for word in bytes.chunks_mut(8) {
            word.copy_from_slice(&random.draw().to_le_bytes()[..word.len()]);
        }
    }
}

/// The numbers from 0 to `count - 1` in an order that jumps about.
pub fn scattered(count: u64, seed: u64) -> impl Iterator<Item = u64> {
    // A stride that has no factor in common with `count` visits every number once.
    let some = count.max(1);
    let stride = (some / 2 + seed % 64..).find(|&stride| gcd(stride, some) == 1).unwrap_or(1);
    let place = move |i| (u128::from(seed) + u128::from(i) * u128::from(stride)) % u128::from(some);
    (0..count).map(move |i| place(i) as u64)
}

fn gcd(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::vec::Vec;

    use super::*;

    #[test]
    fn sectors_differ_by_seed_and_place_and_by_nothing_else() {
        let content = |seed, first, sectors: usize| {
            let mut bytes = std::vec![0; sectors * SECTOR_BYTES as usize];
            fill(seed, first, &mut bytes);
            bytes
        };
        assert_eq!(
            content(1, 5, 4)[SECTOR_BYTES as usize..],
            content(1, 6, 3),
            "requests may be cut anywhere"
        );
        let mut seen = HashSet::new();
        for (seed, sector) in [(1, 1), (1, 2), (2, 1), (2, 2), (0, 0), (0, 1)] {
            assert!(seen.insert(content(seed, sector, 1)), "{seed} {sector}");
        }
    }

    #[test]
    fn scattered_numbers_are_all_numbers_once() {
        for count in [0, 1, 2, 3, 12, 97, 256, 1000] {
            for seed in [0, 1, 63, u64::MAX] {
                let order: Vec<_> = scattered(count, seed).collect();
                let all: HashSet<_> = order.iter().copied().collect();
                assert_eq!((order.len() as u64, all.len() as u64), (count, count));
                assert!(all.iter().all(|&i| i < count));
            }
        }
        let neighbours =
            scattered(1000, 1).zip(scattered(1000, 1).skip(1)).filter(|(a, b)| b.abs_diff(*a) == 1);
        assert_eq!(neighbours.count(), 0);
    }

    #[test]
    fn random_numbers_stay_below_their_end_and_reach_all_of_it() {
        let mut random = Random::new(3);
        let seen: HashSet<_> = (0..1000).map(|_| random.below(10)).collect();
        assert_eq!(seen, (0..10).collect());
    }
}

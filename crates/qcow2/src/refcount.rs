//! Refcounts within a refcount block, 1 to 64 bits wide (section "Host cluster management").

/// Reads the refcount at `index` of a block whose refcounts are `1 << order` bits wide.
///
/// # Panics
/// The block has no such index.
#[must_use]
pub fn get(block: &[u8], order: u32, index: usize) -> u64 {
    match order {
        0..=2 => {
            let bits = 1_usize << order;
            let bit = index * bits;
            u64::from(block[bit / 8] >> (bit % 8)) & ((1 << bits) - 1)
        }
        _ => {
            let bytes = 1_usize << (order - 3);
            block[index * bytes..][..bytes].iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
        }
    }
}

/// Writes the refcount at `index`. A value that is too wide loses its upper bits: callers check against
/// `Layout::refcount_max`.
///
/// # Panics
/// The block has no such index.
pub fn set(block: &mut [u8], order: u32, index: usize, value: u64) {
    match order {
        0..=2 => {
            let bits = 1_usize << order;
            let bit = index * bits;
            let mask = (((1_u16 << bits) - 1) as u8) << (bit % 8);
            let byte = &mut block[bit / 8];
            *byte = (*byte & !mask) | ((value << (bit % 8)) as u8 & mask);
        }
        _ => {
            let bytes = 1_usize << (order - 3);
            block[index * bytes..][..bytes].copy_from_slice(&value.to_be_bytes()[8 - bytes..]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_stay_at_every_width() {
        for order in 0..=6 {
            let max = u64::MAX >> (64 - (1_u32 << order));
            let mut block = [0_u8; 64];
            let count = (64 * 8) >> order;
            for index in 0..count {
                set(&mut block, order, index, max);
                assert_eq!(get(&block, order, index), max, "order {order}");
                assert!((index + 1..count).all(|next| get(&block, order, next) == 0), "order {order}");
            }
            for index in 0..count {
                set(&mut block, order, index, 0);
                assert!((index + 1..count).all(|next| get(&block, order, next) == max), "order {order}");
                assert_eq!(get(&block, order, index), 0);
            }
        }
    }

    #[test]
    fn bit_0_is_the_least_significant_and_bytes_are_big_endian() {
        let mut block = [0_u8; 8];
        set(&mut block, 0, 0, 1);
        assert_eq!(block[0], 1);
        set(&mut block, 2, 3, 0xa);
        assert_eq!(block[1], 0xa0);
        set(&mut block, 4, 1, 0x1234);
        assert_eq!(block[2..4], [0x12, 0x34]);
    }
}

//! When the other side wants to be notified (virtio 1.2, section 2.7.7.1).

/// Whether moving an index from `old` to `new` passes `event`, the index whose use the other side waits for.
///
/// Indices are free-running modulo 2^16; the question is whether `event` is in `old..new`.
#[inline(always)]
#[must_use]
pub fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// The same for packed rings (section 2.8.10), where an event is a descriptor offset (bits 0–14) and a wrap counter
/// (bit 15), and `new` is the next offset after `count` descriptors were passed, with wrap counter `wrap`.
#[inline(always)]
pub(crate) fn need_packed_event(off_wrap: u16, new: u16, wrap: bool, count: u16, size: u16) -> bool {
    let mut event = off_wrap & 0x7fff;
    if (off_wrap >> 15 != 0) != wrap {
        event = event.wrapping_sub(size);
    }
    need_event(event, new, new.wrapping_sub(count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_is_needed_exactly_when_it_lies_in_the_range_passed() {
        for old in [0u16, 1, 0x7fff, 0xfff0, 0xffff] {
            for count in 0u16..40 {
                for delta in 0u16..60 {
                    let event = old.wrapping_add(delta).wrapping_sub(10);
                    let inside = (0..count).any(|i| old.wrapping_add(i) == event);
                    assert_eq!(
                        need_event(event, old.wrapping_add(count), old),
                        inside,
                        "{old} {count} {event}"
                    );
                }
            }
        }
    }

    #[test]
    fn packed_event_is_needed_exactly_when_its_descriptor_is_passed() {
        const SIZE: u16 = 7;
        // Positions on the doubled ring: offset plus size for an inverted wrap counter.
        for start in 0..2 * SIZE {
            for count in 0..=SIZE {
                let end = start + count;
                let (new, wrap) = (end % SIZE, (end / SIZE).is_multiple_of(2));
                for event in 0..2 * SIZE {
                    let inside = (start..end).any(|p| p % (2 * SIZE) == event);
                    // An event up to a ring's length behind or ahead is unambiguous.
                    let off_wrap = (event % SIZE) | (u16::from((event / SIZE).is_multiple_of(2)) << 15);
                    let ahead = (event + 2 * SIZE - start) % (2 * SIZE);
                    if ahead < SIZE || ahead >= 2 * SIZE - (SIZE - count) {
                        assert_eq!(
                            need_packed_event(off_wrap, new, wrap, count, SIZE),
                            inside,
                            "{start} {count} {event}"
                        );
                    }
                }
            }
        }
    }
}

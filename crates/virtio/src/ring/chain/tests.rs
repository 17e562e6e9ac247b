//! What slots keep between two chains.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;
use crate::memory::{GuestAddr, Mapping, Region};
use crate::ring::RingFormat;

const RING: RingConfig = RingConfig {
    format: RingFormat::Split,
    size: 8,
    desc: GuestAddr(0),
    driver: GuestAddr(0),
    device: GuestAddr(0),
    event_idx: false,
    indirect: true,
    in_order: false,
};

fn chains() -> Chains {
    let (mapping, _) = Mapping::anonymous("chains", 1 << 16).unwrap();
    let region = Region::new(GuestAddr(0), Arc::new(mapping)).unwrap();
    Chains::new(&RING, Arc::new(Memory::new(alloc::vec![region]).unwrap()))
}

fn take(chains: &mut Chains, descriptors: u32) -> Result<Token, RingError> {
    let byte = Descriptor { addr: GuestAddr(0), len: 1, third: 0, fourth: 0 };
    chains.take(0, |chain: &mut ChainBuilder<'_>| {
        (0..descriptors).try_for_each(|_| chain.push(byte, 0, false, 0))
    })
}

fn room(chains: &Chains) -> usize {
    chains.slots.iter().map(|slot| slot.segments.capacity()).sum()
}

#[test]
fn the_longest_chains_leave_no_more_room_behind_than_is_kept() {
    let mut chains = chains();
    let all: Vec<_> = (0..RING.size).map(|_| take(&mut chains, DESCRIPTORS_PER_CHAIN_MAX).unwrap()).collect();
    assert!(room(&chains) >= usize::from(RING.size) * DESCRIPTORS_PER_CHAIN_MAX as usize);
    for token in all {
        chains.release(token);
    }
    assert!(room(&chains) <= usize::from(RING.size) * SEGMENTS_KEPT_MAX);
    for _ in 0..RING.size {
        assert!(take(&mut chains, DESCRIPTORS_PER_CHAIN_MAX + 1).is_err());
    }
    assert!(room(&chains) <= usize::from(RING.size) * SEGMENTS_KEPT_MAX, "nor those that are refused");
}

#[test]
fn room_for_an_ordinary_chain_is_kept() {
    let mut chains = chains();
    let token = take(&mut chains, SEGMENTS_KEPT_MAX as u32).unwrap();
    let (slot, room) = (token.slot(), room(&chains));
    chains.release(token);
    assert_eq!(chains.slots[slot].segments.capacity(), SEGMENTS_KEPT_MAX);
    assert_eq!(self::room(&chains), room);
}

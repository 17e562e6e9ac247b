//! Drivers that write whatever they like: nothing panics, everything comes back, and storage is not harmed.
#![allow(clippy::unwrap_used, reason = "tests")]

mod fake;

use std::sync::Arc;

use blk::backends::{memory::Memory, null::Null};
use blk::{Backend, Blk, Options};
use fake::{Rig, Ring, header};
use proptest::collection::vec;
use proptest::prelude::*;

const DISK_BYTES: u64 = 1 << 20;

/// A type that is often one that exists, a sector that is often near an end, and anything else.
fn any_header() -> impl Strategy<Value = Vec<u8>> {
    let kind = prop_oneof![0..16u32, any::<u32>()];
    let sector =
        prop_oneof![0..2100u64, (u64::MAX - 9)..=u64::MAX, (1u64 << 54) - 2..(1 << 54) + 2, any::<u64>()];
    let whole = (kind, sector).prop_map(|(kind, sector)| header(kind, sector).to_vec());
    prop_oneof![4 => whole, 1 => vec(any::<u8>(), 0..20)]
}

/// Ranges, most of them plausible, or noise.
fn any_payload() -> impl Strategy<Value = Vec<u8>> {
    let range =
        (0..2100u64, 0..70u32, 0..3u32).prop_map(|(sector, n, flags)| fake::range(sector, n, flags).to_vec());
    prop_oneof![
        vec(range, 0..5).prop_map(|ranges| ranges.concat()),
        (0..8usize).prop_map(|sectors| vec![0xA5; sectors * 512]),
        vec(any::<u8>(), 0..700),
    ]
}

/// The bytes of a chain, cut at random: readable parts and writable lengths.
fn any_chain() -> impl Strategy<Value = (Vec<Vec<u8>>, Vec<usize>)> {
    let readable = (any_header(), any_payload(), vec(any::<prop::sample::Index>(), 0..4)).prop_map(
        |(header, payload, cuts)| {
            let all = [header, payload].concat();
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(all.len() + 1)).collect();
            cuts.sort_unstable();
            cuts.push(all.len());
            let mut from = 0;
            let parts = cuts.into_iter().map(|to| all[std::mem::replace(&mut from, to)..to].to_vec());
            parts.filter(|part| !part.is_empty()).collect()
        },
    );
    let length = prop_oneof![Just(1usize), Just(512), Just(513), 1..5000usize];
    (readable, vec(length, 0..4))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_chain_comes_back_whatever_is_in_it(
        chains in vec(any_chain(), 1..30),
        packed in any::<bool>(),
        indirect in any::<bool>(),
        in_order in any::<bool>(),
        keeps in any::<bool>(),
        features in any::<u64>(),
        read_only in any::<bool>(),
    ) {
        let backend: Arc<dyn Backend> =
            if keeps { Arc::new(Memory::new(DISK_BYTES, false).unwrap()) } else { Arc::new(Null::new(DISK_BYTES)) };
        let disk = Arc::new(Blk::new(backend, Options { read_only, ..Options::default() }).unwrap());
        let ring = if packed { Ring::PACKED } else { Ring::SPLIT };
        let mut rig = Rig::with(disk, Ring { indirect, in_order, ..ring }, features, 0);
        let mut sent = Vec::new();
        for (readable, writable) in &chains {
            let parts: Vec<&[u8]> = readable.iter().map(Vec::as_slice).collect();
            if parts.is_empty() && writable.is_empty() {
                continue;
            }
            match rig.try_send(&parts, writable, 0) {
                Some(request) => sent.push((request, writable)),
                None => break,
            }
        }
        for (request, writable) in sent {
            let room: usize = writable.iter().sum();
            let answer = rig.wait(request);
            prop_assert_eq!(answer.written as usize, room);
            if room > 0 {
                prop_assert!(answer.status() <= 2, "status {}", answer.status());
            }
        }
        prop_assert!(rig.handle.error().is_none());
        prop_assert_eq!(rig.guest.ring.free(), 256);
        if read_only && keeps {
            let zeros = vec![0; 4096];
            for sector in (0..DISK_BYTES / 512).step_by(8) {
                prop_assert_eq!(&rig.read(sector, 4096), &zeros);
            }
        }
    }
}

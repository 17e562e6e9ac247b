//! The features that an operator may withhold from the driver, by name.

use clap::builder::{PossibleValuesParser, TypedValueParser};
use virtio::features;

/// A feature with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// The name, as on the command line.
    pub name: &'static str,
    /// Its bit.
    pub bit: u64,
}

const fn feature(name: &'static str, bit: u64) -> Feature {
    Feature { name, bit }
}

/// Features of every device's rings.
pub const OF_RINGS: &[Feature] = &[
    feature("packed", features::RING_PACKED),
    feature("event-idx", features::EVENT_IDX),
    feature("indirect", features::INDIRECT_DESC),
    feature("in-order", features::IN_ORDER),
];

/// Features of a disk and its rings.
pub const OF_BLK: &[Feature] = &[
    OF_RINGS[0],
    OF_RINGS[1],
    OF_RINGS[2],
    OF_RINGS[3],
    feature("mq", blk::config::features::MQ),
    feature("flush", blk::config::features::FLUSH),
    feature("config-wce", blk::config::features::CONFIG_WCE),
    feature("discard", blk::config::features::DISCARD),
    feature("write-zeroes", blk::config::features::WRITE_ZEROES),
    feature("secure-erase", blk::config::features::SECURE_ERASE),
    feature("topology", blk::config::features::TOPOLOGY),
];

/// Parses the name of one of `features`; errors list them.
pub(crate) fn parser(features: &'static [Feature]) -> impl TypedValueParser<Value = Feature> {
    PossibleValuesParser::new(features.iter().map(|feature| feature.name)).try_map(|name| {
        features.iter().copied().find(|feature| feature.name == name).ok_or("it is none of the allowed names")
    })
}

/// All bits of `features`.
#[must_use]
pub fn bits(features: &[Feature]) -> u64 {
    features.iter().fold(0, |bits, feature| bits | feature.bit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_bits_are_unique() {
        for (index, feature) in OF_BLK.iter().enumerate() {
            assert_eq!(feature.bit.count_ones(), 1, "{}", feature.name);
            let others = &OF_BLK[index + 1..];
            assert!(others.iter().all(|other| other.name != feature.name && other.bit != feature.bit));
        }
    }

    #[test]
    fn every_ring_feature_but_the_mandatory_one_can_be_withheld() {
        assert_eq!(bits(OF_RINGS), features::RING_FEATURES & !features::VERSION_1);
    }
}

//! Headers that are accepted, and the reasons for which others are not.

use super::*;

fn header() -> Header {
    Header {
        version: 3,
        layout: Layout { cluster_bits: 16, refcount_order: 4, extended: false, external_data: false },
        disk_bytes: 1 << 30,
        l1_offset: 3 << 16,
        l1_entries: 2,
        refcount_table_offset: 1 << 16,
        refcount_table_clusters: 1,
        snapshots: 0,
        snapshots_offset: 0,
        incompatible: 0,
        compatible: compatible::LAZY_REFCOUNTS,
        autoclear: 0,
        compression: Compression::Deflate,
        backing_name: Some("base.raw".into()),
        backing_format: Some("raw".into()),
        data_file_name: None,
        bitmaps: None,
    }
}

#[test]
fn what_is_encoded_is_parsed() {
    let bytes = header().encode();
    assert_eq!(Header::parse(&bytes), Ok(header()));
    let v2 = Header { version: 2, compatible: 0, backing_format: None, ..header() };
    assert_eq!(Header::parse(&v2.encode()), Ok(v2));
    let zstd = Header {
        incompatible: incompatible::COMPRESSION | incompatible::DATA_FILE,
        compression: Compression::Zstd,
        data_file_name: Some("data".into()),
        layout: Layout { external_data: true, ..header().layout },
        ..header()
    };
    assert_eq!(Header::parse(&zstd.encode()), Ok(zstd));
}

#[test]
fn an_update_changes_nothing_else() {
    let old = header();
    let mut bytes = old.encode();
    let new = Header { disk_bytes: 2 << 30, l1_entries: 4, l1_offset: 9 << 16, ..old };
    new.update(&mut bytes);
    assert_eq!(Header::parse(&bytes), Ok(new.clone()));
    assert_eq!(bytes, new.encode());
}

#[test]
fn encrypted_images_are_refused() {
    for (method, name) in [(1, "AES"), (2, "LUKS")] {
        let mut bytes = header().encode();
        put_u32(&mut bytes, at::CRYPT_METHOD, method);
        assert_eq!(Header::parse(&bytes), Err(FormatError::Encrypted(name)));
    }
}

#[test]
fn unknown_incompatible_features_are_refused_by_name() {
    let mut bytes = Header { backing_format: None, backing_name: None, ..header() }.encode();
    put_u64(&mut bytes, at::INCOMPATIBLE_FEATURES, 1 << 7 | 1 << 9);
    put_u32(&mut bytes, 112, extension::FEATURE_NAMES);
    put_u32(&mut bytes, 116, 48);
    bytes[120..122].copy_from_slice(&[0, 9]);
    bytes[122..131].copy_from_slice(b"moonlight");
    assert_eq!(Header::parse(&bytes), Err(FormatError::Features("bit 7, moonlight (bit 9)".into())));
}

#[test]
fn fields_out_of_range_are_refused() {
    type Change = fn(&mut Header);
    let changes: [(&str, Change); 8] = [
        ("cluster_bits", |h| h.layout.cluster_bits = 22),
        ("refcount_order", |h| h.layout.refcount_order = 7),
        ("l1_size", |h| h.l1_entries = 1),
        ("l1_size", |h| h.l1_entries = (4 << 20) + 1),
        ("refcount_table_clusters", |h| h.refcount_table_clusters = 0),
        ("refcount_table_clusters", |h| h.refcount_table_clusters = 129),
        ("nb_snapshots", |h| (h.snapshots, h.snapshots_offset) = (65537, 1 << 16)),
        ("autoclear_features", |h| h.autoclear = autoclear::RAW_DATA_FILE),
    ];
    for (field, change) in changes {
        let mut wrong = header();
        change(&mut wrong);
        // `encode` needs a cluster of a size that there is.
        let mut bytes = Header { layout: header().layout, ..wrong.clone() }.encode();
        put_u32(&mut bytes, at::CLUSTER_BITS, wrong.layout.cluster_bits);
        put_u32(&mut bytes, at::REFCOUNT_ORDER, wrong.layout.refcount_order);
        let found = Header::parse(&bytes);
        assert!(
            matches!(&found, Err(FormatError::Field { field: f, .. }) if *f == field),
            "{field}: {found:?}"
        );
    }
}

#[test]
fn tables_off_the_clusters_are_refused() {
    for wrong in [
        Header { l1_offset: 0, ..header() },
        Header { l1_offset: (3 << 16) + 512, ..header() },
        Header { refcount_table_offset: !0xffff, ..header() },
    ] {
        assert!(matches!(Header::parse(&wrong.encode()), Err(FormatError::Place { .. })));
    }
}

#[test]
fn no_prefix_of_a_header_panics() {
    let bytes = header().encode();
    for len in 0..bytes.len().min(300) {
        assert!(len >= 112 || Header::parse(&bytes[..len]).is_err());
    }
}

proptest::proptest! {
    #[test]
    fn no_garbage_panics(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..400), v3: bool) {
        let mut image = header().encode();
        let _ = Header::parse(&bytes);
        for (at, &byte) in bytes.iter().enumerate() {
            if at >= 8 { image[at] = byte; }
        }
        put_u32(&mut image, at::VERSION, if v3 { 3 } else { 2 });
        let cluster_bits = 9 + u32::from(image[23]) % 13;
        put_u32(&mut image, at::CLUSTER_BITS, cluster_bits);
        let _ = Header::parse(&image);
    }
}

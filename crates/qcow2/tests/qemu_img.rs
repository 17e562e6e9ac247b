//! QEMU's tools as the oracle: images that they make are read alike here, and images made or repaired here are sound for them.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use qcow2::check::check;
use qcow2::create::{NewImage, create};
use qcow2::entry::{L2Entry, Mapping};
use qcow2::error::FormatError;
use qcow2::header::Compression;
use qcow2::image::{Image, ImageError, ReadAt};
use qcow2::inflate::Inflater;
use qcow2::layout::Layout;
use qcow2::repair::{WriteAt, repair};

/// An image's file.
struct File(fs::File);

impl File {
    fn open(path: &Path) -> Self {
        Self(fs::File::options().read(true).write(true).open(path).unwrap())
    }
}

impl ReadAt for File {
    fn read_at(&self, offset: u64, mut buffer: &mut [u8]) -> io::Result<()> {
        let mut at = offset;
        while !buffer.is_empty() {
            match self.0.read_at(buffer, at)? {
                0 => {
                    buffer.fill(0);
                    break;
                }
                len => {
                    at += len as u64;
                    buffer = &mut buffer[len..];
                }
            }
        }
        Ok(())
    }

    fn file_bytes(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }
}

impl WriteAt for File {
    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_all_at(data, offset)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.0.sync_data()
    }
}

/// A folder of the test's own; `None` after recording that the tools are not there.
fn folder(name: &str) -> Option<PathBuf> {
    for tool in ["qemu-img", "qemu-io"] {
        if Command::new(tool).arg("--version").output().is_err() {
            needs::skip(format_args!("no {tool} installed"));
            return None;
        }
    }
    let folder =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("qemu-img-{name}-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    Some(folder)
}

/// Runs a tool; returns its output, or what it complains of.
fn try_run(folder: &Path, words: &[&str]) -> Result<String, String> {
    let output = Command::new(words[0]).args(&words[1..]).current_dir(folder).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(text(&output.stdout) + &text(&output.stderr))
    }
}

fn run(folder: &Path, words: &[&str]) -> String {
    try_run(folder, words).unwrap_or_else(|error| panic!("{words:?}: {error}"))
}

/// A number in the JSON of a flat object; `None` if the object has no such key.
fn number(json: &str, key: &str) -> Option<u64> {
    let (_, rest) = json.split_once(&format!("\"{key}\": "))?;
    let len = rest.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(rest.len());
    rest[..len].parse().ok()
}

fn says(json: &str, key: &str, value: &str) -> bool {
    json.contains(&format!("\"{key}\": {value}"))
}

/// What QEMU finds in an image: corruptions, leaks, allocated clusters, compressed clusters, end of the image.
fn qemu_check(folder: &Path, image: &str) -> [u64; 5] {
    let json = try_run(folder, &["qemu-img", "check", "--output=json", image]).unwrap_or_else(|json| json);
    assert!(says(&json, "check-errors", "0"), "{json}");
    ["corruptions", "leaks", "allocated-clusters", "compressed-clusters", "image-end-offset"]
        .map(|key| number(&json, key).unwrap_or(0))
}

fn our_check(folder: &Path, image: &str) -> [u64; 5] {
    let report = check(&File::open(&folder.join(image))).unwrap();
    if let Some(finding) = report.findings.first() {
        println!("{image}: {finding}");
    }
    [
        report.corruptions,
        report.leaks,
        report.allocated_clusters,
        report.compressed_clusters,
        report.image_end,
    ]
}

fn assert_sound(folder: &Path, image: &str) {
    let (ours, qemu) = (our_check(folder, image), qemu_check(folder, image));
    assert_eq!(ours, qemu, "{image}: ours, QEMU's");
    assert_eq!(ours[..2], [0, 0], "{image}");
}

/// The entry for an offset of the disk, from the tables in the file.
fn entry(file: &File, image: &Image, offset: u64) -> L2Entry {
    let layout = image.header.layout;
    let Some(table) = image.l1[layout.l1_index(offset) as usize].table() else { return L2Entry::UNALLOCATED };
    let len = layout.l2_entry_bytes();
    let mut bytes = [0; 16];
    file.read_at(table + layout.l2_index(offset) * len, &mut bytes[..len as usize]).unwrap();
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    L2Entry { descriptor: word(0), subclusters: word(8) }
}

/// Every piece of the disk is mapped as QEMU has it.
fn assert_same_map(folder: &Path, name: &str) {
    let file = File::open(&folder.join(name));
    let image = Image::read(&file).unwrap();
    let layout = image.header.layout;
    let json = run(folder, &["qemu-img", "map", "--output=json", name]);
    let mut end = 0;
    for range in json.split('{').skip(1) {
        let (start, len) = (number(range, "start").unwrap(), number(range, "length").unwrap());
        let here = says(range, "depth", "0");
        assert_eq!(start, end, "{name}: {json}");
        end = start + len;
        let mut at = start;
        while at < end {
            let (mapping, alike) = entry(&file, &image, at).map(&layout, layout.in_cluster(at));
            let same = match mapping {
                Mapping::Data { offset, .. } => {
                    here && number(range, "offset").map(|first| first + (at - start)) == Some(offset)
                }
                Mapping::Zero => here && says(range, "present", "true") && says(range, "zero", "true"),
                Mapping::Compressed(_) => {
                    here && says(range, "data", "true") && number(range, "offset").is_none()
                }
                Mapping::Unallocated => !here || says(range, "present", "false"),
                Mapping::Invalid => false,
            };
            assert!(same, "{name}: {mapping:?} at {at:#x}, QEMU says {{{range}");
            at += alike;
        }
    }
    assert!(end >= image.header.disk_bytes, "{name}: {json}");
}

/// Every compressed cluster holds what QEMU compressed.
fn assert_inflates(folder: &Path, name: &str, raw: &str) {
    let (file, raw) = (File::open(&folder.join(name)), File::open(&folder.join(raw)));
    let image = Image::read(&file).unwrap();
    let cluster_bytes = image.header.layout.cluster_bytes();
    let mut inflater = Inflater::new(image.header.compression);
    let (mut cluster, mut expected) = (vec![0; cluster_bytes as usize], vec![0; cluster_bytes as usize]);
    let mut compressed = 0;
    for at in (0..image.header.disk_bytes).step_by(cluster_bytes as usize) {
        let Mapping::Compressed(place) = entry(&file, &image, at).map(&image.header.layout, 0).0 else {
            continue;
        };
        let mut stream = vec![0xee; place.len as usize];
        file.read_at(place.offset, &mut stream).unwrap();
        cluster.fill(0xee);
        inflater.inflate(&stream, &mut cluster).unwrap_or_else(|error| panic!("{name}, {at:#x}: {error}"));
        raw.read_at(at, &mut expected).unwrap();
        assert!(cluster == expected, "{name}, {at:#x}");
        compressed += 1;
    }
    assert!(compressed > 0, "{name}");
}

/// Data, zeros, discards, and ends that are not aligned to anything but sectors.
fn write_some(folder: &Path, image: &str) {
    let commands = [
        "write -P 1 0 192k",
        "write -P 2 1000k 3k",
        "write -z 64k 64k",
        "write -P 3 4100k 2056k",
        "discard 4608k 512k",
        "write -z -u 5M 256k",
        "write -P 4 8190k 2k",
    ];
    let words = commands.iter().flat_map(|command| ["-c", command]);
    run(folder, &["qemu-io"].into_iter().chain(words).chain([image]).collect::<Vec<_>>());
}

/// Options of images; all of 8 MiB.
const OPTIONS: [&str; 26] = [
    "compat=0.10",
    "compat=0.10,cluster_size=512",
    "compat=0.10,cluster_size=2M",
    "compat=1.1",
    "cluster_size=512",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=512,refcount_bits=1",
    "cluster_size=4k,refcount_bits=2",
    "cluster_size=2M",
    "cluster_size=2M,refcount_bits=1",
    "cluster_size=2M,extended_l2=on",
    "refcount_bits=1",
    "refcount_bits=4",
    "refcount_bits=8",
    "refcount_bits=32",
    "refcount_bits=64",
    "extended_l2=on",
    "extended_l2=on,cluster_size=16k",
    "lazy_refcounts=on",
    "preallocation=metadata",
    "preallocation=metadata,extended_l2=on",
    "preallocation=falloc",
    "preallocation=full,cluster_size=4k",
    "compression_type=zstd",
    "data_file=data,data_file_raw=off",
    "data_file=data-raw,data_file_raw=on",
];

#[test]
fn images_made_by_qemu_are_read_as_qemu_reads_them() {
    let Some(folder) = folder("options") else { return };
    for (index, options) in OPTIONS.iter().enumerate() {
        println!("{options}");
        let name = &format!("{index}.qcow2");
        run(&folder, &["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, name, "8M"]);
        assert_sound(&folder, name);
        assert_same_map(&folder, name);
        write_some(&folder, name);
        assert_sound(&folder, name);
        assert_same_map(&folder, name);
    }
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn compressed_clusters_backing_files_snapshots_and_bitmaps_are_read_as_qemu_reads_them() {
    let Some(folder) = folder("more") else { return };
    run(&folder, &["qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "8M"]);
    write_some(&folder, "base.qcow2");
    run(&folder, &["qemu-img", "convert", "-O", "raw", "base.qcow2", "base.raw"]);
    // What compresses not so well, and ends within a cluster.
    let mixed: Vec<u8> =
        (0..(8 << 20) + 1536_u64).map(|at| ((at * at / 977) >> (at / 99 % 8)) as u8).collect();
    fs::write(folder.join("mixed.raw"), mixed).unwrap();
    for (cluster_size, kind) in
        ["512", "4k", "64k", "2M"].into_iter().flat_map(|size| [(size, "zlib"), (size, "zstd")])
    {
        let options = &format!("cluster_size={cluster_size},compression_type={kind}");
        let words = [
            "qemu-img",
            "convert",
            "-c",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "-o",
            options,
            "mixed.raw",
            "mixed.qcow2",
        ];
        run(&folder, &words);
        assert_inflates(&folder, "mixed.qcow2", "mixed.raw");
    }
    for options in
        ["compression_type=zlib", "compression_type=zstd", "cluster_size=4k", "extended_l2=on", "compat=0.10"]
    {
        println!("compressed, {options}");
        let words =
            ["qemu-img", "convert", "-c", "-O", "qcow2", "-o", options, "base.qcow2", "compressed.qcow2"];
        run(&folder, &words);
        assert!(our_check(&folder, "compressed.qcow2")[3] > 0);
        assert_sound(&folder, "compressed.qcow2");
        assert_same_map(&folder, "compressed.qcow2");
        assert_inflates(&folder, "compressed.qcow2", "base.raw");
        run(&folder, &["qemu-io", "-c", "write -P 9 66k 70k", "compressed.qcow2"]);
        assert_sound(&folder, "compressed.qcow2");
        assert_same_map(&folder, "compressed.qcow2");
    }
    for (base, format) in [("base.qcow2", "qcow2"), ("base.raw", "raw")] {
        for options in ["extended_l2=on", "extended_l2=off", "compat=0.10"] {
            println!("backed by {base}, {options}");
            let words = [
                "qemu-img",
                "create",
                "-q",
                "-f",
                "qcow2",
                "-b",
                base,
                "-F",
                format,
                "-o",
                options,
                "top.qcow2",
            ];
            run(&folder, &words);
            run(&folder, &["qemu-io", "-c", "write -P 9 66k 7k", "-c", "write -z 4M 64k", "top.qcow2"]);
            let header = Image::read(&File::open(&folder.join("top.qcow2"))).unwrap().header;
            assert_eq!(
                (header.backing_name.as_deref(), header.backing_format.as_deref()),
                (Some(base), Some(format))
            );
            assert_sound(&folder, "top.qcow2");
            assert_same_map(&folder, "top.qcow2");
        }
    }
    run(&folder, &["qemu-img", "snapshot", "-c", "one", "base.qcow2"]);
    run(&folder, &["qemu-io", "-c", "write -P 9 66k 700k", "base.qcow2"]);
    run(&folder, &["qemu-img", "snapshot", "-c", "two", "base.qcow2"]);
    assert_sound(&folder, "base.qcow2");
    assert_same_map(&folder, "base.qcow2");
    for bitmap in ["a", "b"] {
        run(&folder, &["qemu-img", "bitmap", "--add", "--enable", "base.qcow2", bitmap]);
    }
    run(&folder, &["qemu-io", "-c", "write -P 10 1M 1M", "base.qcow2"]);
    assert!(Image::read(&File::open(&folder.join("base.qcow2"))).unwrap().header.bitmaps.is_some());
    assert_sound(&folder, "base.qcow2");
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn encrypted_images_are_refused() {
    let Some(folder) = folder("encrypted") else { return };
    for (format, name) in [("aes", "AES"), ("luks", "LUKS")] {
        let options = &format!("encrypt.format={format},encrypt.key-secret=s");
        let secret = "secret,id=s,data=abc";
        let words =
            ["qemu-img", "create", "-q", "--object", secret, "-f", "qcow2", "-o", options, format, "8M"];
        // QEMU times its key derivation, and gives up on a machine that is too busy for that.
        if let Err(error) = try_run(&folder, &words) {
            needs::skip(error.trim());
            continue;
        }
        let error = Image::read(&File::open(&folder.join(format))).unwrap_err();
        let expected = FormatError::Encrypted(name);
        assert!(matches!(&error, ImageError::Format(error) if *error == expected), "{error}");
    }
    fs::remove_dir_all(folder).unwrap();
}

fn make(folder: &Path, name: &str, new: &NewImage) {
    let path = folder.join(name);
    fs::write(&path, []).unwrap();
    let mut file = File::open(&path);
    for (offset, data) in create(new) {
        file.write_at(offset, &data).unwrap();
    }
}

/// Every pair of sizes, kinds of entries, versions, backing files and data files that there can be.
fn new_images() -> Vec<NewImage> {
    let mut all = Vec::new();
    for cluster_bits in [9, 12, 16, 21] {
        for refcount_order in 0..=6 {
            for extended in [false, true] {
                let layout = Layout { cluster_bits, refcount_order, extended, external_data: false };
                let compression =
                    if refcount_order % 2 == 0 { Compression::Deflate } else { Compression::Zstd };
                let new = NewImage {
                    version: 3,
                    layout,
                    disk_bytes: 8 << 20,
                    backing: None,
                    data_file: None,
                    compression,
                };
                all.push(new);
            }
        }
    }
    all.retain(|new| !new.layout.extended || new.layout.cluster_bits >= 14);
    let plain = NewImage {
        layout: Layout { cluster_bits: 16, refcount_order: 4, extended: false, external_data: false },
        compression: Compression::Deflate,
        ..all[0].clone()
    };
    let backing = Some(("base.raw".into(), "raw".into()));
    all.push(NewImage { version: 2, ..plain.clone() });
    all.push(NewImage { version: 2, backing: backing.clone(), ..plain.clone() });
    all.push(NewImage { backing, ..plain.clone() });
    for raw in [false, true] {
        let layout = Layout { external_data: true, ..plain.layout };
        all.push(NewImage { layout, data_file: Some(("data".into(), raw)), ..plain.clone() });
    }
    all
}

#[test]
fn images_made_here_are_sound_for_qemu() {
    let Some(folder) = folder("made") else { return };
    fs::write(folder.join("base.raw"), vec![5; 8 << 20]).unwrap();
    for (index, new) in new_images().iter().enumerate() {
        println!("{index}: {new:?}");
        fs::write(folder.join("data"), vec![0; 8 << 20]).unwrap();
        let name = &format!("{index}.qcow2");
        make(&folder, name, new);
        let info = run(&folder, &["qemu-img", "info", "--output=json", name]);
        assert_eq!(number(&info, "virtual-size"), Some(new.disk_bytes));
        assert_eq!(number(&info, "cluster-size"), Some(new.layout.cluster_bytes()));
        assert!(says(&info, "compat", if new.version == 2 { "\"0.10\"" } else { "\"1.1\"" }), "{info}");
        assert!(says(&info, "refcount-bits", &(1 << new.layout.refcount_order).to_string()), "{info}");
        if new.version == 3 {
            assert!(says(&info, "extended-l2", &new.layout.extended.to_string()), "{info}");
        }
        let zstd = new.compression == Compression::Zstd;
        assert!(says(&info, "compression-type", if zstd { "\"zstd\"" } else { "\"zlib\"" }), "{info}");
        if let Some((backing, format)) = &new.backing {
            assert!(says(&info, "backing-filename", &format!("\"{backing}\"")), "{info}");
            assert!(says(&info, "backing-filename-format", &format!("\"{format}\"")), "{info}");
        }
        if let Some((_, raw)) = &new.data_file {
            assert!(says(&info, "data-file-raw", &raw.to_string()), "{info}");
        }
        assert_sound(&folder, name);
        write_some(&folder, name);
        run(&folder, &["qemu-io", "-c", "read -P 1 0 64k", "-c", "read -P 3 4100k 500k", name]);
        assert_sound(&folder, name);
        assert_same_map(&folder, name);
    }
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn images_repaired_here_are_sound_for_qemu() {
    let Some(folder) = folder("repaired") else { return };
    for options in ["compat=0.10", "refcount_bits=1", "cluster_size=4k", "extended_l2=on,refcount_bits=64"] {
        println!("{options}");
        for leak in [true, false] {
            run(&folder, &["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", "8M"]);
            write_some(&folder, "a.qcow2");
            let mut file = File::open(&folder.join("a.qcow2"));
            let image = Image::read(&file).unwrap();
            let block = image.refcount_table[0];
            if leak {
                // The first entry of the first L2 table is gone, its cluster is not.
                let table = image.l1[0].table().unwrap();
                file.write_at(table, &[0; 16][..image.header.layout.l2_entry_bytes() as usize]).unwrap();
                let (ours, qemu) = (our_check(&folder, "a.qcow2"), qemu_check(&folder, "a.qcow2"));
                assert_eq!(ours[..3], qemu[..3]);
                assert_eq!(ours[1], 1);
            } else {
                file.write_at(block, &vec![0; image.header.layout.cluster_bytes() as usize]).unwrap();
                if image.header.version == 3 {
                    // The dirty bit.
                    let mut features = [0];
                    file.read_at(79, &mut features).unwrap();
                    file.write_at(79, &[features[0] | 1]).unwrap();
                }
                assert!(our_check(&folder, "a.qcow2")[0] > 0 && qemu_check(&folder, "a.qcow2")[0] > 0);
            }
            repair(&mut file).unwrap();
            assert_sound(&folder, "a.qcow2");
            assert_same_map(&folder, "a.qcow2");
            run(&folder, &["qemu-io", "-c", "read -P 3 4100k 500k", "-c", "write -P 8 0 1M", "a.qcow2"]);
            assert_sound(&folder, "a.qcow2");
        }
    }
    fs::remove_dir_all(folder).unwrap();
}

//! Images that others made, and changes of whole images: compressed clusters, chains, sizes, queues that come and go.
#![allow(clippy::unwrap_used, reason = "tests")]

mod fake;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blk::backends::file::{Engine, Lock};
use blk::backends::qcow2::{Qcow2, Qcow2Options};
use blk::{Backend, Blk, Options};
use fake::{FLUSH, IN, OK, OUT, Rig, Ring, WRITE_ZEROES, format_qcow2, header, pattern, range};

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("images-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Runs `qemu-img` here; false if this host has none.
    fn qemu_img(&self, args: &str) -> bool {
        let output = Command::new("qemu-img").args(args.split(' ')).current_dir(&self.0).output();
        let Ok(output) = output else { return false };
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "qemu-img {args}: {out}{err}");
        true
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn engines() -> [Qcow2Options; 3] {
    let plain = Qcow2Options { backing: true, ..Qcow2Options::default() };
    [
        Qcow2Options { engine: Engine::Inline, ..plain },
        Qcow2Options { engine: Engine::Uring, ..plain },
        Qcow2Options { direct: true, ..plain },
    ]
}

fn rig(image: &Path, options: Qcow2Options) -> Rig {
    Rig::new(Arc::new(Qcow2::open(image, options).unwrap()), Ring::SPLIT)
}

#[test]
fn compressed_clusters_are_read_and_rewritten() {
    let folder = Folder::new("compressed");
    let text: Vec<u8> = (0..4 << 20).map(|at: usize| ((at / 700) % 251) as u8).collect();
    std::fs::write(folder.at("raw"), &text).unwrap();
    for kind in ["zlib", "zstd"] {
        for options in engines() {
            let convert = format!("convert -c -f raw -O qcow2 -o compression_type={kind} raw image");
            if !folder.qemu_img(&convert) {
                return needs::skip("no qemu-img");
            }
            let mut rig = rig(&folder.at("image"), options);
            assert!(rig.read(0, 1 << 20) == text[..1 << 20], "{kind}, {options:?}");
            // Some at once, in one cluster and in others.
            let sent: Vec<_> =
                (0..40).map(|n| (n * 100, rig.send(&[&header(IN, n * 100)], &[4096, 1]))).collect();
            for (sector, sent) in sent {
                let at = sector as usize * 512;
                assert!(
                    rig.wait(sent).data() == &text[at..at + 4096],
                    "{kind}, {options:?}, sector {sector}"
                );
            }
            let data = pattern(1536, 5);
            rig.write(3001, &data);
            let expected = [&text[3000 * 512..3001 * 512], &data, &text[3004 * 512..3200 * 512]].concat();
            assert!(rig.read(3000, 200 * 512) == expected, "{kind}, {options:?}: the rest of the cluster");
            rig.drain();
            drop(rig);
            folder.qemu_img("check -q image");
        }
    }
}

#[test]
fn overlays_show_what_is_below_and_keep_it_as_it_is() {
    let folder = Folder::new("overlays");
    // Not of whole sectors, and shorter than the disks above.
    let below = pattern((1 << 20) + 700, 3);
    for options in engines() {
        std::fs::write(folder.at("raw"), &below).unwrap();
        if !folder.qemu_img("create -q -f qcow2 -b raw -F raw middle 2M") {
            return needs::skip("no qemu-img");
        }
        folder.qemu_img("create -q -f qcow2 -o cluster_size=4k -b middle -F qcow2 top 4M");
        let (mut expected, data) = (below.clone(), pattern(5 * 512, 9));
        expected.resize(4 << 20, 0);
        {
            let mut rig = rig(&folder.at("middle"), options);
            rig.write(130, &data);
            expected[130 * 512..135 * 512].copy_from_slice(&data);
            rig.drain();
        }
        let middle = std::fs::read(folder.at("middle")).unwrap();
        let mut rig = rig(&folder.at("top"), options);
        let read = |rig: &mut Rig| (0..4).flat_map(|mib| rig.read(mib * 2048, 1 << 20)).collect::<Vec<_>>();
        assert!(read(&mut rig) == expected, "{options:?}");
        for sector in [131, 2040, 2047, 2049, 4095, 8191] {
            rig.write(sector, &data[..512]);
            expected[sector as usize * 512..][..512].copy_from_slice(&data[..512]);
        }
        assert_eq!(rig.status(WRITE_ZEROES, 0, &range(9, 300, 1), 0), OK);
        expected[9 * 512..309 * 512].fill(0);
        assert!(read(&mut rig) == expected, "{options:?}");
        rig.drain();
        drop(rig);
        assert!(
            std::fs::read(folder.at("middle")).unwrap() == middle,
            "{options:?}: a backing file was written"
        );
        std::fs::write(folder.at("expected"), &expected).unwrap();
        folder.qemu_img("check -q top");
        folder.qemu_img("compare -q -f raw -F qcow2 expected top");
    }
}

/// The backing file's data behind the old end do not show, and what was cut off is gone.
#[test]
fn a_disk_that_grows_is_zero_behind_its_old_end() {
    let folder = Folder::new("grow");
    for options in engines() {
        std::fs::write(folder.at("raw"), pattern(4 << 20, 3)).unwrap();
        // The end is in the middle of a cluster.
        if !folder.qemu_img("create -q -f qcow2 -b raw -F raw top 1000K") {
            return needs::skip("no qemu-img");
        }
        let end = 2000;
        let mut rig = rig(&folder.at("top"), options);
        rig.write(end - 1, &[7; 512]);
        assert_eq!(rig.disk.resize(Some(3 << 20)).unwrap(), 3 << 20);
        assert!(rig.read(end - 1, 512).iter().all(|&byte| byte == 7));
        for mib in 1..3 {
            assert!(rig.read(mib * 2048, 1 << 20).iter().all(|&byte| byte == 0), "{options:?}, {mib} MiB");
        }
        assert!(rig.read(end, 48 * 512).iter().all(|&byte| byte == 0), "{options:?}: the last cluster");
        rig.write(2 * 2048 + 1, &[8; 512]);
        rig.disk.resize(Some(2 << 20)).unwrap();
        rig.disk.resize(Some(8 << 30)).unwrap();
        assert!(rig.read(2 * 2048, 1 << 20).iter().all(|&byte| byte == 0), "{options:?}: what was cut off");
        rig.write((8 << 21) - 1, &[9; 512]);
        rig.drain();
        drop(rig);
        folder.qemu_img("check -q top");
        let geometry = Qcow2::open(&folder.at("top"), options).unwrap().geometry();
        assert_eq!(geometry.bytes, 8 << 30, "the size is in the file");
    }
}

/// From this sector on, others than the test's one writer write.
const OTHERS: u64 = (1 << 21) - 128 * 8000;

/// The queue whose thread carries out the engine's commands is stopped while another's writes wait for them.
#[test]
fn a_queue_that_works_for_others_can_be_stopped() {
    let folder = Folder::new("stopped");
    for options in engines() {
        format_qcow2(&folder.at("image"), 1 << 30);
        let backend: Arc<dyn Backend> = Arc::new(Qcow2::open(&folder.at("image"), options).unwrap());
        let disk = Arc::new(Blk::new(backend.clone(), Options { queues: 3, ..Options::default() }).unwrap());
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (disk, over) = (&disk, &over);
            // Allocates all the time, each cluster anew.
            let writer = scope.spawn(move || {
                let mut rig = Rig::with(disk.clone(), Ring::SPLIT, u64::MAX, 0);
                for n in 0..2000_u64 {
                    let at = n * 997 % 16384 * 128 + n % 128;
                    let status = rig.status(OUT, at, &n.to_le_bytes().repeat(64), 0);
                    assert_eq!(status, OK, "write {n}, {options:?}");
                }
                rig.drain();
                over.store(true, Ordering::SeqCst);
            });
            // Comes, does a little, and goes, in order or not so.
            let mut round = 0;
            while !over.load(Ordering::SeqCst) {
                let mut rig = Rig::with(disk.clone(), Ring::SPLIT, u64::MAX, 1);
                for n in 0..8_u64 {
                    let at = OTHERS + 128 * (n + round % 1000 * 8);
                    rig.send(&[&header(OUT, at), &[1; 512]], &[1]);
                }
                rig.turn();
                rig.drain();
                round += 1;
            }
            assert!(round > 1, "nothing was stopped meanwhile");
            writer.join().unwrap();
        });
        let mut rig = Rig::with(disk.clone(), Ring::SPLIT, u64::MAX, 2);
        for n in 0..2000_u64 {
            let at = n * 997 % 16384 * 128 + n % 128;
            if at < OTHERS {
                assert!(rig.read(at, 512) == n.to_le_bytes().repeat(64), "write {n}, {options:?}");
            }
        }
        rig.drain();
        drop((rig, disk, backend));
        if !folder.qemu_img("check -q image") {
            return needs::skip("no qemu-img");
        }
    }
}

/// Torn down with all that it had under way, it harms nobody.
#[test]
fn a_queue_can_be_torn_down_beside_others() {
    let folder = Folder::new("torn");
    for options in engines() {
        format_qcow2(&folder.at("image"), 256 << 20);
        let backend: Arc<dyn Backend> = Arc::new(Qcow2::open(&folder.at("image"), options).unwrap());
        let disk = Arc::new(Blk::new(backend.clone(), Options { queues: 2, ..Options::default() }).unwrap());
        let mut other = Rig::with(disk.clone(), Ring::SPLIT, u64::MAX, 1);
        for round in 0..20_u64 {
            let mut rig = Rig::with(disk.clone(), Ring::SPLIT, u64::MAX, 0);
            for n in 0..16 {
                rig.send(&[&header(OUT, (round * 16 + n) * 128), &[5; 512]], &[1]);
            }
            rig.turn();
            drop(rig);
            let at = (1 << 18) + round * 128;
            // Of what was lost with the other queue nothing is answered with success that was not done.
            if other.status(OUT, at, &[6; 1024], 0) == OK {
                assert_eq!(other.read(at, 1024), [6; 1024], "round {round}, {options:?}");
            }
        }
        other.write(1 << 17, &[7; 4096]);
        assert_eq!(other.status(FLUSH, 0, &[], 0), OK);
        other.drain();
        drop((other, disk, backend));
        let check = Command::new("qemu-img").args(["check", "-q"]).arg(folder.at("image")).output();
        let Ok(check) = check else { return needs::skip("no qemu-img") };
        assert!(matches!(check.status.code(), Some(0 | 3)), "{}", String::from_utf8_lossy(&check.stdout));
    }
}

/// A service that waits for a guest to arrive reads the image when it does, not before.
#[test]
fn a_service_that_comes_late_sees_what_the_first_wrote() {
    let folder = Folder::new("late");
    for options in engines() {
        format_qcow2(&folder.at("image"), 64 << 20);
        let late = Qcow2Options { lock: Lock::Late, ..options };
        let open = || Arc::new(Qcow2::open(&folder.at("image"), late).unwrap());
        let (first, second) = (open(), open());
        for round in 0..4_u64 {
            for (n, backend) in [&first, &second].into_iter().enumerate() {
                let mut rig = Rig::new(backend.clone(), Ring::SPLIT);
                let mine = round * 2 + n as u64;
                for earlier in 0..mine {
                    assert_eq!(rig.read(earlier * 1000, 512), [1 + earlier as u8; 512], "{options:?}");
                }
                rig.write(mine * 1000, &[1 + mine as u8; 512]);
                rig.drain();
                drop(rig);
                backend.settle().unwrap();
            }
        }
        drop((first, second));
        if !folder.qemu_img("check -q image") {
            return needs::skip("no qemu-img");
        }
    }
}

#[test]
fn an_external_data_file_has_the_data() {
    let folder = Folder::new("data");
    for options in engines() {
        for raw in ["on", "off"] {
            let create = format!("create -q -f qcow2 -o data_file=data,data_file_raw={raw} image 16M");
            if !folder.qemu_img(&create) {
                return needs::skip("no qemu-img");
            }
            let data = pattern(200 << 10, 3);
            let mut rig = rig(&folder.at("image"), options);
            rig.write(333, &data);
            assert_eq!(rig.status(WRITE_ZEROES, 0, &range(400, 128, 1), 0), OK);
            assert_eq!(rig.status(FLUSH, 0, &[], 0), OK);
            let mut expected = data.clone();
            expected[67 * 512..195 * 512].fill(0);
            assert!(rig.read(333, data.len()) == expected, "{options:?}, raw {raw}");
            rig.drain();
            drop(rig);
            let mut there = vec![0; data.len()];
            std::fs::File::open(folder.at("data")).unwrap().read_exact_at(&mut there, 333 * 512).unwrap();
            assert!(raw == "off" || there == expected, "{options:?}: it is no raw image");
            folder.qemu_img("check -q image");
            std::fs::remove_file(folder.at("data")).unwrap();
        }
    }
}

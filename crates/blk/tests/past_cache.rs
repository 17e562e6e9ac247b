//! `direct=on` holds for every way to the kernel: nothing of the image comes into the page cache.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(unsafe_code, reason = "only the system knows what is in its cache")]

mod fake;

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blk::backends::file::{Direct, Engine, File, FileOptions};
use fake::{FLUSH, IN, OK, OUT, Rig, Ring, WRITE_ZEROES, forbid_io_uring, header, pattern, range};

const BYTES: usize = 1 << 20;
const PAGE: usize = 4096;

/// How many pages of a file are in the page cache (mincore(2)).
fn cached_pages(path: &Path) -> usize {
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let mut pages = vec![0u8; BYTES / PAGE];
    // SAFETY: makes a new mapping, which nobody else knows and nobody touches; the list has a byte for each of its pages.
    let result = unsafe {
        let (read, shared) = (libc::PROT_READ, libc::MAP_SHARED);
        let at = libc::mmap(std::ptr::null_mut(), BYTES, read, shared, file.as_raw_fd(), 0);
        assert_ne!(at, libc::MAP_FAILED);
        let result = libc::mincore(at, BYTES, pages.as_mut_ptr());
        libc::munmap(at, BYTES);
        result
    };
    assert_eq!(result, 0);
    pages.iter().filter(|&page| page & 1 != 0).count()
}

/// An image of which nothing is in the page cache.
fn image(name: &str) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
        .join(format!("exitless-blk-{}-cache-{name}", std::process::id()));
    std::fs::write(&path, pattern(BYTES, 1)).unwrap();
    assert_ne!(cached_pages(&path), 0, "what is in the cache shows");
    let file = std::fs::File::open(&path).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    path
}

/// Reads and writes whatever way a guest may.
fn use_it(rig: &mut Rig, context: &str) {
    for (sector, len) in [(0, 4096), (8, 65536), (3, 512), (201, 8192), (1024, 512 << 10)] {
        for misaligned in [0, 4, 512] {
            let data = pattern(len, sector + misaligned);
            let write = rig.try_send(&[&header(OUT, sector), &data], &[1], misaligned).unwrap();
            assert_eq!(rig.wait(write).status(), OK, "{context}");
            let read = rig.try_send(&[&header(IN, sector)], &[len, 1], misaligned).unwrap();
            let answer = rig.wait(read);
            assert!(answer.status() == OK && answer.data() == data, "{context}, sector {sector}");
        }
    }
    for (sector, sectors) in [(0, 16), (5, 1), (203, 40)] {
        for unmap in [0, 1] {
            assert_eq!(rig.status(WRITE_ZEROES, 0, &range(sector, sectors, unmap), 0), OK, "{context}");
        }
    }
    assert_eq!(rig.status(FLUSH, 0, &[], 0), OK, "{context}");
}

fn check(engine: Engine, unit_bytes_min: u64, context: &str) {
    let path = image(&format!("{context}-{unit_bytes_min}"));
    let context = format!("{context}, units of {unit_bytes_min} bytes");
    let options = FileOptions { engine, direct: Direct::On, unit_bytes_min, ..FileOptions::default() };
    match File::open(&path, options) {
        Err(error) => needs::skip(error),
        Ok(file) if cached_pages(&path) > 0 => needs::skip(format_args!("{file:?} cannot be uncached")),
        Ok(file) => {
            use_it(&mut Rig::new(Arc::new(file), Ring::SPLIT), &context);
            assert_eq!(cached_pages(&path), 0, "{context}: pages in the cache");
        }
    }
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn no_engine_brings_the_image_into_the_page_cache() {
    for unit_bytes_min in [512, 4096] {
        check(Engine::Uring, unit_bytes_min, "uring");
        check(Engine::Inline, unit_bytes_min, "inline");
        std::thread::scope(|scope| {
            // The filter is for this thread alone.
            scope.spawn(|| {
                forbid_io_uring();
                check(Engine::Auto, unit_bytes_min, "io_uring refused");
            });
        });
    }
}

#[test]
fn the_page_cache_is_used_where_it_is_asked_for() {
    for engine in [Engine::Uring, Engine::Inline] {
        let path = image(&format!("used-{engine:?}"));
        let options = FileOptions { engine, direct: Direct::Off, ..FileOptions::default() };
        use_it(&mut Rig::new(Arc::new(File::open(&path, options).unwrap()), Ring::SPLIT), "through it");
        assert_ne!(cached_pages(&path), 0, "{engine:?}");
        std::fs::remove_file(&path).unwrap();
    }
}

//! A program with a handler of its own for SIGBUS keeps it, and guest memory stays guarded all the same.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(unsafe_code, reason = "no library has these calls in safe form")]

use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use virtio::GuestAddr;
use virtio::memory::{Backing, Mapping, Memory, Region};

const PAGE: usize = 4096;
const MAP: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

/// Faults that came to the program's own handler.
static OWN: AtomicUsize = AtomicUsize::new(0);

/// Puts a page where one is missing.
extern "C" fn own_handler(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    OWN.fetch_add(1, Ordering::SeqCst);
    // SAFETY: the system passes valid information; the page is in a mapping of this test's, or the call fails.
    unsafe {
        let at = (*info).si_addr() as usize / PAGE * PAGE;
        if (*info).si_code > 0 {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
            assert!(libc::mmap(at as *mut _, PAGE, MAP, flags, -1, 0) != libc::MAP_FAILED);
        }
    }
}

/// Reads a page that the file behind its mapping does not have.
fn fault_elsewhere() {
    let empty = tempfile();
    // SAFETY: a new mapping at an address of the system's choice; the handler puts a page there before it is read.
    let byte = unsafe {
        let at = libc::mmap(null_mut(), PAGE, MAP, libc::MAP_SHARED, empty.as_raw_fd(), 0);
        assert!(at != libc::MAP_FAILED);
        at.cast::<u8>().read_volatile()
    };
    assert_eq!(byte, 0);
}

fn tempfile() -> File {
    rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap().into()
}

#[test]
fn faults_elsewhere_go_to_the_handler_that_there_was() {
    // SAFETY: a zeroed sigaction is a valid value, and the handler has the signature that SA_SIGINFO calls for.
    unsafe {
        let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = own_handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        assert_eq!(libc::sigaction(libc::SIGBUS, &action, null_mut()), 0);
    }
    let file = tempfile();
    file.set_len(2 * PAGE as u64).unwrap();
    let mapping = Arc::new(Mapping::new(&file, 0, 2 * PAGE as u64).unwrap());
    let memory = Memory::new(vec![Region::new(GuestAddr(0), mapping.clone()).unwrap()]).unwrap();
    for faults in 1..=2 {
        fault_elsewhere();
        assert_eq!(OWN.load(Ordering::SeqCst), faults);
    }
    // SAFETY: sends a signal to this thread.
    assert_eq!(unsafe { libc::raise(libc::SIGBUS) }, 0);
    assert_eq!(OWN.load(Ordering::SeqCst), 3, "one that was sent");

    let seen = Memory::poisonings();
    file.set_len(0).unwrap();
    let word = memory.area(GuestAddr(PAGE as u64), 4, 4).unwrap();
    assert_eq!(word.u32(0).load(Ordering::Relaxed), 0);
    assert!(mapping.is_poisoned() && memory.is_poisoned() && Memory::poisonings() > seen);
    assert_eq!(OWN.load(Ordering::SeqCst), 3, "guest memory is none of its business");
}

//! Survives the truncation of a file that is mapped as guest memory.
//!
//! Touching a page whose file has shrunk raises SIGBUS, which kills the process and every other guest it serves.
//! The handler here looks the address up among the shared mappings, puts an anonymous zero page in place of the one
//! that vanished, and marks the mapping as poisoned, so that its queues stop with a reason. A SIGBUS anywhere else
//! takes the course it would have taken without us.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// The most shared mappings one process may hold: 64 guests with 64 regions each.
pub(super) const MAPPINGS_MAX: usize = 4096;

/// One mapping, readable from the handler. `start == 0`: free; `start == CLAIMED`: being filled in.
struct Entry {
    start: AtomicUsize,
    len: AtomicUsize,
    page: AtomicUsize,
    poisoned: AtomicBool,
}

const CLAIMED: usize = 1;

static ENTRIES: [Entry; MAPPINGS_MAX] = [const {
    Entry {
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
        poisoned: AtomicBool::new(false),
    }
}; MAPPINGS_MAX];

/// One more than the highest entry ever used, so that the handler's search and ours are short.
static USED: AtomicUsize = AtomicUsize::new(0);

/// Pages replaced so far, in all mappings.
pub(super) static POISONINGS: AtomicUsize = AtomicUsize::new(0);

/// A registered mapping.
#[derive(Debug)]
pub(super) struct Guard(usize);

impl Guard {
    /// Registers `len` bytes at `start`, mapped in pages of `page` bytes. None if the table is full.
    pub(super) fn new(start: usize, len: usize, page: usize) -> Option<Self> {
        install();
        let index = ENTRIES.iter().position(|e| {
            e.start.compare_exchange(0, CLAIMED, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        })?;
        let entry = &ENTRIES[index];
        entry.len.store(len, Ordering::Relaxed);
        entry.page.store(page, Ordering::Relaxed);
        entry.poisoned.store(false, Ordering::Relaxed);
        USED.fetch_max(index + 1, Ordering::AcqRel);
        entry.start.store(start, Ordering::Release);
        Some(Self(index))
    }

    pub(super) fn is_poisoned(&self) -> bool {
        ENTRIES[self.0].poisoned.load(Ordering::Relaxed)
    }

    /// Takes the mapping off the table. To be called once, before it is unmapped.
    pub(super) fn release(&self) {
        ENTRIES[self.0].start.store(0, Ordering::Release);
    }
}

fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: a zeroed sigaction is a valid value; the handler has the signature SA_SIGINFO calls for and uses only
        // async-signal-safe operations (atomics, mmap, sigaction).
        unsafe {
            let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
            action.sa_sigaction = on_sigbus as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
            let failed = libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
            assert_eq!(failed, 0, "SIGBUS can be handled: it is a valid signal and the arguments are too");
        }
    });
}

extern "C" fn on_sigbus(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo for SIGBUS, which carries an address.
    let address = unsafe { (*info).si_addr() } as usize;
    if !mend(address) {
        // SAFETY: restores the default action; returning repeats the access, which then ends the process as it should.
        unsafe {
            let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
            action.sa_sigaction = libc::SIG_DFL;
            libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
        }
    }
}

/// Replaces the page at `address` if it belongs to a registered mapping.
fn mend(address: usize) -> bool {
    for entry in &ENTRIES[..USED.load(Ordering::Acquire)] {
        let start = entry.start.load(Ordering::Acquire);
        let offset = address.wrapping_sub(start);
        if start <= CLAIMED || offset >= entry.len.load(Ordering::Relaxed) {
            continue;
        }
        entry.poisoned.store(true, Ordering::Relaxed);
        POISONINGS.fetch_add(1, Ordering::Release);
        let page = entry.page.load(Ordering::Relaxed);
        // SAFETY: replaces one whole page inside a mapping that this process owns and that stays registered until just
        // before it is unmapped; a thread is faulting on the page now, so it has not been unmapped.
        let mended = unsafe {
            libc::mmap(
                (start + offset - offset % page) as *mut libc::c_void,
                page,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
                -1,
                0,
            )
        };
        return mended != libc::MAP_FAILED;
    }
    false
}

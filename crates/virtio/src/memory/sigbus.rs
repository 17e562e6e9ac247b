//! Survives the truncation of a file that is mapped as guest memory.
//!
//! Touching a page whose file has shrunk raises SIGBUS, which kills the process and every other guest it serves.
//! The handler here looks the address up among the shared mappings, puts an anonymous zero page in place of the one
//! that vanished, and marks the mapping as poisoned, so that its queues stop with a reason. A SIGBUS anywhere else, or one
//! that was sent, takes the course it would have taken without us: the handler that there was before is called.
//!
//! The handler interrupts anything, so it takes no lock: each entry of the table has a version, odd while the entry
//! changes. An entry that changes is passed over, since it cannot be that of the mapping at which a thread is faulting: that
//! one was entered before the mapping was handed out, and is taken off after its last user has gone.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering, fence};
use std::sync::{Mutex, Once, PoisonError};

use libc::{c_int, c_void, sigaction, siginfo_t};

/// Mappings in one piece of the table, and how many pieces there may be. Pieces are made when they are needed.
const CHUNK_ENTRIES: usize = 512;
const CHUNKS_MAX: usize = 120;
/// The most shared mappings one process may hold: somewhat fewer than the kernel allows (`vm.max_map_count`, 65,530).
pub(super) const MAPPINGS_MAX: usize = CHUNK_ENTRIES * CHUNKS_MAX;

/// Lost pages of one mapping that are replaced one by one. After these all of it is replaced at once: every page replaced
/// by itself makes the kernel's list of mappings longer by two, and that list ends.
const PAGES_REPLACED_MAX: u32 = 4;

/// One mapping, readable from the handler; one of length 0 is free.
#[derive(Debug)]
struct Entry {
    version: AtomicU32,
    start: AtomicUsize,
    len: AtomicUsize,
    page: AtomicUsize,
    replaced: AtomicU32,
    poisoned: AtomicBool,
}

/// What an entry says about its mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    start: usize,
    len: usize,
    page: usize,
}

impl Entry {
    const fn free() -> Self {
        Self {
            version: AtomicU32::new(0),
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            page: AtomicUsize::new(0),
            replaced: AtomicU32::new(0),
            poisoned: AtomicBool::new(false),
        }
    }

    /// Only the entry's owner calls this.
    fn set(&self, range: Range) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        self.start.store(range.start, Ordering::Relaxed);
        self.len.store(range.len, Ordering::Relaxed);
        self.page.store(range.page, Ordering::Relaxed);
        self.version.store(version.wrapping_add(2), Ordering::Release);
    }

    /// None while it changes.
    fn get(&self) -> Option<Range> {
        let version = self.version.load(Ordering::Acquire);
        let start = self.start.load(Ordering::Relaxed);
        #[cfg(test)]
        tests::in_the_middle();
        let range =
            Range { start, len: self.len.load(Ordering::Relaxed), page: self.page.load(Ordering::Relaxed) };
        fence(Ordering::Acquire);
        (version.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == version).then_some(range)
    }
}

type Chunk = [Entry; CHUNK_ENTRIES];

/// The table. A piece that was made stays.
static CHUNKS: [AtomicPtr<Chunk>; CHUNKS_MAX] = [const { AtomicPtr::new(std::ptr::null_mut()) }; CHUNKS_MAX];

/// Entries that are free.
static FREE: Mutex<Vec<&'static Entry>> = Mutex::new(Vec::new());

/// Pages replaced so far, in all mappings.
pub(super) static POISONINGS: AtomicUsize = AtomicUsize::new(0);

fn chunks() -> impl Iterator<Item = &'static Chunk> {
    CHUNKS.iter().map_while(|chunk| {
        // SAFETY: not null, it is a piece that was leaked before it was stored here, so it lives for ever.
        unsafe { chunk.load(Ordering::Acquire).as_ref() }
    })
}

/// A registered mapping.
#[derive(Debug)]
pub(super) struct Guard(&'static Entry);

impl Guard {
    /// Registers `len` bytes at `start`, mapped in pages of `page` bytes. None if the table is full.
    pub(super) fn new(start: usize, len: usize, page: usize) -> Option<Self> {
        install();
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        if free.is_empty() {
            let next = CHUNKS.get(chunks().count())?;
            let chunk: &'static Chunk = Box::leak(Box::new([const { Entry::free() }; CHUNK_ENTRIES]));
            next.store(std::ptr::from_ref(chunk).cast_mut(), Ordering::Release);
            free.extend(chunk.iter().rev());
        }
        let entry = free.pop()?;
        entry.poisoned.store(false, Ordering::Relaxed);
        entry.replaced.store(0, Ordering::Relaxed);
        entry.set(Range { start, len, page });
        Some(Self(entry))
    }

    pub(super) fn is_poisoned(&self) -> bool {
        self.0.poisoned.load(Ordering::Relaxed)
    }

    /// Takes the mapping off the table. To be called once, before it is unmapped.
    pub(super) fn release(&self) {
        self.0.set(Range { start: 0, len: 0, page: 0 });
        FREE.lock().unwrap_or_else(PoisonError::into_inner).push(self.0);
    }
}

/// The action that there was before ours. Null before that, and never freed.
static BEFORE: AtomicPtr<sigaction> = AtomicPtr::new(std::ptr::null_mut());

fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before: &'static mut MaybeUninit<sigaction> = Box::leak(Box::new(MaybeUninit::zeroed()));
        // SAFETY: a zeroed sigaction is a valid value; the handler has the signature SA_SIGINFO calls for and uses only
        // async-signal-safe operations (atomics, mmap, sigaction, raise), besides calling what was the handler already.
        // The first call only reads: ours must find the action before when it is called.
        unsafe {
            let mut action: sigaction = MaybeUninit::zeroed().assume_init();
            action.sa_sigaction = on_sigbus as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
            let read = sigaction(libc::SIGBUS, std::ptr::null(), before.as_mut_ptr());
            BEFORE.store(before.as_mut_ptr(), Ordering::Release);
            let set = sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
            assert_eq!(
                (read, set),
                (0, 0),
                "SIGBUS can be handled: it is a valid signal and the arguments are too"
            );
        }
    });
}

extern "C" fn on_sigbus(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a valid siginfo for SIGBUS; one that it raised itself carries an address.
    let (raised, address) = unsafe { ((*info).si_code > 0, (*info).si_addr() as usize) };
    if !raised || !mend(address) {
        // SAFETY: these are the arguments that the kernel passed.
        unsafe { act_as_before(signal, info, context, raised) };
    }
}

/// Does what would have happened without us.
///
/// # Safety
/// To be called by the handler, with what it was called with.
unsafe fn act_as_before(signal: c_int, info: *mut siginfo_t, context: *mut c_void, raised: bool) {
    // SAFETY: stored before the handler was installed, and never freed or changed.
    let before = unsafe { &*BEFORE.load(Ordering::Acquire) };
    match before.sa_sigaction {
        // Of one that the kernel raised, the access would be repeated for ever: the system does not ignore it either.
        libc::SIG_IGN if !raised => {}
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: restores the default action. Returning repeats the access, which then ends the process as it
            // should; one that was sent is sent again.
            unsafe {
                let mut action: sigaction = MaybeUninit::zeroed().assume_init();
                action.sa_sigaction = libc::SIG_DFL;
                sigaction(signal, &action, std::ptr::null_mut());
                if !raised {
                    libc::raise(signal);
                }
            }
        }
        handler if before.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: with this flag, a handler has this signature.
            let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) =
                unsafe { std::mem::transmute(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: without the flag, a handler has this signature.
            let handler: extern "C" fn(c_int) = unsafe { std::mem::transmute(handler) };
            handler(signal);
        }
    }
}

/// The registered mapping that holds `address`.
fn find(address: usize) -> Option<(&'static Entry, Range)> {
    chunks().flatten().find_map(|entry| {
        let range = entry.get()?;
        (address.wrapping_sub(range.start) < range.len).then_some((entry, range))
    })
}

/// Replaces the page at `address` if it belongs to a registered mapping.
fn mend(address: usize) -> bool {
    let Some((entry, Range { start, len, page })) = find(address) else { return false };
    entry.poisoned.store(true, Ordering::Relaxed);
    POISONINGS.fetch_add(1, Ordering::Release);
    let whole = entry.replaced.fetch_add(1, Ordering::Relaxed) >= PAGES_REPLACED_MAX;
    let offset = address - start;
    let (at, len) = if whole { (start, len) } else { (start + offset - offset % page, page) };
    // SAFETY: replaces whole pages inside a mapping that this process owns and that stays registered until just before it
    // is unmapped; a thread is faulting there now, so it has not been unmapped.
    let mended = unsafe {
        libc::mmap(
            at as *mut c_void,
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED,
            -1,
            0,
        )
    };
    mended != libc::MAP_FAILED
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::cell::RefCell;

    use super::*;

    thread_local! {
        /// What happens while an entry is read.
        static MEANWHILE: RefCell<Option<Box<dyn FnOnce()>>> = const { RefCell::new(None) };
    }

    pub(super) fn in_the_middle() {
        let meanwhile = MEANWHILE.take();
        if let Some(meanwhile) = meanwhile {
            meanwhile();
        }
    }

    #[test]
    fn an_entry_that_changes_while_it_is_read_is_passed_over() {
        static ENTRY: Entry = Entry::free();
        let small = Range { start: 1 << 62, len: 4096, page: 4096 };
        let large = Range { start: 1 << 61, len: 1 << 30, page: 2 << 20 };
        ENTRY.set(small);
        MEANWHILE.set(Some(Box::new(move || {
            ENTRY.set(Range { start: 0, len: 0, page: 0 });
            ENTRY.set(large);
        })));
        assert_eq!(ENTRY.get(), None, "neither the one nor the other");
        assert_eq!(ENTRY.get(), Some(large));
    }

    #[test]
    fn the_table_grows_and_is_used_again() {
        let guard = |number: usize| Guard::new((1 << 61) + number * 8192, 4096, 4096).unwrap();
        for _ in 0..3 {
            let guards: Vec<Guard> = (0..10 * CHUNK_ENTRIES).map(guard).collect();
            assert!(find((1 << 61) + 8192 * (guards.len() - 1)).is_some());
            guards.iter().for_each(Guard::release);
            assert!(find(1 << 61).is_none());
        }
        assert!(chunks().count() < 14, "entries are used again");
    }
}

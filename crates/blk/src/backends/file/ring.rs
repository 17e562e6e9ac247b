//! An io_uring instance, and the buffers that the kernel works on.
//!
//! The kernel reaches buffers by address while a request is in flight, so they must stay where they are until its
//! completion is seen. All of them are owned here: guest memory by the reference to its map, bounce buffers, buffers that
//! came with a transfer and address lists in the slot of their request. Dropping the ring waits for what is in flight; if that takes too long,
//! the buffers are never freed.
//!
//! A killed process drops nothing, and the kernel may go on working for it. What keeps its successor away then are locks
//! of open files (of the image and, by the lease, of guest memory), and the ring registers those files: the kernel
//! lets go of what is registered when the last request of the ring is done.
#![allow(unsafe_code)]

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use io_uring::types::{Fixed, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};
use rustix::event::{EventfdFlags, eventfd};
use virtio::Memory;

use super::bounce::{Bounce, Span};
use super::fixed::FixedBuffers;
use super::hold::Hold;
use crate::data::{Piece, Pieces};

/// The most pieces in one request (`UIO_MAXIOV`).
pub(super) const PIECES_MAX: usize = 1024;
/// How long dropping the ring waits for the kernel.
const DROP_WAIT: Duration = Duration::from_secs(10);

/// What a request in flight refers to.
#[derive(Default)]
struct Buffers {
    pieces: Vec<libc::iovec>,
    job: Option<Job>,
    own: Vec<u8>,
}

/// A transfer through a buffer of our own.
pub(super) struct Job {
    pub(super) bounce: Bounce,
    pub(super) span: Span,
    /// The blocks are read in order to be written with a part of them changed.
    pub(super) merging: bool,
}

/// Which way data go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    FromFile,
    ToFile,
    /// And they are durable when that is done.
    ToFileDurably,
}

impl Way {
    /// Whether the file changes.
    pub(super) fn writes(self) -> bool {
        self != Self::FromFile
    }

    /// Flags of `pwritev2(2)`.
    fn flags(self) -> i32 {
        if self == Self::ToFileDurably { libc::RWF_DSYNC } else { 0 }
    }
}

/// A ring with room for one request per slot.
pub(super) struct Ring {
    uring: ManuallyDrop<IoUring>,
    slots: ManuallyDrop<Box<[Buffers]>>,
    memory: ManuallyDrop<Arc<Memory>>,
    holds: ManuallyDrop<Box<[Arc<Hold>]>>,
    fixed: Option<FixedBuffers>,
    event: Arc<OwnedFd>,
    /// Requests made and not seen completed.
    in_flight: usize,
    /// Requests made and not shown to the kernel.
    unsubmitted: usize,
    /// When waiting for the last requests ends, once that has begun.
    deadline: Option<Instant>,
}

/// What a ring is made from. Making it may take long (all of guest memory is pinned, if that is wanted), so that is done
/// before, on a thread that nobody waits for.
pub(crate) struct Parts {
    // Before the memory that is registered with it.
    uring: IoUring,
    fixed: Option<FixedBuffers>,
    event: Arc<OwnedFd>,
    memory: Arc<Memory>,
    holds: Box<[Arc<Hold>]>,
    depth: usize,
}

impl Parts {
    /// For `depth` requests on `files`, which are then named by their index; what `holds` have locked must be among them.
    pub(super) fn new(
        memory: &Arc<Memory>,
        holds: &[Arc<Hold>],
        depth: usize,
        files: &[RawFd],
        sqpoll_ms: Option<u32>,
        fixed_buffers: bool,
    ) -> io::Result<Self> {
        let mut uring = build((depth as u32).next_power_of_two().max(8), sqpoll_ms)?;
        let lease = memory.lease().map(|lease| lease.as_fd().as_raw_fd());
        let files: Vec<RawFd> = files.iter().copied().chain(lease).collect();
        uring.submitter().register_files(&files)?;
        let event = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        uring.submitter().register_eventfd(event.as_raw_fd())?;
        uring.completion().disable_eventfd();
        let fixed = fixed_buffers.then(|| FixedBuffers::register(&uring, memory)).flatten();
        Ok(Self { uring, fixed, event, memory: memory.clone(), holds: holds.into(), depth })
    }
}

impl Ring {
    /// A ring of these parts. To be called, as everything else here, on the thread that uses it.
    pub(super) fn new(parts: Parts) -> io::Result<Self> {
        let Parts { uring, fixed, event, memory, holds, depth } = parts;
        // From now on it takes requests, and only from this thread.
        uring.submitter().register_enable_rings()?;
        // Without it a call costs a few nanoseconds more; a thread has room for 16.
        let _ = uring.submitter().register_ring_fd();
        free_workers(&uring);
        Ok(Self {
            uring: ManuallyDrop::new(uring),
            slots: ManuallyDrop::new((0..depth).map(|_| Buffers::default()).collect()),
            memory: ManuallyDrop::new(memory),
            holds: ManuallyDrop::new(holds),
            fixed,
            event,
            in_flight: 0,
            unsubmitted: 0,
            deadline: None,
        })
    }

    /// Moves data between the file and `pieces`, of which there are at most [`PIECES_MAX`], in the memory the ring
    /// was made with.
    #[inline(always)]
    pub(super) fn transfer(&mut self, slot: usize, way: Way, file: u32, offset: u64, mut pieces: Pieces<'_>) {
        let Some(first) = pieces.next() else { return };
        let Some(second) = pieces.next() else {
            let entry = self.single(way, Fixed(file), offset, first);
            return self.push(slot, entry);
        };
        let list = &mut self.slots[slot].pieces;
        list.clear();
        let all = [first, second].into_iter().chain(pieces).take(PIECES_MAX);
        list.extend(all.map(|piece| libc::iovec { iov_base: piece.ptr.cast(), iov_len: piece.len }));
        let (list, count) = (list.as_ptr(), list.len() as u32);
        let entry = match way {
            Way::FromFile => opcode::Readv::new(Fixed(file), list, count).offset(offset).build(),
            to => opcode::Writev::new(Fixed(file), list, count).offset(offset).rw_flags(to.flags()).build(),
        };
        self.push(slot, entry);
    }

    /// Keeps the buffer that comes with a transfer until it is over.
    pub(super) fn keep_own(&mut self, slot: usize, own: Vec<u8>) {
        self.slots[slot].own = own;
    }

    /// The buffer that came with a transfer, of which no request is in flight.
    pub(super) fn own(&mut self, slot: usize) -> &mut Vec<u8> {
        &mut self.slots[slot].own
    }

    /// Moves data between the file and `len` bytes of the transfer's own buffer, from byte `from` on.
    pub(super) fn transfer_own(&mut self, slot: usize, way: Way, at: (u32, u64), from: usize, len: usize) {
        let bytes = &mut self.slots[slot].own[from..from + len];
        let piece = Piece { ptr: bytes.as_mut_ptr(), len };
        let entry = self.single(way, Fixed(at.0), at.1, piece);
        self.push(slot, entry);
    }

    /// Moves the blocks of a span between the file and a buffer, which comes back with [`Ring::take_job`].
    pub(super) fn transfer_bounced(&mut self, slot: usize, way: Way, file: u32, job: Job) {
        let Job { bounce, span: Span { start, len, .. }, .. } = self.slots[slot].job.insert(job);
        let (ptr, len) = (bounce.as_mut_ptr(), *len as u32);
        let entry = match way {
            Way::FromFile => opcode::Read::new(Fixed(file), ptr, len).offset(*start).build(),
            to => opcode::Write::new(Fixed(file), ptr, len).offset(*start).rw_flags(to.flags()).build(),
        };
        self.push(slot, entry);
    }

    /// Gives back the buffer of a request that was completed.
    #[inline(always)]
    pub(super) fn take_job(&mut self, slot: usize) -> Option<Job> {
        self.slots[slot].job.take()
    }

    /// Makes the file's data durable.
    pub(super) fn sync(&mut self, slot: usize, file: u32) {
        self.push(slot, opcode::Fsync::new(Fixed(file)).flags(FsyncFlags::DATASYNC).build());
    }

    /// Writes bytes that never change.
    pub(super) fn write_constant(&mut self, slot: usize, file: u32, offset: u64, bytes: &'static [u8]) {
        let write = opcode::Write::new(Fixed(file), bytes.as_ptr(), bytes.len() as u32);
        self.push(slot, write.offset(offset).build());
    }

    /// Succeeds.
    pub(super) fn nothing(&mut self, slot: usize) {
        self.push(slot, opcode::Nop::new().build());
    }

    /// `fallocate(2)`.
    pub(super) fn allocate(&mut self, slot: usize, file: u32, mode: i32, offset: u64, len: u64) {
        self.push(slot, opcode::Fallocate::new(Fixed(file), len).offset(offset).mode(mode).build());
    }

    #[inline(always)]
    fn single(&mut self, way: Way, file: Fixed, offset: u64, piece: Piece) -> squeue::Entry {
        let len = piece.len as u32;
        let fixed = self.fixed.as_mut().and_then(|fixed| fixed.index(&piece));
        match (way, fixed) {
            (Way::FromFile, None) => opcode::Read::new(file, piece.ptr, len).offset(offset).build(),
            (Way::FromFile, Some(i)) => {
                opcode::ReadFixed::new(file, piece.ptr, len, i).offset(offset).build()
            }
            (to, None) => {
                opcode::Write::new(file, piece.ptr, len).offset(offset).rw_flags(to.flags()).build()
            }
            (to, Some(i)) => {
                opcode::WriteFixed::new(file, piece.ptr, len, i).offset(offset).rw_flags(to.flags()).build()
            }
        }
    }

    #[inline(always)]
    fn push(&mut self, slot: usize, entry: squeue::Entry) {
        let entry = entry.user_data(slot as u64);
        // SAFETY: all the entry refers to is owned by the ring until it is completed, see the module header.
        let pushed = unsafe { self.uring.submission().push(&entry) };
        debug_assert!(pushed.is_ok(), "each slot has one request and the ring has room for all slots");
        self.in_flight += 1;
        self.unsubmitted += 1;
    }

    /// Shows the kernel what was made, by one call.
    #[inline(always)]
    pub(super) fn submit(&mut self) {
        if self.unsubmitted == 0 {
            return;
        }
        match self.uring.submit() {
            Ok(submitted) => self.unsubmitted -= submitted.min(self.unsubmitted),
            // Out of some resource for the moment: they stay in the ring, and the next turn tries again.
            Err(error) => tracing::debug!(%error, "io_uring takes nothing now"),
        }
    }

    /// Appends completions, each a slot and a result, to `out`. Costs no system call unless the kernel asks for one.
    #[inline(always)]
    pub(super) fn completions(&mut self, out: &mut Vec<(usize, i32)>) {
        self.submit();
        let before = out.len();
        let (submitter, queue, mut completions) = self.uring.split();
        if completions.is_empty() && queue.taskrun() {
            // Nothing is submitted; the flags of the ring make this an `io_uring_enter` that completes requests.
            let _ = submitter.submit();
            completions.sync();
        }
        out.extend(completions.map(|entry| (entry.user_data() as usize, entry.result())));
        self.in_flight -= out.len() - before;
    }

    /// Readable when something was completed, if armed.
    pub(super) fn event(&self) -> &Arc<OwnedFd> {
        &self.event
    }

    /// Makes completions show on the descriptor; true if some are there already.
    pub(super) fn arm(&mut self) -> bool {
        let (_, queue, mut completions) = self.uring.split();
        completions.enable_eventfd();
        // The kernel completes and then looks at the flag; the flag is set and then completions are looked for.
        fence(Ordering::SeqCst);
        completions.sync();
        !completions.is_empty() || queue.taskrun() || self.unsubmitted > 0
    }

    /// Makes them no longer show.
    pub(super) fn disarm(&mut self) {
        self.uring.completion().disable_eventfd();
    }
}

impl Ring {
    /// Waits for what is in flight; false if that takes too long. It waits once.
    pub(super) fn finish(&mut self) -> bool {
        let deadline = *self.deadline.get_or_insert_with(|| Instant::now() + DROP_WAIT);
        let mut seen = Vec::new();
        while self.in_flight > 0 && Instant::now() < deadline {
            self.completions(&mut seen);
            let wait = Timespec::new().nsec(100_000_000);
            let _ = self.uring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&wait));
        }
        self.in_flight == 0
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if !self.finish() {
            tracing::error!(requests = self.in_flight, "storage does not answer: leaving its buffers to it");
            self.holds.iter().for_each(|hold| hold.abandon());
            return;
        }
        let _ = self.uring.submitter().unregister_ring_fd();
        // SAFETY: each is dropped once, here, and not used afterwards; nothing is in flight that refers to them.
        unsafe {
            ManuallyDrop::drop(&mut self.uring);
            ManuallyDrop::drop(&mut self.slots);
            ManuallyDrop::drop(&mut self.memory);
            ManuallyDrop::drop(&mut self.holds);
        }
    }
}

/// Whether the system lets this process have rings: containers and administrators forbid them.
pub(super) fn probe(sqpoll_ms: Option<u32>) -> io::Result<()> {
    build(1, sqpoll_ms).map(|_| ())
}

/// Lets the kernel's threads that wait for this ring's requests run elsewhere than on this thread's CPU (Linux 5.14).
fn free_workers(uring: &IoUring) {
    // SAFETY: a set of CPUs is a field of bits, and has none when all are 0.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    let cpus = reactor::helper_cpus();
    for &cpu in &cpus {
        // SAFETY: only changes the set, which has room for as many CPUs as there can be in the list.
        unsafe { libc::CPU_SET(cpu as usize, &mut set) };
    }
    if !cpus.is_empty()
        && let Err(error) = uring.submitter().register_iowq_aff(&set)
    {
        tracing::debug!(%error, ?cpus, "the kernel's helpers share the I/O thread's CPU");
    }
}

/// A ring with the best flags that the kernel has, to be enabled by the thread that will use it.
fn build(entries: u32, sqpoll_ms: Option<u32>) -> io::Result<IoUring> {
    let mut result = Err(io::ErrorKind::Unsupported.into());
    for attempt in 0..3 {
        let mut builder = IoUring::builder();
        builder.setup_r_disabled();
        match (sqpoll_ms, attempt) {
            (Some(idle_ms), 0) => builder.setup_sqpoll(idle_ms).setup_single_issuer(),
            (Some(idle_ms), _) => builder.setup_sqpoll(idle_ms),
            // Completions are run when this thread asks for them, never by interrupting it (Linux 6.1) …
            (None, 0) => builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag(),
            // … or whenever it enters the kernel (5.19) …
            (None, 1) => builder.setup_coop_taskrun().setup_taskrun_flag(),
            // … or at any time.
            (None, _) => &mut builder,
        };
        result = builder.build(entries);
        if !matches!(&result, Err(error) if error.raw_os_error() == Some(libc::EINVAL)) {
            break;
        }
    }
    result
}

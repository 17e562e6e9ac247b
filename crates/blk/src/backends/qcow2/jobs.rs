//! Work that a thread has under way for an image: a table of jobs, whose numbers are those of their transfers.

use qcow2::engine::{GrantId, IoId};
use qcow2::entry::Compressed;

use super::combine::SeatId;

/// Jobs that are kept for an engine's commands, which requests may be waiting for.
const COMMANDS_MIN: usize = 32;

/// A part of a request: a range of the disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    /// The slot of the request.
    pub(super) request: u16,
    pub(super) kind: Kind,
    /// Where, in bytes.
    pub(super) offset: u64,
    /// How much, in bytes.
    pub(super) len: u64,
    /// Bytes of the request's data before it.
    pub(super) from: u64,
}

impl Piece {
    /// Its first `len` bytes.
    #[inline(always)]
    pub(super) fn first(&self, len: u64) -> Self {
        Self { len, ..*self }
    }

    /// What is behind them.
    #[inline(always)]
    pub(super) fn behind(&self, len: u64) -> Self {
        Self { offset: self.offset + len, len: self.len - len, from: self.from + len, ..*self }
    }
}

/// What to do with a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    /// Zeros, as data.
    WriteZeros,
    Zero {
        unmap: bool,
    },
    Discard,
    Flush {
        file: u8,
    },
}

/// A copy that an engine has commanded, on its way chunk by chunk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Copying {
    pub(super) io: IoId,
    /// Offset in the disk of what is not copied yet, and how much that is, in bytes.
    pub(super) from: u64,
    pub(super) left: u64,
    /// Where it goes, in bytes.
    pub(super) to: u64,
    /// Zeros go there instead.
    pub(super) zero: bool,
    /// What is under way, in bytes.
    pub(super) chunk: u64,
}

impl Copying {
    /// What is left when the chunk has arrived.
    pub(super) fn behind_chunk(self) -> Self {
        let Self { from, left, to, chunk, .. } = self;
        Self { from: from + chunk, left: left - chunk, to: to + chunk, ..self }
    }
}

/// A compressed cluster, of which what is behind the first `within` bytes is wanted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stream {
    pub(super) layer: u8,
    pub(super) at: Compressed,
    pub(super) within: u64,
}

/// What a job is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Work {
    Nothing,
    /// A piece that an engine will answer.
    Asked(Piece),
    /// Data on their way.
    Moving(Piece, Option<GrantId>),
    /// Compressed data on their way, and then to be made whole.
    Fetching(Piece, Stream),
    /// The transfer of a command. Another file is synced after it.
    Io {
        layer: u8,
        io: IoId,
        then: Option<u8>,
    },
    /// A copy: an engine is asked for tables that it needs …
    CopyAsked(Copying),
    /// … data come …
    CopyReading(Copying),
    /// … compressed ones come …
    CopyFetching(Copying, Stream),
    /// … and go.
    CopyWriting(Copying),
    /// A step of a change that a control thread wants.
    Step,
}

#[derive(Debug)]
struct Job {
    work: Work,
    /// So that no answer for an earlier job in its place is taken for one of its own.
    generation: u16,
}

/// The jobs of a thread.
#[derive(Debug)]
pub(super) struct Jobs {
    jobs: Box<[Job]>,
    free: Vec<u16>,
}

impl Jobs {
    /// How many jobs a thread with up to `requests` requests has.
    pub(super) fn count(requests: u16) -> usize {
        usize::from(requests) + usize::from(requests).clamp(16, 128) + COMMANDS_MIN
    }

    pub(super) fn new(requests: u16) -> Self {
        let count = Self::count(requests);
        let job = |_| Job { work: Work::Nothing, generation: 0 };
        Self { jobs: (0..count).map(job).collect(), free: (0..count as u16).rev().collect() }
    }

    /// Whether a piece of a request can become a job.
    #[inline(always)]
    pub(super) fn has_room(&self) -> bool {
        self.free.len() > COMMANDS_MIN
    }

    /// Whether a command can.
    pub(super) fn has_room_for_command(&self) -> bool {
        !self.free.is_empty()
    }

    /// Begins a job. There is room.
    #[inline(always)]
    pub(super) fn begin(&mut self, work: Work) -> usize {
        let job = usize::from(self.free.pop().unwrap_or_default());
        self.jobs[job].work = work;
        job
    }

    /// Ends a job.
    #[inline(always)]
    pub(super) fn end(&mut self, job: usize) -> Work {
        let Job { work, generation } = &mut self.jobs[job];
        *generation = generation.wrapping_add(1);
        self.free.push(job as u16);
        std::mem::replace(work, Work::Nothing)
    }

    #[inline(always)]
    pub(super) fn work(&self, job: usize) -> Work {
        self.jobs[job].work
    }

    /// Goes on with a job.
    pub(super) fn set(&mut self, job: usize, work: Work) {
        self.jobs[job].work = work;
    }

    /// What names a job to others.
    pub(super) fn ticket(&self, seat: SeatId, job: usize) -> u64 {
        super::combine::ticket(seat, u32::from(self.jobs[job].generation) << 16 | job as u32)
    }

    /// The job that a ticket names, if it is under way.
    pub(super) fn of_ticket(&self, ticket: u64) -> Option<usize> {
        let tag = super::combine::tag_of(ticket);
        let job = usize::from(tag as u16);
        (self.jobs.get(job)?.generation == (tag >> 16) as u16).then_some(job)
    }

    /// Every job under way.
    pub(super) fn all(&self) -> impl Iterator<Item = (usize, Work)> {
        let under_way = self.jobs.iter().enumerate().filter(|(_, job)| !matches!(job.work, Work::Nothing));
        under_way.map(|(job, Job { work, .. })| (job, *work))
    }

    /// Jobs under way that are an engine's commands.
    pub(super) fn any(&self) -> bool {
        self.free.len() < self.jobs.len()
    }
}

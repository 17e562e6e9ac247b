//! The engine that changes an image: a state machine that asks for reads, writes and barriers and is told of their ends.
//!
//! Reads, and writes to clusters that are allocated, do not come here: a thread finds them in the [`Map`]. The engine gets
//! the pieces of requests that the map cannot answer: slices that are not cached, clusters to be allocated, copied, zeroed
//! or freed. It answers each with a [`Reply`].
//!
//! # Order
//! * A cluster's refcount is durable before anything refers to it: clusters are reserved in runs, one barrier for each, so
//!   that allocating costs none (`alloc`). What a crash leaves reserved is leaked, not lost.
//! * Data are in the file before the entry that maps them is written. They are durable before that where the entry hides
//!   older data or where the cluster held something else (`pending`).
//! * An L2 table is durable before its L1 entry is written (`tables`), a refcount block before its table's entry, a grown
//!   table before the header that names it (`refcounts`).
//! * A moved table is durable before the header names it (`head`).
//! * A reference is durably gone before its cluster is used again, and no thread still reads or writes there (`limbo`).
//! * A request is answered when all of that was written: it survives the death of the service. A barrier after it makes
//!   it survive the death of the host; flushes need nothing from the engine.
//!
//! A write that fails fails the requests that wait for it. What it may have brought to the file is never reused.

mod alloc;
mod barrier;
mod head;
mod limbo;
mod pending;
mod piece;
mod refcounts;
mod resize;
mod slices;
mod tables;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use self::alloc::Allocator;
use self::barrier::Barrier;
use self::head::Head;
use self::limbo::Limbo;
use self::pending::{Grant, Pending};
use self::piece::Piece;
use self::refcounts::Refcounts;
use self::resize::Move;
use self::slices::Slices;
use self::tables::Tables;
use crate::entry::L1Entry;
use crate::header::Header;
use crate::layout::Layout;
use crate::map::Map;
use crate::readers::Readers;

/// Who asked: chosen by the caller, given back with the reply.
pub type Ticket = u64;
/// A command under way.
pub type IoId = u64;
/// Data on their way to a cluster that is being allocated.
pub type GrantId = u64;

/// Something to do with the image file. Commands are independent: those that must wait for others are not given before.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// Read metadata. Beyond the end of the file are zeros.
    Read {
        /// To say when it is done.
        io: IoId,
        /// Offset in the file in bytes.
        offset: u64,
        /// Length in bytes.
        len: usize,
    },
    /// Write metadata.
    Write {
        /// To say when it is done.
        io: IoId,
        /// Offset in the file in bytes.
        offset: u64,
        /// Contents.
        data: Vec<u8>,
    },
    /// Make the file at least this long; what is new reads as zeros. Nothing to do for a block device.
    Extend {
        /// To say when it is done.
        io: IoId,
        /// Length in bytes.
        bytes: u64,
    },
    /// Make durable all that was done before the command was given.
    Sync {
        /// To say when it is done.
        io: IoId,
    },
    /// Copy what the guest reads in a range, by the map as it is now, to the image file; zeros where `zero` holds.
    Copy {
        /// To say when it is done.
        io: IoId,
        /// Offset in the disk in bytes.
        guest_offset: u64,
        /// Length in bytes, within one cluster.
        len: u64,
        /// Offset in the file that holds guest data.
        to: u64,
        /// Write zeros instead.
        zero: bool,
    },
    /// Give back the space of clusters that nothing refers to. It reads as zeros after that, or the command failed.
    Punch {
        /// To say when it is done.
        io: IoId,
        /// Offset in the file in bytes.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
}

/// The answer for a piece of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Look it up in the map again.
    Retry,
    /// Write the piece's data to this offset of the file that holds guest data, then call [`Engine::written`].
    Write {
        /// To say when it is done.
        grant: GrantId,
        /// Offset in bytes.
        offset: u64,
    },
    /// Write zeros as data instead: this image, or this range, has no shorter way.
    WriteZeros,
    /// The piece is done.
    Done,
    /// The piece failed.
    Failed,
}

/// What the engine is told of its surroundings.
#[derive(Clone, Copy, Debug)]
pub struct Environment {
    /// There is a backing file, which shows where nothing is allocated.
    pub has_backing: bool,
    /// What was never written in the file reads as zeros, also after a crash: true of regular files.
    pub fresh_is_zero: bool,
    /// Freed clusters are given back to the host.
    pub punch: bool,
    /// Length of the image file in bytes.
    pub file_bytes: u64,
}

/// How many parts of the engine wait for something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Commands given and not ended.
    pub commands: usize,
    /// Clusters whose mapping changes.
    pub clusters: usize,
}

/// Ends of commands, by what is done then.
#[derive(Debug)]
enum Io {
    SliceRead { slice: u64, offset: u64 },
    SliceWrite { slice: u64 },
    TableRead { l1_index: u64 },
    TableWrite { l1_index: u64 },
    L1Write,
    L1Copy,
    Header,
    RefcountBlockRead { block: u64 },
    RefcountBlockWrite { block: u64 },
    RefcountsGrow,
    Extend,
    Copy { cluster: u64 },
    Punch { ticket: u64 },
    Sync,
}

/// The engine.
#[derive(Debug)]
pub struct Engine {
    layout: Layout,
    header: Header,
    /// The header as it stands in the file, up to the end of its first 512 bytes.
    header_sector: Vec<u8>,
    environment: Environment,
    map: Arc<Map>,
    readers: Arc<Readers>,
    ios: HashMap<IoId, Io>,
    next_id: u64,
    commands: VecDeque<Command>,
    replies: VecDeque<(Ticket, Reply)>,
    /// To be started anew, since what they waited for has changed.
    restart: VecDeque<Piece>,
    slices: Slices,
    tables: Tables,
    pending: HashMap<u64, Pending>,
    grants: HashMap<GrantId, Grant>,
    /// Requests that zero several clusters: who asked, how many are left, whether all went well so far.
    zeroing: HashMap<u64, (Ticket, usize, bool)>,
    barrier: Barrier,
    head: Head,
    /// The L1 table, if it is being moved.
    moving: Option<Move>,
    refcounts: Refcounts,
    alloc: Allocator,
    limbo: Limbo,
}

impl Engine {
    /// An engine for an image with this header, whose first sector is `header_sector`, and these tables.
    #[must_use]
    pub fn new(
        header: Header,
        header_sector: Vec<u8>,
        l1: &[L1Entry],
        refcount_table: Vec<u64>,
        map: Arc<Map>,
        readers: Arc<Readers>,
        environment: Environment,
    ) -> Self {
        let layout = header.layout;
        let mut alloc = Allocator::new(&layout, environment.file_bytes);
        let mut is_metadata = |offset: u64, bytes: u64| {
            let first = offset >> layout.cluster_bits;
            (first..first + layout.clusters(bytes)).for_each(|cluster| alloc.is_metadata(cluster));
        };
        is_metadata(header.l1_offset, header.l1_entries * 8);
        is_metadata(header.refcount_table_offset, header.refcount_table_clusters << layout.cluster_bits);
        refcount_table.iter().filter(|&&offset| offset != 0).for_each(|&offset| is_metadata(offset, 1));
        l1.iter().filter_map(|entry| entry.table()).for_each(|offset| is_metadata(offset, 1));
        for (index, &entry) in l1.iter().enumerate() {
            map.set_l1(index as u64, entry);
        }
        Self {
            layout,
            alloc,
            refcounts: Refcounts::new(&header, refcount_table),
            header,
            header_sector,
            environment,
            map,
            readers,
            ios: HashMap::new(),
            next_id: 0,
            commands: VecDeque::new(),
            replies: VecDeque::new(),
            restart: VecDeque::new(),
            slices: Slices::default(),
            tables: Tables::default(),
            pending: HashMap::new(),
            grants: HashMap::new(),
            zeroing: HashMap::new(),
            barrier: Barrier::default(),
            head: Head::default(),
            moving: None,
            limbo: Limbo::default(),
        }
    }

    /// A slice is wanted that the map misses. Answered by `Retry` or `Failed`.
    pub fn load(&mut self, ticket: Ticket, guest_offset: u64) {
        self.begin(Piece::Load { ticket, guest_offset });
    }

    /// A piece of a write, within one cluster, that the map does not show as data of the image's own. Answered by `Write`
    /// and, after [`Engine::written`], `Done`; by `Retry` or `Failed`.
    pub fn write(&mut self, ticket: Ticket, guest_offset: u64, len: u64) {
        self.begin(Piece::Write { ticket, guest_offset, len });
    }

    /// Whole clusters within one slice are to read as zeros; with `unmap` their space may be given back. Answered by
    /// `Done`, `WriteZeros`, `Retry` or `Failed`.
    pub fn write_zeroes(&mut self, ticket: Ticket, guest_offset: u64, len: u64, unmap: bool) {
        self.begin(Piece::Zero { ticket, guest_offset, len, unmap, discard: false });
    }

    /// Whole clusters within one slice need not be kept. Answered by `Done`, `Retry` or `Failed`.
    pub fn discard(&mut self, ticket: Ticket, guest_offset: u64, len: u64) {
        self.begin(Piece::Zero { ticket, guest_offset, len, unmap: true, discard: true });
    }

    /// Data that were granted have been written, or not.
    pub fn written(&mut self, grant: GrantId, ok: bool) {
        self.data_written(grant, ok);
        self.run();
    }

    /// A command has ended. `data` is what was read; `ok` is false if it failed.
    pub fn completed(&mut self, io: IoId, ok: bool, data: &[u8]) {
        let Some(what) = self.ios.remove(&io) else { return };
        match what {
            Io::SliceRead { slice, offset } => self.slice_read(slice, offset, ok, data),
            Io::SliceWrite { slice } => self.slice_written(slice, ok),
            Io::TableRead { l1_index } => self.table_read(l1_index, ok, data),
            Io::TableWrite { l1_index } => self.table_written(l1_index, ok),
            Io::L1Write => self.l1_written(ok),
            Io::L1Copy => self.l1_copied(ok),
            Io::Header => self.header_written(ok),
            Io::RefcountBlockRead { block } => self.refcount_block_read(block, ok, data),
            Io::RefcountBlockWrite { block } => self.refcount_block_written(block, ok),
            Io::RefcountsGrow => self.refcounts_grow_written(ok),
            Io::Extend => self.reservation_written(ok),
            Io::Copy { cluster } => self.copied(cluster, ok),
            Io::Punch { ticket } => self.punched(ticket, ok),
            Io::Sync => self.synced(ok),
        }
        self.run();
    }

    /// The next command to carry out. Each must be, and its end told, whether requests still wait for it or not.
    pub fn next_command(&mut self) -> Option<Command> {
        self.commands.pop_front()
    }

    /// The next answer.
    pub fn next_reply(&mut self) -> Option<(Ticket, Reply)> {
        self.replies.pop_front()
    }

    /// What is under way. Without commands, only what threads do with grants and old mappings goes on.
    #[must_use]
    pub fn backlog(&self) -> Backlog {
        Backlog { commands: self.ios.len(), clusters: self.pending.len() }
    }

    /// The map, for threads that look up.
    #[must_use]
    pub const fn map(&self) -> &Arc<Map> {
        &self.map
    }

    fn begin(&mut self, piece: Piece) {
        self.restart.push_back(piece);
        self.run();
    }

    /// Starts what can go on.
    fn run(&mut self) {
        loop {
            while let Some(piece) = self.restart.pop_front() {
                self.start(piece);
            }
            self.write_slices();
            self.write_l1();
            self.copy_l1();
            self.move_limbo();
            self.start_barrier();
            if self.restart.is_empty() {
                return;
            }
        }
    }

    fn reply(&mut self, ticket: Ticket, reply: Reply) {
        self.replies.push_back((ticket, reply));
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn command(&mut self, what: Io, command: impl FnOnce(IoId) -> Command) {
        let io = self.id();
        self.ios.insert(io, what);
        self.commands.push_back(command(io));
    }

    fn read(&mut self, what: Io, offset: u64, len: u64) {
        self.command(what, |io| Command::Read { io, offset, len: len as usize });
    }

    fn write_metadata(&mut self, what: Io, offset: u64, data: Vec<u8>) {
        self.command(what, |io| Command::Write { io, offset, data });
    }
}

/// Words as they stand in the file.
pub(crate) fn to_bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

/// Words from the file; a part of a word at the end is left out.
pub(crate) fn to_words(bytes: &[u8]) -> Vec<u64> {
    let word = |bytes: &[u8]| bytes.iter().fold(0, |word, &byte| word << 8 | u64::from(byte));
    bytes.chunks_exact(8).map(word).collect()
}

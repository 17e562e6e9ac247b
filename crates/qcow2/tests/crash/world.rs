//! A guest, its queues, an engine and a file, one event after the other.

use std::sync::Arc;

use qcow2::check::check;
use qcow2::create::{NewImage, create};
use qcow2::engine::{Command, Engine, Environment, GrantId, IoId, Reply};
use qcow2::entry::Mapping;
use qcow2::header::Compression;
use qcow2::image::{Image, ReadAt};
use qcow2::layout::Layout;
use qcow2::map::{Lookup, Map};
use qcow2::readers::{Reader, Readers};

use crate::model::Model;
use crate::random::Random;
use crate::reader::{GARBAGE, Value, backing_value, read_all, sector_of};
use crate::snapshot;
use crate::store::{Contents, SECTOR, Store};

/// What is simulated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    /// What all that is random comes from.
    pub(crate) seed: u64,
    pub(crate) version: u32,
    pub(crate) layout: Layout,
    pub(crate) disk_sectors: u64,
    pub(crate) backing_sectors: u64,
    pub(crate) fresh_is_zero: bool,
    pub(crate) punch: bool,
    pub(crate) queue_depth: usize,
    /// So many freed clusters are used again.
    pub(crate) reuse_after: usize,
    /// How large the disk may become.
    pub(crate) sectors_max: u64,
    /// The guest changes places that it is changing.
    pub(crate) racing: bool,
    /// One command in so many fails; 0 for none.
    pub(crate) fails_one_in: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Write(Value),
    Zero { unmap: bool },
    Discard,
}

/// A request of the guest.
struct Op {
    kind: Kind,
    sectors: std::ops::Range<u64>,
    pieces: usize,
    failed: bool,
    /// Another request changed one of the sectors meanwhile.
    raced: bool,
    queue: usize,
    epoch: u64,
}

/// A piece of one, in bytes.
#[derive(Clone, Copy)]
struct Piece {
    op: u64,
    offset: u64,
    len: u64,
    kind: Kind,
}

/// A resize, by its steps.
#[derive(Clone, Copy)]
enum Resize {
    MakeRoom {
        sectors: u64,
    },
    /// Data of the backing file behind the old end are hidden.
    Hide {
        sectors: u64,
    },
    SetSize {
        sectors: u64,
    },
}

/// What is on its way to the file or from it.
enum Flying {
    Read { io: IoId, offset: u64, len: usize },
    Write { io: IoId },
    Copy { io: IoId },
    Punch { io: IoId },
    Extend { io: IoId },
    Sync { io: IoId },
    Data { piece: Piece, grant: Option<GrantId> },
    Flush,
}

pub(crate) struct World {
    case: Case,
    pub(crate) random: Random,
    store: Store,
    engine: Engine,
    map: Arc<Map>,
    queues: Vec<Reader>,
    ops: std::collections::BTreeMap<u64, Op>,
    pieces: std::collections::BTreeMap<u64, Piece>,
    /// A resize under way, and the ticket of its step.
    resize: Option<(u64, Resize)>,
    flying: Vec<(u64, Flying)>,
    model: Model,
    next: u64,
    pub(crate) crash_points: u64,
    /// Requests that were answered, and those that failed.
    pub(crate) answered: u64,
    pub(crate) failed: u64,
    /// What the internal snapshot holds, if there is one.
    snapshot: Option<Vec<Value>>,
}

fn open(case: &Case, contents: &Contents) -> (Engine, Vec<Reader>) {
    let image = Image::read(contents).unwrap();
    // A cache of a few slices, so that they come and go.
    let map = Arc::new(Map::new(case.layout, image.l1.len() as u64, 16 * case.layout.slice_bytes()));
    let readers = Arc::new(Readers::default());
    let queues = (0..2).map(|_| readers.register()).collect();
    let environment = Environment {
        has_backing: case.backing_sectors > 0,
        fresh_is_zero: case.fresh_is_zero,
        punch: case.punch,
        file_bytes: image.file_bytes,
    };
    let (l1, table) = (image.l1, image.refcount_table);
    let mut engine = Engine::new(image.header, image.header_sector, &l1, table, map, readers, environment);
    engine.reuse_after(case.reuse_after);
    (engine, queues)
}

impl World {
    pub(crate) fn new(case: Case) -> Self {
        let new = NewImage {
            version: case.version,
            layout: case.layout,
            disk_bytes: case.disk_sectors * SECTOR,
            backing: (case.backing_sectors > 0).then(|| ("base".into(), "raw".into())),
            data_file: None,
            compression: Compression::Deflate,
        };
        let mut contents = Contents::new(if case.fresh_is_zero { 0 } else { 0xa5 });
        for (offset, data) in create(&new) {
            contents.write(offset, &data);
        }
        Self::over(case, contents)
    }

    /// An image that is there already.
    pub(crate) fn over(case: Case, contents: Contents) -> Self {
        let image = Image::read(&contents).unwrap();
        let case = Case { disk_sectors: image.header.disk_bytes / SECTOR, ..case };
        let (engine, queues) = open(&case, &contents);
        let snapshot = (image.header.snapshots > 0).then(|| snapshot::read(&contents, case.backing_sectors));
        let mut values = read_all(&contents, &image, case.backing_sectors);
        values.resize(case.sectors_max as usize, 0);
        let model = Model::new(values);
        Self {
            case,
            random: Random::new(case.seed),
            map: engine.map().clone(),
            store: Store::new(contents),
            engine,
            queues,
            ops: Default::default(),
            pieces: Default::default(),
            resize: None,
            flying: Vec::new(),
            model,
            next: 1,
            crash_points: 0,
            answered: 0,
            failed: 0,
            snapshot,
        }
    }

    fn id(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// One thing happens: a request comes, or something that was on its way ends.
    pub(crate) fn step(&mut self, requests: bool) -> bool {
        let room = self.ops.len() < self.case.queue_depth;
        if requests && room && (self.flying.is_empty() || self.random.one_in(3)) {
            self.request();
        } else if self.flying.is_empty() {
            return false;
        } else {
            let at = self.random.below(self.flying.len() as u64) as usize;
            let (id, what) = self.flying.swap_remove(at);
            self.end(id, what);
        }
        self.settle();
        true
    }

    /// Begins to grow the disk by some clusters.
    fn grow(&mut self) {
        let cluster = self.case.layout.cluster_bytes() / SECTOR;
        let sectors = self.case.disk_sectors + cluster * (1 + self.random.below(40));
        if self.resize.is_none() && sectors <= self.case.sectors_max {
            let ticket = self.id();
            self.resize = Some((ticket, Resize::MakeRoom { sectors }));
            self.engine.make_room(ticket, sectors * SECTOR);
        }
    }

    /// A step of the resize is over.
    fn resized(&mut self, step: Resize, ok: bool) {
        self.resize = None;
        if !ok {
            self.failed += 1;
            return;
        }
        let ticket = self.id();
        match step {
            Resize::MakeRoom { sectors } => {
                let cluster = self.case.layout.cluster_bytes() / SECTOR;
                let hidden =
                    self.case.disk_sectors..self.case.backing_sectors.next_multiple_of(cluster).min(sectors);
                self.resize = Some((ticket, Resize::Hide { sectors }));
                if hidden.is_empty() {
                    return self.resized(Resize::Hide { sectors }, true);
                }
                self.begin(Kind::Zero { unmap: true }, hidden, false, ticket);
            }
            Resize::Hide { sectors } => {
                self.resize = Some((ticket, Resize::SetSize { sectors }));
                self.engine.set_size(ticket, sectors * SECTOR);
            }
            Resize::SetSize { sectors } => self.case.disk_sectors = sectors,
        }
    }

    fn request(&mut self) {
        if self.random.one_in(30) {
            return self.grow();
        }
        if self.random.one_in(8) {
            if self.model.begin_flush() {
                let id = self.id();
                self.store.begin_barrier(id);
                self.flying.push((id, Flying::Flush));
            }
            return;
        }
        let cluster = self.case.layout.cluster_bytes() / SECTOR;
        let id = self.id();
        let whole = self.random.one_in(3);
        let unit = if whole { cluster } else { 1 };
        let first = self.random.below(self.case.disk_sectors / unit) * unit;
        let most = if self.random.one_in(4) { 4 } else { 1 };
        let count = (1 + self.random.below(most)) * unit;
        let sectors = first..(first + count).min(self.case.disk_sectors);
        let mut raced = false;
        for op in self.ops.values_mut() {
            if op.sectors.start < sectors.end && sectors.start < op.sectors.end {
                if !self.case.racing {
                    return;
                }
                (op.raced, raced) = (true, true);
            }
        }
        let kind = match self.random.below(10) {
            0 | 1 if whole => Kind::Discard,
            2 | 3 if whole => Kind::Zero { unmap: self.random.one_in(2) },
            _ => Kind::Write(id),
        };
        self.model.begin_write(sectors.clone(), if let Kind::Write(value) = kind { value } else { 0 });
        self.begin(kind, sectors, raced, id);
    }

    /// Begins a request, piece by piece.
    fn begin(&mut self, kind: Kind, sectors: std::ops::Range<u64>, raced: bool, id: u64) {
        let queue = self.random.below(2) as usize;
        let epoch = self.queues[queue].begin();
        let unit = match kind {
            Kind::Write(_) => self.case.layout.cluster_bytes(),
            _ => self.case.layout.slice_entries() << self.case.layout.cluster_bits,
        };
        let (mut at, end) = (sectors.start * SECTOR, sectors.end * SECTOR);
        let mut pieces = Vec::new();
        while at < end {
            let len = (unit - at % unit).min(end - at);
            pieces.push(Piece { op: id, offset: at, len, kind });
            at += len;
        }
        self.ops.insert(id, Op { kind, sectors, pieces: pieces.len(), failed: false, raced, queue, epoch });
        for piece in pieces {
            self.drive(piece);
        }
    }

    /// Does for a piece what a queue's thread does: what the map shows it does itself.
    fn drive(&mut self, piece: Piece) {
        let ticket = self.id();
        match piece.kind {
            Kind::Write(_) => {
                let Lookup::Entry(entry) = self.map.look_up(piece.offset) else {
                    self.pieces.insert(ticket, piece);
                    return match self.random.one_in(2) {
                        true => self.engine.load(ticket, piece.offset),
                        false => self.engine.write(ticket, piece.offset, piece.len),
                    };
                };
                match entry.map(&self.case.layout, self.case.layout.in_cluster(piece.offset)) {
                    (Mapping::Data { offset, owned: true }, alike) if alike >= piece.len => {
                        self.write_data(piece, offset, None);
                    }
                    _ => {
                        self.pieces.insert(ticket, piece);
                        self.engine.write(ticket, piece.offset, piece.len);
                    }
                }
            }
            Kind::Zero { unmap } => {
                self.pieces.insert(ticket, piece);
                self.engine.write_zeroes(ticket, piece.offset, piece.len, unmap);
            }
            Kind::Discard => {
                self.pieces.insert(ticket, piece);
                self.engine.discard(ticket, piece.offset, piece.len);
            }
        }
    }

    fn write_data(&mut self, piece: Piece, offset: u64, grant: Option<GrantId>) {
        let Kind::Write(value) = piece.kind else { panic!("data of no write") };
        let data = sector_of(value).repeat((piece.len / SECTOR) as usize);
        let id = self.id();
        self.store.begin_data(id, offset, &data);
        self.flying.push((id, Flying::Data { piece, grant }));
    }

    /// What the guest reads now in a range.
    fn guest_data(&self, offset: u64, len: u64) -> Vec<u8> {
        let layout = &self.case.layout;
        let mut data = Vec::new();
        for at in (offset..offset + len).step_by(SECTOR as usize) {
            let Lookup::Entry(entry) = self.map.look_up(at) else {
                panic!("a slice with changes left the map")
            };
            let mut sector = [0; SECTOR as usize];
            match entry.map(layout, layout.in_cluster(at)).0 {
                Mapping::Zero => {}
                Mapping::Unallocated => {
                    sector = sector_of(backing_value(at / SECTOR, self.case.backing_sectors));
                }
                Mapping::Data { offset, .. } => self.store.now.read_at(offset, &mut sector).unwrap(),
                Mapping::Compressed(_) | Mapping::Invalid => sector = sector_of(GARBAGE),
            }
            data.extend(sector);
        }
        data
    }

    /// Takes from the engine what it wants done and answered.
    fn settle(&mut self) {
        loop {
            if let Some(command) = self.engine.next_command() {
                let id = self.id();
                let flying = match command {
                    Command::Read { io, offset, len } => Flying::Read { io, offset, len },
                    Command::Write { io, offset, data } => {
                        self.store.begin_write(id, offset, &data);
                        Flying::Write { io }
                    }
                    Command::Copy { io, guest_offset, len, to, zero } => {
                        let data =
                            if zero { vec![0; len as usize] } else { self.guest_data(guest_offset, len) };
                        self.store.begin_write(id, to, &data);
                        Flying::Copy { io }
                    }
                    Command::Punch { io, offset, len } => {
                        self.store.begin_punch(id, offset, len);
                        Flying::Punch { io }
                    }
                    Command::Extend { io, bytes } => {
                        self.store.begin_extend(id, bytes);
                        Flying::Extend { io }
                    }
                    Command::Sync { io } => {
                        self.store.begin_barrier(id);
                        Flying::Sync { io }
                    }
                };
                self.flying.push((id, flying));
            } else if let Some((ticket, reply)) = self.engine.next_reply() {
                if let Some((resize, step)) = self.resize
                    && resize == ticket
                {
                    self.resized(step, reply == Reply::Done);
                    continue;
                }
                let piece =
                    self.pieces.remove(&ticket).expect("one answer for a ticket, unless data are granted");
                match reply {
                    Reply::Retry => self.drive(piece),
                    Reply::Write { grant, offset } => {
                        self.pieces.insert(ticket, piece);
                        self.write_data(piece, offset, Some(grant));
                    }
                    Reply::WriteZeros => self.write_zeros(piece),
                    Reply::Done => self.piece_done(piece, true),
                    Reply::Failed => self.piece_done(piece, false),
                }
            } else {
                return;
            }
        }
    }

    /// Zeros as data, cluster by cluster.
    fn write_zeros(&mut self, piece: Piece) {
        let cluster = self.case.layout.cluster_bytes();
        let pieces: Vec<_> = (piece.offset..piece.offset + piece.len).step_by(cluster as usize).collect();
        self.ops.get_mut(&piece.op).unwrap().pieces += pieces.len() - 1;
        for offset in pieces {
            self.drive(Piece { offset, len: cluster, kind: Kind::Write(0), ..piece });
        }
    }

    fn piece_done(&mut self, piece: Piece, ok: bool) {
        let op = self.ops.get_mut(&piece.op).unwrap();
        op.failed |= !ok;
        op.pieces -= 1;
        if op.pieces > 0 {
            return;
        }
        let op = self.ops.remove(&piece.op).unwrap();
        self.queues[op.queue].end(op.epoch);
        if let Some((ticket, step)) = self.resize
            && ticket == piece.op
        {
            return self.resized(step, !op.failed);
        }
        if op.failed {
            // It may have come to pass or not, in any part.
            self.failed += 1;
            return;
        }
        self.answered += 1;
        if op.raced {
            // Either may have been the last.
            return;
        }
        match op.kind {
            Kind::Write(value) => self.model.end_write(op.sectors, value),
            Kind::Zero { .. } => self.model.end_write(op.sectors, 0),
            // What was there may still be.
            Kind::Discard => {}
        }
    }

    fn end(&mut self, id: u64, what: Flying) {
        let fails = self.case.fails_one_in > 0 && self.random.one_in(self.case.fails_one_in);
        let write = |world: &mut Self| match fails {
            true => world.store.fail_write(id, &mut world.random),
            false => world.store.end_write(id),
        };
        match what {
            Flying::Read { io, offset, len } => {
                let mut data = vec![0; len];
                self.store.now.read_at(offset, &mut data).unwrap();
                self.engine.completed(io, !fails, if fails { &[] } else { &data });
            }
            Flying::Write { io } | Flying::Copy { io } | Flying::Punch { io } | Flying::Extend { io } => {
                write(self);
                self.engine.completed(io, !fails, &[]);
            }
            Flying::Sync { io } => {
                if !fails {
                    self.store.end_barrier(id);
                }
                self.engine.completed(io, !fails, &[]);
            }
            Flying::Data { piece, grant } => {
                write(self);
                match grant {
                    Some(grant) => self.engine.written(grant, !fails),
                    None => self.piece_done(piece, !fails),
                }
            }
            Flying::Flush => {
                self.store.end_barrier(id);
                self.model.end_flush();
            }
        }
    }

    /// The machine stops here: what would be found?
    pub(crate) fn check_crash(&mut self, power_cut: bool) {
        self.crash_points += 1;
        let contents = match power_cut {
            true => self.store.after_power_cut(&mut self.random),
            false => self.store.after_kill(&mut self.random),
        };
        self.check_contents(&contents, power_cut);
    }

    fn check_contents(&self, contents: &Contents, power_cut: bool) {
        let image = Image::read(contents).unwrap();
        let report = check(contents).unwrap();
        let wrong: Vec<_> = report.findings.iter().filter(|text| !text.starts_with("leaked")).collect();
        assert_eq!(report.corruptions, 0, "{:?}, power cut {power_cut}: {wrong:#?}", self.case);
        let values = read_all(contents, &image, self.case.backing_sectors);
        if let Some(snapshot) = &self.snapshot {
            assert!(*snapshot == snapshot::read(contents, self.case.backing_sectors), "{:?}", self.case);
        }
        if let Err(error) = self.model.check(&values, power_cut) {
            panic!("{:?}, power cut {power_cut}: {error}", self.case);
        }
    }

    /// The service dies here and comes back.
    pub(crate) fn restart(&mut self, power_cut: bool) {
        let contents = match power_cut {
            true => self.store.after_power_cut(&mut self.random),
            false => self.store.after_kill(&mut self.random),
        };
        self.check_contents(&contents, power_cut);
        let image = Image::read(&contents).unwrap();
        let values = read_all(&contents, &image, self.case.backing_sectors);
        if power_cut {
            self.store = Store::new(contents.clone());
            let mut values = values;
            values.resize(self.case.sectors_max as usize, 0);
            self.model = Model::new(values);
        } else {
            self.store.killed(contents.clone());
            self.model.killed(&values);
        }
        self.case.disk_sectors = image.header.disk_bytes / SECTOR;
        self.resize = None;
        (self.engine, self.queues) = open(&self.case, &contents);
        self.map = self.engine.map().clone();
        self.ops.clear();
        self.pieces.clear();
        self.flying.clear();
    }

    /// Lets everything that is on its way end.
    pub(crate) fn drain(&mut self) {
        while self.step(false) {}
        assert!(self.resize.is_none(), "{:?}: a resize that nothing will ever end", self.case);
        assert!(self.ops.is_empty(), "{:?}: requests that nothing will ever answer", self.case);
        assert_eq!(self.engine.backlog(), Default::default(), "{:?}", self.case);
    }

    /// An orderly end. The image is left without leaks, if nothing ever failed or crashed.
    pub(crate) fn close(&mut self, leaks: bool) -> Contents {
        self.drain();
        self.engine.close();
        self.settle();
        self.drain();
        let contents = self.store.now.clone();
        self.check_contents(&contents, false);
        let report = check(&contents).unwrap();
        assert!(leaks || report.leaks == 0, "{:?}: {:#?}", self.case, report.findings);
        contents
    }
}

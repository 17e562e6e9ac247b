//! A thread's way to an image: requests are cut into pieces, looked up in the map and carried out as transfers; what the
//! map cannot answer goes to the engine.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use qcow2::engine::{Command, Reply};
use qcow2::readers::Reader;
use virtio::ring::{Chains, Token};

use super::combine::{Bell, Message, Post, Seat, SeatId, Yield};
use super::image::{Image, Layer};
use super::jobs::{Jobs, Kind, Piece, Work};
use super::packed::Unpacking;
use crate::backend::{Channel, Done, Op, OpKind, Status};
use crate::backends::file::transfer::{Carrier, Ended, Transfer};

/// Bytes of pieces, at least, after which a turn is over.
pub(super) const TURN_BYTES_MAX: u64 = 512 << 10;

/// A request in flight.
struct Request {
    /// `None` of those that a control thread makes.
    token: Option<Token>,
    /// Pieces that are not done.
    pieces: u32,
    failed: bool,
    /// It guards what it found in the map.
    epoch: u64,
}

/// A thread's way to an image.
pub(super) struct ImageChannel<C: Carrier> {
    pub(super) carrier: C,
    pub(super) image: Arc<Image>,
    /// `None` once it must guard for ever.
    reader: Option<Reader>,
    requests: Box<[Option<Request>]>,
    requests_in_flight: usize,
    pub(super) jobs: Jobs,
    /// Pieces that wait for a turn, or for room among the jobs.
    todo: VecDeque<Piece>,
    pub(super) unpacking: Unpacking,
    pub(super) seat: SeatId,
    bell: Arc<Bell>,
    sender: Sender<Post>,
    posts: Option<Receiver<Post>>,
    /// What engines want done, and answered.
    pub(super) out: Yield,
    /// Transfers that are over.
    pub(super) ended: Vec<Ended>,
    /// Requests that are over.
    over: Vec<Done>,
    /// What a control thread asked for is over, well or not.
    pub(super) answer: Option<bool>,
    /// Bytes of this turn.
    pub(super) bytes: u64,
    /// No request comes any more.
    retired: bool,
}

impl<C: Carrier> ImageChannel<C> {
    /// A way for up to `depth` requests. The carrier has room for [`Jobs::count`] transfers.
    pub(super) fn new(image: Arc<Image>, carrier: C, depth: u16) -> Self {
        let (sender, posts) = channel();
        let bell = Arc::new(Bell::new(carrier.event().clone()));
        let seat = image.seats.take(&bell);
        for layer in &image.layers {
            if let Layer::Qcow2(tables) = layer {
                let own = Seat { posts: sender.clone(), bell: bell.clone() };
                tables.shared.send(Message::Join(seat, own));
            }
        }
        Self {
            carrier,
            reader: Some(image.readers.register()),
            image,
            requests: (0..depth).map(|_| None).collect(),
            requests_in_flight: 0,
            jobs: Jobs::new(depth),
            todo: VecDeque::new(),
            unpacking: Unpacking::default(),
            seat,
            bell,
            sender,
            posts: Some(posts),
            out: Yield::default(),
            ended: Vec::new(),
            over: Vec::new(),
            answer: None,
            bytes: 0,
            retired: false,
        }
    }

    /// Begins a request: all of a range.
    #[inline(always)]
    pub(super) fn begin(
        &mut self,
        slot: usize,
        token: Option<Token>,
        kind: Kind,
        range: (u64, u64),
        chains: &Chains,
    ) {
        let epoch = self.reader.as_mut().map_or(0, Reader::begin);
        self.requests[slot] = Some(Request { token, pieces: 1, failed: false, epoch });
        self.requests_in_flight += 1;
        let (offset, len) = range;
        self.advance(Piece { request: slot as u16, kind, offset, len, from: 0 }, chains);
    }

    /// Takes on one more piece of a request.
    #[inline(always)]
    pub(super) fn add_piece(&mut self, request: u16) {
        if let Some(request) = &mut self.requests[usize::from(request)] {
            request.pieces += 1;
        }
    }

    /// Leaves a piece for later.
    pub(super) fn postpone(&mut self, piece: Piece) {
        self.todo.push_back(piece);
    }

    /// A piece of a request is done, well or not.
    #[inline(always)]
    pub(super) fn piece_over(&mut self, slot: u16, ok: bool) {
        let slot = &mut self.requests[usize::from(slot)];
        let over = |request: &mut Request| {
            request.failed |= !ok;
            request.pieces -= 1;
            request.pieces == 0
        };
        let Some(Request { token, failed, epoch, .. }) = slot.take_if(over) else { return };
        self.requests_in_flight -= 1;
        if let Some(reader) = &mut self.reader {
            reader.end(epoch);
        }
        match token {
            Some(token) => {
                let status = if failed { Status::IoError } else { Status::Ok };
                self.over.push(Done { token, status });
            }
            None => self.answer = Some(!failed),
        }
    }

    /// Where posts for this thread go.
    pub(super) fn own_seat(&self) -> Seat {
        Seat { posts: self.sender.clone(), bell: self.bell.clone() }
    }

    /// Asks the engine of a layer something for a job.
    pub(super) fn ask(&mut self, job: usize, layer: u8, message: impl FnOnce(u64) -> Message) {
        let message = message(self.jobs.ticket(self.seat, job));
        self.tell(layer, message);
    }

    /// Tells the engine of a layer something.
    pub(super) fn tell(&mut self, layer: u8, message: Message) {
        if let Some(tables) = self.image.tables(layer)
            && !self.image.seats.is_broken()
        {
            tables.shared.send(message);
        }
    }

    /// Begins a transfer of a job.
    #[inline(always)]
    pub(super) fn start(&mut self, job: usize, transfer: Transfer, own: Vec<u8>, chains: &Chains) {
        self.bytes += transfer.len.min(TURN_BYTES_MAX);
        self.carrier.start(job, transfer, own, chains, &mut self.ended);
    }

    /// Goes on with everything that can go on.
    #[inline(always)]
    fn go_on(&mut self, chains: &Chains) {
        loop {
            let mut idle = self.ended.is_empty();
            let mut ended = std::mem::take(&mut self.ended);
            for Ended { id, status, own } in ended.drain(..) {
                self.transfer_over(id, status, own, chains);
            }
            if self.ended.is_empty() {
                self.ended = ended;
            }
            if self.engines_have_work() {
                idle &= !self.work_with_engines(chains);
            }
            if !self.todo.is_empty() {
                idle &= !self.take_up(chains);
            }
            if idle {
                return;
            }
        }
    }

    fn engines_have_work(&self) -> bool {
        self.bell.has_posts()
            || !self.out.posts.is_empty()
            || !self.out.commands.is_empty()
            || self.has_messages()
    }

    fn has_messages(&self) -> bool {
        let waits = |layer: &Layer| match layer {
            Layer::Qcow2(tables) => tables.shared.has_messages(),
            Layer::Raw { .. } => false,
        };
        self.image.layers.iter().any(waits) && !self.image.seats.is_broken()
    }

    /// Lets engines run, takes their answers and carries out their commands; false if there was nothing to do.
    #[cold]
    fn work_with_engines(&mut self, chains: &Chains) -> bool {
        self.combine();
        let mut worked = false;
        if self.bell.has_posts() {
            self.bell.take_posts();
            self.out.posts.extend(self.posts.iter().flat_map(Receiver::try_iter));
        }
        while let Some(post) = self.out.posts.pop_front() {
            worked = true;
            self.take_post(post, chains);
        }
        while self.jobs.has_room_for_command()
            && let Some((layer, command)) = self.out.commands.pop_front()
        {
            worked = true;
            self.carry_out(layer, command, chains);
        }
        worked
    }

    /// Lets engines read their messages. One that takes no requests any more leaves that to others, if there are any: it
    /// would be kept from its end.
    fn combine(&mut self) {
        if !self.has_messages() {
            return;
        }
        if self.retired && self.requests_in_flight == 0 && self.image.seats.ring_others(self.seat) {
            return;
        }
        let image = self.image.clone();
        for (number, layer) in image.layers.iter().enumerate() {
            if let Layer::Qcow2(tables) = layer {
                tables.shared.combine(number as u8, self.seat, &image.seats, &mut self.out);
            }
        }
    }

    /// Takes up pieces that waited; false if there is no room for any.
    #[cold]
    fn take_up(&mut self, chains: &Chains) -> bool {
        let mut taken = false;
        for _ in 0..self.todo.len() {
            if self.bytes >= TURN_BYTES_MAX || !self.jobs.has_room() {
                break;
            }
            let Some(piece) = self.todo.pop_front() else { break };
            taken = true;
            self.advance(piece, chains);
        }
        taken
    }

    #[cold]
    fn take_post(&mut self, post: Post, chains: &Chains) {
        let (ticket, reply) = match post {
            Post::Reply(ticket, reply) => (ticket, reply),
            Post::Unpacked(ticket, cluster) => {
                if let Some(job) = self.jobs.of_ticket(ticket) {
                    self.unpacked(job, cluster, chains);
                }
                return;
            }
        };
        let Some(job) = self.jobs.of_ticket(ticket) else { return };
        match self.jobs.work(job) {
            Work::Asked(piece) => self.piece_answered(job, piece, reply, chains),
            Work::CopyAsked(copy) if reply == Reply::Retry => self.copy_on(job, copy, chains),
            Work::CopyAsked(copy) => self.copy_over(job, copy, false),
            Work::Step => {
                self.jobs.end(job);
                self.answer = Some(reply == Reply::Done);
            }
            _ => {}
        }
    }

    /// Nothing is to be had of a broken engine: who waits for it need not.
    #[cold]
    fn give_up_waiting(&mut self) {
        let waiting: Vec<_> = self.jobs.all().collect();
        for (job, work) in waiting {
            match work {
                Work::Asked(piece) => {
                    self.jobs.end(job);
                    self.piece_over(piece.request, false);
                }
                Work::CopyAsked(_) => {
                    self.jobs.end(job);
                }
                Work::Step => {
                    self.jobs.end(job);
                    self.answer = Some(false);
                }
                _ => {}
            }
        }
        self.out.commands.clear();
    }

    /// The engine's commands that are under way here, and the data that it has granted a place.
    fn under_way(&self, layer: u8) -> (Vec<u64>, Vec<u64>) {
        let (mut ios, mut grants) = (Vec::new(), Vec::new());
        for (_, work) in self.jobs.all() {
            match work {
                Work::Io { layer: of, io, .. } if of == layer => ios.push(io),
                Work::CopyAsked(copy)
                | Work::CopyReading(copy)
                | Work::CopyFetching(copy, _)
                | Work::CopyWriting(copy)
                    if layer == 0 =>
                {
                    ios.push(copy.io);
                }
                Work::Moving(_, Some(grant)) if layer == 0 => grants.push(grant),
                _ => {}
            }
        }
        let waiting = self.out.commands.iter().filter(|(of, _)| *of == layer);
        ios.extend(waiting.map(|(_, command)| match command {
            Command::Read { io, .. }
            | Command::Write { io, .. }
            | Command::Extend { io, .. }
            | Command::Sync { io }
            | Command::Copy { io, .. }
            | Command::Punch { io, .. } => *io,
        }));
        let posted = self.out.posts.iter().filter_map(|post| match post {
            Post::Reply(_, Reply::Write { grant, .. }) if layer == 0 => Some(*grant),
            _ => None,
        });
        grants.extend(posted);
        (ios, grants)
    }

    /// One turn.
    #[inline(always)]
    fn turn(&mut self, chains: &Chains, done: &mut Vec<Done>) {
        self.bytes = 0;
        if self.image.seats.is_broken() {
            self.give_up_waiting();
        }
        self.carrier.reap(chains, &mut self.ended);
        self.go_on(chains);
        self.carrier.submit();
        done.append(&mut self.over);
    }
}

impl<C: Carrier> Channel for ImageChannel<C> {
    fn submit(&mut self, ops: &mut Vec<Op>, chains: &Chains, done: &mut Vec<Done>) {
        let bytes = self.image.bytes();
        for Op { token, kind, offset, len, .. } in ops.drain(..) {
            let kind = match kind {
                OpKind::Read => Kind::Read,
                OpKind::Write => Kind::Write,
                OpKind::Flush => Kind::Flush { file: 0 },
                OpKind::Discard => Kind::Discard,
                OpKind::WriteZeroes { unmap } => Kind::Zero { unmap },
                OpKind::SecureErase => {
                    done.push(Done { token, status: Status::Unsupported });
                    continue;
                }
            };
            if offset + len > bytes {
                // It was checked against a larger size.
                done.push(Done { token, status: Status::IoError });
                continue;
            }
            self.begin(token.slot(), Some(token), kind, (offset, len), chains);
        }
        self.carrier.submit();
        self.turn(chains, done);
    }

    fn reap(&mut self, chains: &Chains, done: &mut Vec<Done>) {
        self.turn(chains, done);
    }

    fn in_flight(&self) -> usize {
        let commands = usize::from(self.jobs.any() || !self.out.commands.is_empty());
        self.requests_in_flight.max(commands)
    }

    fn has_work(&self) -> bool {
        self.jobs.any() || self.engines_have_work()
    }

    fn retire(&mut self) {
        self.retired = true;
        self.bell.retire();
    }

    fn completion_fd(&self) -> Option<RawFd> {
        Some(self.carrier.event().as_raw_fd())
    }

    fn arm(&mut self) -> bool {
        self.bell.sleeps();
        let carrier = self.carrier.arm();
        let room = !self.todo.is_empty() && self.jobs.has_room();
        carrier || room || !self.ended.is_empty() || self.engines_have_work()
    }

    fn disarm(&mut self) {
        self.bell.wakes();
        self.carrier.disarm();
    }
}

impl<C: Carrier> Drop for ImageChannel<C> {
    fn drop(&mut self) {
        if self.carrier.abandons() {
            // What the kernel may still do it may do at any time: nothing of what is guarded can be used again, and what
            // is written over an old table may be followed by what was to be there before.
            std::mem::forget(self.reader.take());
            self.image.seats.break_down();
        }
        for (number, layer) in self.image.layers.iter().enumerate() {
            if let Layer::Qcow2(tables) = layer {
                let (ios, grants) = self.under_way(number as u8);
                let posts = if number == 0 { self.posts.take() } else { None };
                tables.shared.send(Message::Leave { seat: self.seat, ios, grants, posts });
            }
        }
        self.image.seats.leave(self.seat);
        self.image.seats.ring_others(self.seat);
    }
}

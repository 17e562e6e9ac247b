//! An engine that many threads share, without any of them waiting for another.
//!
//! Who wants something of the engine puts a message into its inbox, and then tries to lock it. The thread that gets it
//! reads all messages, lets the engine run, posts the replies to those who asked, and carries out the commands itself. One
//! that does not get it goes on with other things: after unlocking, the holder looks at the inbox again.
//!
//! A reply to a thread that sleeps rings its [`Bell`].

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};

use qcow2::engine::{Command, Engine, GrantId, IoId, Reply, Ticket};

/// How often the holder looks at the inbox again before its thread does something else.
const ROUNDS_MAX: usize = 8;

/// The number of a thread that works on an image.
pub(super) type SeatId = u32;

/// Something for an engine.
pub(super) enum Message {
    /// From now on there is this thread.
    Join(SeatId, Seat),
    /// It is gone. What it had under way has failed, as far as anybody will know.
    Leave { seat: SeatId, ios: Vec<IoId>, grants: Vec<GrantId>, posts: Option<Receiver<Post>> },
    /// See [`Engine::load`].
    Load { ticket: Ticket, offset: u64 },
    /// See [`Engine::write`].
    Write { ticket: Ticket, offset: u64, len: u64 },
    /// See [`Engine::write_zeroes`].
    WriteZeroes { ticket: Ticket, offset: u64, len: u64, unmap: bool },
    /// See [`Engine::discard`].
    Discard { ticket: Ticket, offset: u64, len: u64 },
    /// See [`Engine::written`].
    Written { grant: GrantId, ok: bool },
    /// See [`Engine::completed`].
    Completed { io: IoId, ok: bool, data: Vec<u8> },
    /// See [`Engine::make_room`].
    MakeRoom { ticket: Ticket, bytes: u64 },
    /// See [`Engine::set_size`].
    SetSize { ticket: Ticket, bytes: u64 },
    /// See [`Engine::close`].
    Close,
    /// See [`Engine::reopen`].
    Reopen,
}

/// Something for a thread.
#[derive(Debug)]
pub(super) enum Post {
    /// Of an engine.
    Reply(Ticket, Reply),
    /// Of a thread that decompresses, for a job: a whole cluster, unless it is malformed.
    Unpacked(Ticket, Option<Vec<u8>>),
}

/// What wakes a thread that sleeps.
pub(super) struct Bell {
    event: Arc<OwnedFd>,
    asleep: AtomicBool,
    /// There are posts.
    posted: AtomicBool,
    /// It takes no work for others any more.
    retired: AtomicBool,
}

impl Bell {
    pub(super) fn new(event: Arc<OwnedFd>) -> Self {
        let no = || AtomicBool::new(false);
        Self { event, asleep: no(), posted: no(), retired: no() }
    }

    /// To be called after what the thread is to see was left for it.
    pub(super) fn ring(&self) {
        // The other side of this is in `sleeps`.
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) {
            // It does not block, and where it is full it is readable.
            let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        }
    }

    /// The thread is about to sleep. It looks once more for what was left for it after this.
    pub(super) fn sleeps(&self) {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Whether there may be posts.
    #[inline(always)]
    pub(super) fn has_posts(&self) -> bool {
        self.posted.load(Ordering::Relaxed)
    }

    /// To be called before posts are taken.
    pub(super) fn take_posts(&self) {
        self.posted.swap(false, Ordering::SeqCst);
    }

    pub(super) fn wakes(&self) {
        self.asleep.store(false, Ordering::Relaxed);
    }

    pub(super) fn retire(&self) {
        self.retired.store(true, Ordering::SeqCst);
    }
}

/// Where the posts for a thread go.
#[derive(Clone)]
pub(super) struct Seat {
    pub(super) posts: Sender<Post>,
    pub(super) bell: Arc<Bell>,
}

impl Seat {
    /// Posts something; false if the thread is gone.
    pub(super) fn post(&self, post: Post) -> bool {
        let sent = self.posts.send(post).is_ok();
        self.bell.posted.store(true, Ordering::SeqCst);
        self.bell.ring();
        sent
    }
}

/// The threads that work on an image.
#[derive(Default)]
pub(super) struct Seats {
    next: AtomicUsize,
    bells: Mutex<Vec<(SeatId, Arc<Bell>)>>,
    /// Nothing is to be had of its engines any more.
    broken: AtomicBool,
}

impl Seats {
    /// Whether no thread ever had a way to the image.
    pub(super) fn never_taken(&self) -> bool {
        self.next.load(Ordering::Relaxed) == 0
    }

    /// A number for a thread, which is rung from now on when there is work that nobody does.
    pub(super) fn take(&self, bell: &Arc<Bell>) -> SeatId {
        let seat = self.next.fetch_add(1, Ordering::Relaxed) as SeatId;
        self.bells.lock().unwrap_or_else(PoisonError::into_inner).push((seat, bell.clone()));
        seat
    }

    pub(super) fn leave(&self, seat: SeatId) {
        self.bells.lock().unwrap_or_else(PoisonError::into_inner).retain(|(other, _)| *other != seat);
    }

    /// Rings all but this thread that take work for others; false if there is none.
    pub(super) fn ring_others(&self, seat: SeatId) -> bool {
        let bells = self.bells.lock().unwrap_or_else(PoisonError::into_inner);
        let others =
            bells.iter().filter(|(other, bell)| *other != seat && !bell.retired.load(Ordering::SeqCst));
        others.map(|(_, bell)| bell.ring()).count() > 0
    }

    /// Whether nothing is to be had of the image's engines any more.
    #[inline(always)]
    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }

    /// Ends the use of the image's engines.
    pub(super) fn break_down(&self) {
        if !self.broken.swap(true, Ordering::SeqCst) {
            tracing::error!(
                "an image's tables are not changed any more: requests that would change them fail until the disk is opened anew"
            );
            let bells = self.bells.lock().unwrap_or_else(PoisonError::into_inner);
            bells.iter().for_each(|(_, bell)| bell.ring());
        }
    }
}

struct State {
    engine: Engine,
    inbox: Receiver<Message>,
    seats: HashMap<SeatId, Seat>,
}

/// An engine, as threads share it.
pub(super) struct Shared {
    state: Mutex<State>,
    sender: Sender<Message>,
    /// Messages in the inbox.
    waiting: AtomicUsize,
}

/// What a thread gets of an engine that it has let run.
#[derive(Default)]
pub(super) struct Yield {
    /// To be carried out.
    pub(super) commands: VecDeque<(u8, Command)>,
    /// For this thread.
    pub(super) posts: VecDeque<Post>,
}

impl Shared {
    pub(super) fn new(engine: Engine) -> Self {
        let (sender, inbox) = channel();
        let state = State { engine, inbox, seats: HashMap::new() };
        Self { state: Mutex::new(state), sender, waiting: AtomicUsize::new(0) }
    }

    /// Leaves a message, to be followed by [`Shared::combine`].
    pub(super) fn send(&self, message: Message) {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        // The other end is in `state`, which is here.
        let _ = self.sender.send(message);
    }

    /// Messages that nobody has read.
    #[inline(always)]
    pub(super) fn has_messages(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// Lets the engine of `layer` read its messages and run, unless another thread does that now.
    pub(super) fn combine(&self, layer: u8, seat: SeatId, seats: &Seats, out: &mut Yield) {
        for _ in 0..ROUNDS_MAX {
            // Whoever sent something before sees that the engine is locked, or what was sent is seen here.
            fence(Ordering::SeqCst);
            if self.waiting.load(Ordering::SeqCst) == 0 {
                return;
            }
            match self.state.try_lock() {
                Ok(mut state) => {
                    let read = state.read_messages();
                    self.waiting.fetch_sub(read, Ordering::SeqCst);
                    state.hand_out(layer, seat, out);
                }
                Err(TryLockError::WouldBlock) => return,
                Err(TryLockError::Poisoned(_)) => return seats.break_down(),
            }
        }
    }

    /// Commands under way and clusters that change.
    pub(super) fn is_idle(&self) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.engine.backlog() == qcow2::engine::Backlog::default()
    }
}

impl State {
    fn read_messages(&mut self) -> usize {
        let mut read = 0;
        while let Ok(message) = self.inbox.try_recv() {
            self.apply(message);
            read += 1;
        }
        read
    }

    fn apply(&mut self, message: Message) {
        let engine = &mut self.engine;
        match message {
            Message::Join(seat, posts) => {
                self.seats.insert(seat, posts);
            }
            Message::Leave { seat, ios, grants, posts } => {
                self.seats.remove(&seat);
                ios.into_iter().for_each(|io| engine.completed(io, false, &[]));
                grants.into_iter().for_each(|grant| engine.written(grant, false));
                for post in posts.iter().flat_map(Receiver::try_iter) {
                    if let Post::Reply(_, Reply::Write { grant, .. }) = post {
                        engine.written(grant, false);
                    }
                }
            }
            Message::Load { ticket, offset } => engine.load(ticket, offset),
            Message::Write { ticket, offset, len } => engine.write(ticket, offset, len),
            Message::WriteZeroes { ticket, offset, len, unmap } => {
                engine.write_zeroes(ticket, offset, len, unmap);
            }
            Message::Discard { ticket, offset, len } => engine.discard(ticket, offset, len),
            Message::Written { grant, ok } => engine.written(grant, ok),
            Message::Completed { io, ok, data } => engine.completed(io, ok, &data),
            Message::MakeRoom { ticket, bytes } => engine.make_room(ticket, bytes),
            Message::SetSize { ticket, bytes } => engine.set_size(ticket, bytes),
            Message::Close => engine.close(),
            Message::Reopen => engine.reopen(),
        }
    }

    /// Gives commands to the thread that runs this, and replies to those who asked.
    fn hand_out(&mut self, layer: u8, own: SeatId, out: &mut Yield) {
        loop {
            if let Some((ticket, reply)) = self.engine.next_reply() {
                if seat_of(ticket) == own {
                    out.posts.push_back(Post::Reply(ticket, reply));
                } else {
                    self.post(ticket, reply);
                }
            } else if let Some(command) = self.engine.next_command() {
                out.commands.push_back((layer, command));
            } else {
                return;
            }
        }
    }

    fn post(&mut self, ticket: Ticket, reply: Reply) {
        let seat = self.seats.get(&seat_of(ticket));
        let taken = seat.is_some_and(|seat| seat.post(Post::Reply(ticket, reply)));
        // Who asked is gone, and its data will not come.
        if !taken && let Reply::Write { grant, .. } = reply {
            self.engine.written(grant, false);
        }
    }
}

/// Who asked, and what: the upper half of a ticket is the thread's, the lower its own affair.
pub(super) const fn ticket(seat: SeatId, tag: u32) -> Ticket {
    (seat as u64) << 32 | tag as u64
}

const fn seat_of(ticket: Ticket) -> SeatId {
    (ticket >> 32) as SeatId
}

/// The part of a ticket that is the thread's own.
pub(super) const fn tag_of(ticket: Ticket) -> u32 {
    ticket as u32
}

//! Pieces of requests: what the map shows of each is done at once, the rest is asked of an engine.

use qcow2::engine::{GrantId, Reply};
use qcow2::entry::Mapping;
use virtio::ring::Chains;

use super::channel::{ImageChannel, TURN_BYTES_MAX};
use super::combine::Message;
use super::image::{Extent, Source};
use super::jobs::{Kind, Piece, Stream, Work};
use crate::backend::{OpKind, Status};
use crate::backends::file::transfer::{Carrier, Data, Transfer, fill_with_zeros};

impl<C: Carrier> ImageChannel<C> {
    /// Does for a piece what can be done now.
    #[inline(always)]
    pub(super) fn advance(&mut self, mut piece: Piece, chains: &Chains) {
        let mut ok = true;
        loop {
            if !self.jobs.has_room() || self.bytes >= TURN_BYTES_MAX {
                return self.postpone(piece);
            }
            let taken = match piece.kind {
                Kind::Read => self.read(piece, chains),
                Kind::Write | Kind::WriteZeros => self.write(piece, chains),
                Kind::Zero { .. } | Kind::Discard => self.zero(piece, chains),
                Kind::Flush { file } => self.flush(piece, file, chains),
            };
            let Some(taken) = taken else {
                ok = false;
                break;
            };
            if taken >= piece.len {
                break;
            }
            piece = piece.behind(taken);
        }
        self.piece_over(piece.request, ok);
    }

    /// Begins to move data of a piece.
    #[inline(always)]
    fn move_data(&mut self, piece: Piece, grant: Option<GrantId>, at: (u8, u64), chains: &Chains) {
        let job = self.jobs.begin(Work::Moving(piece, grant));
        self.add_piece(piece.request);
        self.start_moving(job, piece, at, chains);
    }

    #[inline(always)]
    fn start_moving(&mut self, job: usize, piece: Piece, (file, offset): (u8, u64), chains: &Chains) {
        let kind = match piece.kind {
            Kind::Read => OpKind::Read,
            Kind::Write => OpKind::Write,
            _ => OpKind::WriteZeroes { unmap: false },
        };
        let data = match kind {
            OpKind::WriteZeroes { .. } => Data::Own,
            _ => Data::Chain { slot: piece.request, from: piece.from },
        };
        let transfer = Transfer { file, kind, durable: false, offset, len: piece.len, data };
        self.start(job, transfer, Vec::new(), chains);
    }

    /// Asks an engine about a piece.
    #[cold]
    fn ask_about(&mut self, piece: Piece, layer: u8, message: impl FnOnce(u64) -> Message) {
        let job = self.jobs.begin(Work::Asked(piece));
        self.add_piece(piece.request);
        self.ask(job, layer, message);
    }

    /// Reads the first part of a piece; how much that is, or `None` if it cannot be read.
    #[inline(always)]
    fn read(&mut self, piece: Piece, chains: &Chains) -> Option<u64> {
        let Extent { source, len } = self.image.extent(piece.offset, piece.len);
        match source {
            Source::Data { file, offset } => self.move_data(piece.first(len), None, (file, offset), chains),
            Source::Zeros => {
                let len = len.min(TURN_BYTES_MAX);
                fill_with_zeros(chains, piece.request, piece.from, len);
                self.bytes += len;
                return Some(len);
            }
            Source::Compressed { layer, at, within } => {
                self.read_packed(piece.first(len), Stream { layer, at, within }, chains);
            }
            Source::Unknown { layer } => {
                let offset = piece.offset;
                self.ask_about(piece.first(len), layer, |ticket| Message::Load { ticket, offset });
            }
            Source::Nowhere => return None,
        }
        Some(len)
    }

    /// Writes the first part of a piece: where the map shows clusters that may be written, in place.
    #[inline(always)]
    fn write(&mut self, piece: Piece, chains: &Chains) -> Option<u64> {
        let cluster_bytes = self.image.layout().cluster_bytes();
        let within_cluster = |offset: u64, left: u64| left.min(cluster_bytes - offset % cluster_bytes);
        let (offset, len) = (piece.offset, within_cluster(piece.offset, piece.len));
        if let Some((mapping, alike)) = self.mapping(offset) {
            match mapping {
                Mapping::Data { offset: host, owned: true } if alike >= len => {
                    let mut total = len;
                    while total < piece.len {
                        let next = within_cluster(offset + total, piece.len - total);
                        match self.mapping(offset + total) {
                            Some((Mapping::Data { offset: then, owned: true }, alike))
                                if then == host + total && alike >= next =>
                            {
                                total += next;
                            }
                            _ => break,
                        }
                    }
                    let at = (self.image.data_file, host);
                    self.move_data(piece.first(total), None, at, chains);
                    return Some(total);
                }
                Mapping::Zero if piece.kind == Kind::WriteZeros => return Some(len.min(alike)),
                Mapping::Unallocated
                    if piece.kind == Kind::WriteZeros && self.image.backing_bytes().is_none() =>
                {
                    return Some(len.min(alike));
                }
                Mapping::Invalid => return None,
                _ => {}
            }
        }
        self.ask_about(piece.first(len), 0, |ticket| Message::Write { ticket, offset, len });
        Some(len)
    }

    /// What the image's own tables say of an offset, and for how many bytes of its cluster; `None` if they must be read.
    #[inline(always)]
    fn mapping(&self, offset: u64) -> Option<(Mapping, u64)> {
        let layout = self.image.layout();
        self.image.entry(offset).map(|entry| entry.map(layout, layout.in_cluster(offset)))
    }

    /// Zeroes or discards the first part of a piece: whole clusters by the tables, parts of them as data or not at all.
    fn zero(&mut self, piece: Piece, chains: &Chains) -> Option<u64> {
        let layout = self.image.layout();
        let cluster_bytes = layout.cluster_bytes();
        let slice_bytes = layout.slice_entries() << layout.cluster_bits;
        let offset = piece.offset;
        let span = piece.len.min(slice_bytes - offset % slice_bytes);
        // Behind the end of the disk there is nothing to be kept.
        let at_end = offset + span >= self.image.bytes();
        let whole = if at_end { span.next_multiple_of(cluster_bytes) } else { span - span % cluster_bytes };
        if !offset.is_multiple_of(cluster_bytes) || whole == 0 {
            let len = piece.len.min(cluster_bytes - offset % cluster_bytes);
            return match piece.kind {
                Kind::Discard => Some(len),
                _ => self.write(Piece { kind: Kind::WriteZeros, ..piece.first(len) }, chains),
            };
        }
        let len = whole.min(piece.len);
        let kind = piece.kind;
        self.ask_about(piece.first(len), 0, |ticket| match kind {
            Kind::Zero { unmap } => Message::WriteZeroes { ticket, offset, len: whole, unmap },
            _ => Message::Discard { ticket, offset, len: whole },
        });
        Some(len)
    }

    /// Makes durable what was written to a file, and to the one that data are in.
    fn flush(&mut self, piece: Piece, file: u8, chains: &Chains) -> Option<u64> {
        let data_file = self.image.data_file;
        let job = self.jobs.begin(Work::Moving(piece, None));
        self.add_piece(piece.request);
        self.sync(job, file, chains);
        if file != data_file {
            let next = Piece { kind: Kind::Flush { file: data_file }, ..piece };
            self.add_piece(piece.request);
            self.postpone(next);
        }
        Some(piece.len)
    }

    /// Makes durable what was written to a file.
    pub(super) fn sync(&mut self, job: usize, file: u8, chains: &Chains) {
        let transfer =
            Transfer { file, kind: OpKind::Flush, durable: false, offset: 0, len: 0, data: Data::Own };
        self.start(job, transfer, Vec::new(), chains);
    }

    /// The engine has answered about a piece.
    #[cold]
    pub(super) fn piece_answered(&mut self, job: usize, piece: Piece, reply: Reply, chains: &Chains) {
        match reply {
            Reply::Write { grant, offset } => {
                self.jobs.set(job, Work::Moving(piece, Some(grant)));
                self.start_moving(job, piece, (self.image.data_file, offset), chains);
            }
            Reply::Retry => {
                self.jobs.end(job);
                self.advance(piece, chains);
            }
            Reply::WriteZeros => {
                self.jobs.end(job);
                self.advance(Piece { kind: Kind::WriteZeros, ..piece }, chains);
            }
            Reply::Done | Reply::Failed => {
                self.jobs.end(job);
                self.piece_over(piece.request, reply == Reply::Done);
            }
        }
    }

    /// A job's transfer is over.
    #[inline(always)]
    pub(super) fn transfer_over(&mut self, job: usize, status: Status, own: Vec<u8>, chains: &Chains) {
        let ok = status == Status::Ok;
        match self.jobs.work(job) {
            Work::Moving(piece, None) => {
                self.jobs.end(job);
                self.piece_over(piece.request, ok);
            }
            Work::Moving(piece, Some(grant)) => {
                self.jobs.set(job, Work::Asked(piece));
                self.tell(0, Message::Written { grant, ok });
            }
            work => self.other_transfer_over(job, work, ok, own, chains),
        }
    }
}

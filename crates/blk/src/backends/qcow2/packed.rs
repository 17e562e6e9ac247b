//! Compressed clusters: read, left to a thread that makes them whole, and given to those who want a part of them.

use std::collections::VecDeque;

use qcow2::entry::Compressed;
use virtio::ring::Chains;

use super::channel::ImageChannel;
use super::combine::Post;
use super::commands::own;
use super::jobs::{Piece, Stream, Work};
use super::unpack::{self, Packed};
use crate::backend::OpKind;
use crate::backends::file::transfer::{Carrier, scatter_data};

/// The compressed clusters of a thread.
#[derive(Default)]
pub(super) struct Unpacking {
    /// Those that are being read for requests.
    count: usize,
    /// Pieces that wait until there are fewer.
    waiting: VecDeque<(Piece, Stream)>,
    /// The last one, of a layer: whoever reads on wants it again. An entry that names it again means the same bytes, since
    /// none are written in compressed form.
    last: Option<(u8, Compressed, Vec<u8>)>,
}

impl<C: Carrier> ImageChannel<C> {
    /// Reads a piece that is in a compressed cluster.
    #[cold]
    pub(super) fn read_packed(&mut self, piece: Piece, stream: Stream, chains: &Chains) {
        let Stream { layer, at, within } = stream;
        if let Some((of, from, cluster)) = &self.unpacking.last
            && (*of, *from) == (layer, at)
        {
            let bytes = &cluster[within as usize..][..piece.len as usize];
            return scatter_data(chains, piece.request, piece.from, bytes);
        }
        self.add_piece(piece.request);
        let cluster_bytes = self.image.cluster_bytes(layer);
        if self.unpacking.count >= unpack::count_max(cluster_bytes) {
            return self.unpacking.waiting.push_back((piece, stream));
        }
        self.unpacking.count += 1;
        let job = self.jobs.begin(Work::Fetching(piece, stream));
        self.fetch(job, stream, chains);
    }

    /// Begins to read a compressed cluster.
    pub(super) fn fetch(&mut self, job: usize, Stream { layer, at, .. }: Stream, chains: &Chains) {
        let file = self.image.tables(layer).map_or(0, |tables| tables.file);
        let transfer = own(file, OpKind::Read, at.offset, at.len);
        self.start(job, transfer, vec![0; at.len as usize], chains);
    }

    /// Leaves a cluster that was read to a thread that makes it whole.
    pub(super) fn unpack(&mut self, job: usize, Stream { layer, .. }: Stream, stream: Vec<u8>) {
        let Some(tables) = self.image.tables(layer) else { return };
        let packed = Packed {
            seat: self.own_seat(),
            ticket: self.jobs.ticket(self.seat, job),
            compression: tables.compression,
            stream,
            cluster_bytes: self.image.cluster_bytes(layer),
        };
        if let Err(Packed { seat, ticket, .. }) = self.image.unpackers.unpack(packed) {
            seat.post(Post::Unpacked(ticket, None));
        }
    }

    /// A cluster is whole, or malformed.
    pub(super) fn unpacked(&mut self, job: usize, cluster: Option<Vec<u8>>, chains: &Chains) {
        match (self.jobs.work(job), cluster) {
            (Work::Fetching(piece, stream), cluster) => self.packed_over(job, piece, stream, cluster, chains),
            (Work::CopyFetching(copy, Stream { within, .. }), Some(cluster)) => {
                let chunk = cluster[within as usize..][..copy.chunk as usize].to_vec();
                self.write_copy(job, copy, chunk, chains);
            }
            (Work::CopyFetching(copy, _), None) => self.copy_over(job, copy, false),
            _ => {}
        }
    }

    /// A piece has got its part of a cluster, or will not.
    pub(super) fn packed_over(
        &mut self,
        job: usize,
        piece: Piece,
        Stream { layer, at, within }: Stream,
        cluster: Option<Vec<u8>>,
        chains: &Chains,
    ) {
        self.jobs.end(job);
        self.unpacking.count -= 1;
        let ok = cluster.is_some();
        if let Some(cluster) = cluster {
            let bytes = &cluster[within as usize..][..piece.len as usize];
            scatter_data(chains, piece.request, piece.from, bytes);
            self.unpacking.last = Some((layer, at, cluster));
        }
        self.piece_over(piece.request, ok);
        // The next may be in the same cluster.
        while let Some((piece, stream)) = self.unpacking.waiting.pop_front() {
            let before = self.unpacking.count;
            self.read_packed(piece, stream, chains);
            // It was counted when it began to wait.
            self.piece_over(piece.request, true);
            if self.unpacking.count > before {
                break;
            }
        }
    }
}

//! Compressed clusters, made whole by threads beside the I/O threads: one takes as long as hundreds of requests.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};

use qcow2::header::Compression;
use qcow2::inflate::Inflater;

use super::combine::{Post, Seat};

/// Threads of an image, once it was found to have compressed clusters.
const THREADS: usize = 2;
/// What the clusters of one I/O thread that are being read may take, in bytes, but always one of them.
const BYTES_MAX: u64 = 16 << 20;

/// How many clusters of this size one I/O thread may have read at once.
pub(super) fn count_max(cluster_bytes: u64) -> usize {
    (BYTES_MAX / cluster_bytes).max(1) as usize
}

/// A cluster to be made whole.
pub(super) struct Packed {
    /// Who wants it, and the ticket of the job that does.
    pub(super) seat: Seat,
    pub(super) ticket: u64,
    pub(super) compression: Compression,
    pub(super) stream: Vec<u8>,
    pub(super) cluster_bytes: u64,
}

/// The threads of an image.
#[derive(Default)]
pub(super) struct Unpackers {
    threads: Mutex<Vec<Sender<Packed>>>,
}

impl Unpackers {
    /// Leaves a cluster to a thread, which posts it when it is whole. Gives it back if there is no thread.
    pub(super) fn unpack(&self, packed: Packed) -> Result<(), Packed> {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        if threads.len() < THREADS
            && let Some(thread) = start(threads.len())
        {
            threads.push(thread);
        }
        match threads.len() {
            0 => Err(packed),
            count => threads[packed.ticket as usize % count].send(packed).map_err(|refused| refused.0),
        }
    }
}

fn start(number: usize) -> Option<Sender<Packed>> {
    let (sender, work) = channel();
    let thread = std::thread::Builder::new().name(format!("unpack-{number}"));
    let started = thread.spawn(move || {
        reactor::run_as_helper();
        serve(&work);
    });
    if let Err(error) = &started {
        tracing::warn!(%error, "no thread for compressed clusters");
    }
    started.is_ok().then_some(sender)
}

fn serve(work: &Receiver<Packed>) {
    let mut known: Option<(Compression, Inflater)> = None;
    for Packed { seat, ticket, compression, stream, cluster_bytes } in work {
        let mut inflater = match known.take() {
            Some((of, inflater)) if of == compression => inflater,
            _ => Inflater::new(compression),
        };
        let mut cluster = vec![0; cluster_bytes as usize];
        // Streams are anybody's: whoever waits for one that trips the decoder is to be told.
        let whole = catch_unwind(AssertUnwindSafe(|| inflater.inflate(&stream, &mut cluster).is_ok()));
        if whole.is_ok() {
            known = Some((compression, inflater));
        }
        seat.post(Post::Unpacked(ticket, whole.unwrap_or(false).then_some(cluster)));
    }
}

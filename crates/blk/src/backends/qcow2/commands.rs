//! An engine's commands, carried out by the thread that has let it run.

use qcow2::engine::Command;
use virtio::ring::Chains;

use super::channel::ImageChannel;
use super::combine::Message;
use super::image::{Extent, Source};
use super::jobs::{Copying, Stream, Work};
use crate::backend::OpKind;
use crate::backends::file::transfer::{Carrier, Data, Transfer};

/// The most bytes that are copied at once.
const COPY_BYTES_MAX: u64 = 256 << 10;

impl<C: Carrier> ImageChannel<C> {
    /// Begins to carry out a command, for which there is room among the jobs.
    pub(super) fn carry_out(&mut self, layer: u8, command: Command, chains: &Chains) {
        let Some(tables) = self.image.tables(layer) else { return };
        let (file, data) = (tables.file, tables.data);
        let then = (data != file).then_some(data);
        let io = |io, then| Work::Io { layer, io, then };
        match command {
            Command::Read { io: id, offset, len } => {
                let job = self.jobs.begin(io(id, None));
                self.start(job, own(file, OpKind::Read, offset, len as u64), vec![0; len], chains);
            }
            Command::Write { io: id, offset, data } => {
                let job = self.jobs.begin(io(id, None));
                self.start(job, own(file, OpKind::Write, offset, data.len() as u64), data, chains);
            }
            Command::Sync { io: id } => {
                let job = self.jobs.begin(io(id, then));
                self.sync(job, file, chains);
            }
            Command::Punch { io: id, offset, len } => {
                let job = self.jobs.begin(io(id, None));
                let kind = OpKind::WriteZeroes { unmap: true };
                self.start(job, own(file, kind, offset, len), Vec::new(), chains);
            }
            Command::Extend { io, bytes } => {
                let ok = self.image.files[usize::from(file)].extend(bytes);
                self.tell(layer, Message::Completed { io, ok, data: Vec::new() });
            }
            Command::Copy { io, guest_offset, len, to, zero } => {
                let copy = Copying { io, from: guest_offset, left: len, to, zero, chunk: 0 };
                let job = self.jobs.begin(Work::CopyAsked(copy));
                self.copy_on(job, copy, chains);
            }
        }
    }

    /// Goes on with a copy: the next chunk of it.
    pub(super) fn copy_on(&mut self, job: usize, mut copy: Copying, chains: &Chains) {
        if copy.left == 0 {
            return self.copy_over(job, copy, true);
        }
        let disk_bytes = self.image.bytes();
        let Extent { source, len } = match copy {
            Copying { zero: true, left, .. } => Extent { source: Source::Zeros, len: left },
            // The guest reads nothing there, and what the backing file has is not to show when the disk grows.
            Copying { from, left, .. } if from >= disk_bytes => Extent { source: Source::Zeros, len: left },
            Copying { from, left, .. } => {
                self.image.extent(from, left.min(COPY_BYTES_MAX).min(disk_bytes - from))
            }
        };
        copy.chunk = len;
        match source {
            Source::Zeros => {
                self.jobs.set(job, Work::CopyWriting(copy));
                let kind = OpKind::WriteZeroes { unmap: false };
                self.start(job, own(self.image.data_file, kind, copy.to, len), Vec::new(), chains);
            }
            Source::Data { file, offset } => {
                self.jobs.set(job, Work::CopyReading(copy));
                self.start(job, own(file, OpKind::Read, offset, len), vec![0; len as usize], chains);
            }
            Source::Compressed { layer, at, within } => {
                let stream = Stream { layer, at, within };
                self.jobs.set(job, Work::CopyFetching(copy, stream));
                self.fetch(job, stream, chains);
            }
            Source::Unknown { layer } => {
                self.jobs.set(job, Work::CopyAsked(copy));
                self.ask(job, layer, |ticket| Message::Load { ticket, offset: copy.from });
            }
            Source::Nowhere => self.copy_over(job, copy, false),
        }
    }

    /// A copy is done, well or not.
    pub(super) fn copy_over(&mut self, job: usize, copy: Copying, ok: bool) {
        self.jobs.end(job);
        self.tell(0, Message::Completed { io: copy.io, ok, data: Vec::new() });
    }

    pub(super) fn write_copy(&mut self, job: usize, copy: Copying, data: Vec<u8>, chains: &Chains) {
        self.jobs.set(job, Work::CopyWriting(copy));
        let transfer = own(self.image.data_file, OpKind::Write, copy.to, copy.chunk);
        self.start(job, transfer, data, chains);
    }

    /// A transfer is over that is not simply data of a request.
    #[cold]
    pub(super) fn other_transfer_over(
        &mut self,
        job: usize,
        work: Work,
        ok: bool,
        own: Vec<u8>,
        chains: &Chains,
    ) {
        match work {
            Work::Io { layer, io, then: Some(file) } if ok => {
                self.jobs.set(job, Work::Io { layer, io, then: None });
                self.sync(job, file, chains);
            }
            Work::Io { layer, io, .. } => {
                self.jobs.end(job);
                self.tell(layer, Message::Completed { io, ok, data: own });
            }
            Work::CopyReading(copy) if ok => self.write_copy(job, copy, own, chains),
            Work::CopyFetching(copy, _) if !ok => self.copy_over(job, copy, false),
            Work::CopyFetching(_, stream) => self.unpack(job, stream, own),
            Work::CopyWriting(copy) if ok => self.copy_on(job, copy.behind_chunk(), chains),
            Work::CopyReading(copy) | Work::CopyWriting(copy) => self.copy_over(job, copy, false),
            Work::Fetching(piece, stream) if !ok => self.packed_over(job, piece, stream, None, chains),
            Work::Fetching(_, stream) => self.unpack(job, stream, own),
            _ => {}
        }
    }
}

/// A transfer of a buffer that comes with it, or of none.
pub(super) fn own(file: u8, kind: OpKind, offset: u64, len: u64) -> Transfer {
    Transfer { file, kind, durable: false, offset, len, data: Data::Own }
}

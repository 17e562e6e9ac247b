//! A file that remembers what is durable, what was written since, and what is still on its way.

use std::io;
use std::rc::Rc;

use qcow2::image::ReadAt;
use qcow2::repair::WriteAt;

use crate::random::Random;
use crate::reader::{GARBAGE, Value, value_of};

pub(crate) const SECTOR: u64 = 512;

/// A sector as it was written, with what it means as the guest's. Crashes share it: what one costs does not go with the
/// bytes of the file.
type Sector = Rc<Written>;

#[derive(PartialEq, Eq)]
struct Written {
    value: Value,
    bytes: [u8; SECTOR as usize],
}

fn sectors_of(data: &[u8]) -> impl Iterator<Item = Option<Sector>> {
    assert!((data.len() as u64).is_multiple_of(SECTOR));
    data.chunks_exact(SECTOR as usize)
        .map(|sector| Some(Rc::new(Written { value: value_of(sector), bytes: sector.try_into().unwrap() })))
}

/// Sectors that are copied at once when one of them changes.
const CHUNK: usize = 32;
type Chunk = [Option<Sector>; CHUNK];

/// The contents of a file, sector by sector. A copy shares all that is not changed.
#[derive(Clone, Default)]
pub(crate) struct Contents {
    chunks: Vec<Rc<Chunk>>,
    /// In sectors.
    len: usize,
    /// Every byte that was never written: 0 for a file, anything for a block device.
    fresh: u8,
}

impl Contents {
    pub(crate) fn new(fresh: u8) -> Self {
        Self { fresh, ..Self::default() }
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        assert!(offset.is_multiple_of(SECTOR));
        for (index, sector) in sectors_of(data).enumerate() {
            self.set((offset / SECTOR) as usize + index, sector);
        }
    }

    fn set(&mut self, at: usize, sector: Option<Sector>) {
        if self.len <= at {
            self.len = at + 1;
            self.chunks.resize_with(self.len.div_ceil(CHUNK), Rc::default);
        }
        Rc::make_mut(&mut self.chunks[at / CHUNK])[at % CHUNK] = sector;
    }

    fn get(&self, at: usize) -> Option<&Sector> {
        self.chunks.get(at / CHUNK)?[at % CHUNK].as_ref()
    }

    /// The guest's value that the sector at `offset` holds.
    pub(crate) fn value(&self, offset: u64) -> Value {
        assert!(offset.is_multiple_of(SECTOR));
        let fresh = if self.fresh == 0 { 0 } else { GARBAGE };
        self.get((offset / SECTOR) as usize).map_or(fresh, |sector| sector.value)
    }
}

impl ReadAt for Contents {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut at = offset;
        let mut buffer = buffer;
        while !buffer.is_empty() {
            let within = (at % SECTOR) as usize;
            let len = buffer.len().min(SECTOR as usize - within);
            let (now, later) = buffer.split_at_mut(len);
            match self.get((at / SECTOR) as usize) {
                Some(sector) => now.copy_from_slice(&sector.bytes[within..within + len]),
                None => now.fill(self.fresh),
            }
            at += len as u64;
            buffer = later;
        }
        Ok(())
    }

    fn file_bytes(&self) -> io::Result<u64> {
        Ok(self.len as u64 * SECTOR)
    }
}

impl WriteAt for Contents {
    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        // Whole sectors of what was there, with `data` over them.
        let first = offset / SECTOR * SECTOR;
        let end = (offset + data.len() as u64).next_multiple_of(SECTOR);
        let mut sectors = vec![0; (end - first) as usize];
        self.read_at(first, &mut sectors)?;
        sectors[(offset - first) as usize..][..data.len()].copy_from_slice(data);
        self.write(first, &sectors);
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A file that takes some more writes, and then none.
pub(crate) struct Dying {
    pub(crate) contents: Contents,
    pub(crate) writes_left: u64,
}

impl ReadAt for Dying {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.contents.read_at(offset, buffer)
    }

    fn file_bytes(&self) -> io::Result<u64> {
        self.contents.file_bytes()
    }
}

impl WriteAt for Dying {
    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.writes_left = self.writes_left.checked_sub(1).ok_or(io::ErrorKind::Other)?;
        self.contents.write_at(offset, data)
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A write that is not durable yet.
struct Write {
    id: u64,
    first: usize,
    /// `None` is what was never written.
    sectors: Vec<Option<Sector>>,
    done: bool,
    /// The guest's, which may write to a place while it is being written.
    data: bool,
}

/// A file.
#[derive(Default)]
pub(crate) struct Store {
    durable: Contents,
    /// Those that are done in the order in which they were.
    writes: Vec<Write>,
    /// What readers see: everything that is done.
    pub(crate) now: Contents,
    /// A barrier under way: the writes that it covers.
    barriers: Vec<(u64, Vec<u64>)>,
}

impl Store {
    pub(crate) fn new(contents: Contents) -> Self {
        Self { durable: contents.clone(), now: contents, ..Self::default() }
    }

    pub(crate) fn begin_write(&mut self, id: u64, offset: u64, data: &[u8]) {
        assert!(offset.is_multiple_of(SECTOR));
        self.begin(id, offset, sectors_of(data).collect(), false);
    }

    pub(crate) fn begin_data(&mut self, id: u64, offset: u64, data: &[u8]) {
        self.begin(id, offset, sectors_of(data).collect(), true);
    }

    pub(crate) fn begin_punch(&mut self, id: u64, offset: u64, len: u64) {
        self.begin(id, offset, sectors_of(&vec![0; len as usize]).collect(), false);
    }

    /// Makes the file longer.
    pub(crate) fn begin_extend(&mut self, id: u64, bytes: u64) {
        let now = self.now.len as u64;
        self.begin(id, now * SECTOR, vec![None; (bytes / SECTOR).saturating_sub(now) as usize], false);
    }

    fn begin(&mut self, id: u64, offset: u64, sectors: Vec<Option<Sector>>, data: bool) {
        let first = (offset / SECTOR) as usize;
        // Two writes to the same place at once would end in any order: the engine never asks for that.
        for other in self.writes.iter().filter(|other| !(other.done || data && other.data)) {
            let apart = other.first + other.sectors.len() <= first || first + sectors.len() <= other.first;
            assert!(
                apart,
                "write {id} of {} sectors from {first} on overlaps {} of {} from {} on",
                sectors.len(),
                other.id,
                other.sectors.len(),
                other.first
            );
        }
        self.writes.push(Write { id, first, sectors, done: false, data });
    }

    pub(crate) fn end_write(&mut self, id: u64) {
        let at = self.writes.iter().position(|write| write.id == id).unwrap();
        // What is done later lies over what was done before.
        let mut write = self.writes.remove(at);
        write.done = true;
        for (index, sector) in write.sectors.iter().enumerate() {
            self.now.set(write.first + index, sector.clone());
        }
        self.writes.push(write);
    }

    /// A write ends with an error: sectors of it may be there or not, now.
    pub(crate) fn fail_write(&mut self, id: u64, random: &mut Random) {
        let at = self.writes.iter().position(|write| write.id == id).unwrap();
        let (first, len) = (self.writes[at].first, self.writes[at].sectors.len());
        for index in 0..len {
            if random.one_in(2) {
                self.writes[at].sectors[index] = self.now.get(first + index).cloned();
            }
        }
        self.end_write(id);
    }

    pub(crate) fn begin_barrier(&mut self, id: u64) {
        let covered = self.writes.iter().filter(|write| write.done).map(|write| write.id).collect();
        self.barriers.push((id, covered));
    }

    pub(crate) fn end_barrier(&mut self, id: u64) {
        let at = self.barriers.iter().position(|(other, _)| *other == id).unwrap();
        let (_, covered) = self.barriers.swap_remove(at);
        // In the order in which they were done for any one place: overlapping ones were never at once.
        for write in self.writes.extract_if(.., |write| covered.contains(&write.id)) {
            for (index, sector) in write.sectors.into_iter().enumerate() {
                self.durable.set(write.first + index, sector);
            }
        }
    }

    /// The file after the process died: all that was done, and any sectors of what was on its way.
    pub(crate) fn after_kill(&self, random: &mut Random) -> Contents {
        let mut contents = self.now.clone();
        let all = random.below(3);
        for write in self.writes.iter().filter(|write| !write.done) {
            for (index, sector) in write.sectors.iter().enumerate() {
                if all == 0 || all == 1 && random.one_in(2) {
                    contents.set(write.first + index, sector.clone());
                }
            }
        }
        contents
    }

    /// The process died and left `contents`; all that it had given is over, durable or not.
    pub(crate) fn killed(&mut self, contents: Contents) {
        self.barriers.clear();
        // What was on its way came last, over what was done.
        self.writes.sort_by_key(|write| !write.done);
        for write in &mut self.writes {
            if !write.done {
                // What did not get there never will.
                let kept = |(index, sector): (usize, &Option<Sector>)| {
                    let there = contents.get(write.first + index).cloned();
                    let same = match (&there, sector) {
                        (Some(a), Some(b)) => a == b,
                        (None, None) => true,
                        _ => false,
                    };
                    if same { sector.clone() } else { there }
                };
                write.sectors = write.sectors.iter().enumerate().map(kept).collect();
                write.done = true;
            }
        }
        self.now = contents;
    }

    /// The file after the host lost power: what is durable, and any sectors of all else, in whatever version.
    pub(crate) fn after_power_cut(&self, random: &mut Random) -> Contents {
        let mut contents = self.durable.clone();
        let mode = random.below(4);
        for write in &self.writes {
            let whole = random.one_in(2);
            for (index, sector) in write.sectors.iter().enumerate() {
                let there = match mode {
                    0 => false,
                    1 => whole,
                    _ => random.one_in(2),
                };
                if there {
                    contents.set(write.first + index, sector.clone());
                }
            }
        }
        contents
    }
}

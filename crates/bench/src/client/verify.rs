//! Checks that a server stores what it is given: writes a seeded pattern, reads it back, compares.
//!
//! A pass of its own, before the load: comparing during the load would measure the client.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use virtio::Segment;

use super::guest::Guest;
use super::lane::Lane;
use reactor::Clock;

/// A server that completes nothing for so long has failed.
const STALL: Duration = Duration::from_secs(10);
const BURST: usize = 64;

/// The content that a block gets: a function of seed and position, so that a block in the wrong place is noticed.
fn pattern(seed: u64, block: u64, to: &mut [u8]) {
    let mut word = seed ^ block.wrapping_mul(0xd134_2543_de82_ef95);
    for bytes in to.chunks_exact_mut(8) {
        word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (word ^ (word >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bytes.copy_from_slice(&(mixed ^ (mixed >> 29)).to_le_bytes());
    }
}

/// One pass over blocks of the disk, spread over all queues.
struct Pass<'a> {
    guest: &'a Guest,
    lanes: &'a mut [Lane],
    write: bool,
    seed: u64,
    /// Scratch for one block.
    expected: Vec<u8>,
    found: Vec<u8>,
}

/// Writes the first `bytes` of the disk in a scattered order, reads them back in another, and compares every byte.
pub(crate) fn verify(guest: &Guest, lanes: &mut [Lane], bytes: u64, seed: u64) -> Result<()> {
    let block = block_bytes(lanes);
    // A power of two, so that an odd stride visits every block once.
    let count = 1_u64 << (bytes / block).max(1).ilog2();
    for (write, stride) in [(true, 0x9e37_79b1), (false, 0x85eb_ca6b)] {
        let mut pass = Pass {
            guest,
            lanes,
            write,
            seed,
            expected: vec![0; block as usize],
            found: vec![0; block as usize],
        };
        pass.run(count, |index| index.wrapping_mul(stride) % count)?;
    }
    Ok(())
}

/// Writes all of the disk, so that the load finds memory where nothing was written yet.
pub(crate) fn fill(guest: &Guest, lanes: &mut [Lane], bytes: u64) -> Result<()> {
    let block = block_bytes(lanes);
    let mut pass =
        Pass { guest, lanes, write: true, seed: 1, expected: vec![0; block as usize], found: Vec::new() };
    pass.run(bytes / block, |index| index)
}

fn block_bytes(lanes: &[Lane]) -> u64 {
    lanes.first().map_or(4096, |lane| lane.shape().block_bytes.into())
}

impl Pass<'_> {
    fn run(&mut self, count: u64, block_at: impl Fn(u64) -> u64) -> Result<()> {
        let mut next = 0;
        let mut done = 0;
        let mut blocks: Vec<Vec<u64>> =
            self.lanes.iter().map(|lane| vec![0; usize::from(lane.shape().depth)]).collect();
        for (queue, in_flight) in blocks.iter_mut().enumerate() {
            for slot in 0..in_flight.len() as u16 {
                if next < count {
                    in_flight[usize::from(slot)] = block_at(next);
                    self.submit(queue, slot, block_at(next))?;
                    next += 1;
                }
            }
            self.lanes[queue].publish()?;
        }
        let mut slots = [0; BURST];
        let mut deadline = Instant::now() + STALL;
        while done < count {
            let before = done;
            for (queue, in_flight) in blocks.iter_mut().enumerate() {
                let reaped = self.lanes[queue].reap(&mut slots)?;
                for &slot in &slots[..reaped] {
                    done += 1;
                    self.check(queue, slot, in_flight[usize::from(slot)])?;
                    if next < count {
                        in_flight[usize::from(slot)] = block_at(next);
                        self.submit(queue, slot, block_at(next))?;
                        next += 1;
                    }
                }
                if reaped > 0 {
                    self.lanes[queue].publish()?;
                    self.lanes[queue].renew_disarm(reaped as u32);
                }
            }
            if done > before {
                deadline = Instant::now() + STALL;
            }
            ensure!(Instant::now() < deadline, "the server has completed nothing for {} s", STALL.as_secs());
        }
        Ok(())
    }

    fn data(&self, queue: usize, slot: u16) -> Result<Segment> {
        let lane = &self.lanes[queue];
        self.guest.segment(lane.data(slot), lane.shape().block_bytes)
    }

    fn submit(&mut self, queue: usize, slot: u16, block: u64) -> Result<()> {
        let data = self.data(queue, slot)?;
        if self.write {
            pattern(self.seed, block, &mut self.expected);
        } else {
            // What a server that moves no data would leave in place.
            self.expected.fill(0xa5);
        }
        data.write(0, &self.expected);
        self.lanes[queue].clear_status(slot);
        self.lanes[queue].submit(slot, self.write, block, Clock::get().now().0)
    }

    fn check(&mut self, queue: usize, slot: u16, block: u64) -> Result<()> {
        if self.write {
            return Ok(());
        }
        self.data(queue, slot)?.read(0, &mut self.found);
        pattern(self.seed, block, &mut self.expected);
        let wrong = self.expected.iter().zip(&self.found).position(|(a, b)| a != b);
        let Some(at) = wrong else { return Ok(()) };
        let (want, have) = (self.expected[at], self.found[at]);
        Err(anyhow::anyhow!("byte {at} is {have:#04x} and was written as {want:#04x}"))
            .with_context(|| format!("block {block} came back different"))
    }
}

#[cfg(test)]
mod tests {
    use super::pattern;

    #[test]
    fn patterns_differ_by_seed_and_block() {
        let content = |seed, block| {
            let mut bytes = [0; 64];
            pattern(seed, block, &mut bytes);
            bytes
        };
        assert_eq!(content(1, 2), content(1, 2));
        assert_ne!(content(1, 2), content(1, 3));
        assert_ne!(content(1, 2), content(2, 2));
    }
}

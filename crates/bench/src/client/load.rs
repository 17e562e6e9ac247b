//! Keeps requests in flight and measures: the loop that decides how much can be seen at all.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use reactor::Clock;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::lane::Lane;
use crate::case::{Case, Client};
use crate::histogram::Histogram;
use crate::windows::Windows;

/// A server that completes nothing for so long has failed.
const STALL_NS_MAX: u64 = 5_000_000_000;
/// How long the sleeping client sleeps at most, to notice that it is to stop.
const SLEEP_MS_MAX: i32 = 100;
/// Empty looks at the rings between two looks at the clock.
const LOOKS_PER_CLOCK: u32 = 1024;
/// The most completions answered before the answers are published. Larger bursts make client and server take turns
/// instead of working at the same time: 64 costs a third of the rate at 32 in flight.
pub(crate) const BURST: u16 = 8;
/// The most that any load may answer at once.
const BURST_MAX: usize = 256;

/// Which block comes next.
#[derive(Clone, Debug)]
pub(crate) enum Blocks {
    /// Uniform, by xorshift64* and a multiplication.
    Random { state: u64, count: u64 },
    /// One after the other from `first`, over and over.
    Sequential { first: u64, count: u64, next: u64 },
}

impl Blocks {
    #[inline(always)]
    pub(crate) fn next(&mut self) -> u64 {
        match self {
            Self::Random { state, count } => {
                *state ^= *state >> 12;
                *state ^= *state << 25;
                *state ^= *state >> 27;
                let random = state.wrapping_mul(0x2545_f491_4f6c_dd1d);
                ((u128::from(random) * u128::from(*count)) >> 64) as u64
            }
            Self::Sequential { first, count, next } => {
                let block = *first + *next;
                *next = if *next + 1 == *count { 0 } else { *next + 1 };
                block
            }
        }
    }

    /// The blocks of queue `queue` of `case` on a disk of `disk_bytes`. Random ones differ between queues and are the
    /// same for every server; sequential ones divide the disk among the queues.
    pub(crate) fn of(case: &Case, queue: usize, disk_bytes: u64) -> Self {
        let count = disk_bytes / u64::from(case.block_bytes);
        if case.op.random() {
            return Self::Random { state: 0x5eed_0001 + queue as u64, count };
        }
        let count = (count / u64::from(case.queues)).max(1);
        Self::Sequential { first: queue as u64 * count, count, next: 0 }
    }
}

/// The queues of a client under load.
pub(crate) struct Load<'a> {
    clock: Clock,
    lanes: &'a mut [Lane],
    blocks: Vec<Blocks>,
    write: bool,
    pause: Duration,
    burst: u16,
    call: &'a EventFd,
    epoll: Option<Epoll>,
    stop: &'a AtomicBool,
    last_ns: u64,
    pub(crate) windows: Windows,
    pub(crate) latency: Histogram,
}

impl<'a> Load<'a> {
    /// Prepares a load of at most `duration_ms` that answers up to `burst` completions at once. Nothing is submitted yet.
    pub(crate) fn new(
        case: &Case,
        lanes: &'a mut [Lane],
        disk_bytes: u64,
        call: &'a EventFd,
        stop: &'a AtomicBool,
        burst: u16,
        duration_ms: u64,
    ) -> Result<Self> {
        use std::os::fd::AsRawFd;
        let epoll = match case.client {
            Client::Polled => None,
            Client::Event => {
                // Edge-triggered: each call wakes, and nobody has to read the counter, which thus counts them all.
                let epoll = Epoll::new().context("cannot make an epoll")?;
                let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
                epoll.ctl(ControlOperation::Add, call.as_raw_fd(), event).context("cannot watch the call")?;
                Some(epoll)
            }
        };
        let clock = Clock::get();
        Ok(Self {
            clock,
            blocks: (0..lanes.len()).map(|queue| Blocks::of(case, queue, disk_bytes)).collect(),
            lanes,
            write: case.op.writes(),
            pause: Duration::from_millis(case.pause_ms.into()),
            burst,
            call,
            epoll,
            stop,
            last_ns: clock.now().0,
            windows: Windows::new(duration_ms),
            latency: Histogram::new(),
        })
    }

    /// Requests completed since counting began.
    pub(crate) fn requests(&self) -> u64 {
        self.latency.total()
    }

    pub(crate) fn now_ns(&self) -> u64 {
        self.clock.now().0
    }

    /// Submits the first requests.
    pub(crate) fn begin(&mut self) -> Result<()> {
        let now = self.now_ns();
        self.windows.restart(now);
        for (lane, blocks) in self.lanes.iter_mut().zip(&mut self.blocks) {
            for slot in 0..lane.shape().depth {
                lane.submit(slot, self.write, blocks.next(), now)?;
            }
            lane.publish()?;
        }
        Ok(())
    }

    /// Forgets what was counted so far; counting begins now.
    pub(crate) fn restart(&mut self) -> u64 {
        let now = self.now_ns();
        self.latency.clear();
        self.windows.restart(now);
        now
    }

    /// Kicks sent and calls received since the queues were made.
    pub(crate) fn notifications(&mut self, calls: &mut u64) -> (u64, u64) {
        // Nonblocking: an error is a counter of 0.
        *calls += self.call.read().unwrap_or(0);
        (self.lanes.iter().map(Lane::kicks).sum(), *calls)
    }

    /// Answers each completion with a new request until `until_ns`; returns the time of the last look.
    pub(crate) fn run(&mut self, until_ns: u64) -> Result<u64> {
        let mut slots = [0_u16; BURST_MAX];
        let slots = &mut slots[..usize::from(self.burst).clamp(1, BURST_MAX)];
        let mut idle = 0_u32;
        loop {
            let mut any = false;
            for (lane, blocks) in self.lanes.iter_mut().zip(&mut self.blocks) {
                let count = lane.reap(slots)?;
                if count == 0 {
                    continue;
                }
                any = true;
                let done = &slots[..count];
                self.last_ns = self.clock.now().0;
                for &slot in done {
                    self.latency.record(self.last_ns.saturating_sub(lane.submitted_ns(slot)));
                }
                self.windows.add(self.last_ns, count as u32);
                if !self.pause.is_zero() {
                    std::thread::sleep(self.pause);
                }
                let now = self.clock.now().0;
                for &slot in done {
                    lane.submit(slot, self.write, blocks.next(), now)?;
                }
                lane.publish()?;
                lane.renew_disarm(count as u32);
            }
            if any {
                idle = 0;
                if self.last_ns >= until_ns || self.stop.load(Ordering::Relaxed) {
                    return Ok(self.last_ns);
                }
                continue;
            }
            idle += 1;
            if (self.epoll.is_some() || idle.is_multiple_of(LOOKS_PER_CLOCK)) && self.is_over(until_ns)? {
                return Ok(self.now_ns());
            }
            self.sleep()?;
        }
    }

    /// Waits for the requests in flight and submits no more.
    pub(crate) fn finish(&mut self) -> Result<()> {
        let mut slots = [0_u16; BURST_MAX];
        let slots = &mut slots[..usize::from(self.burst).clamp(1, BURST_MAX)];
        let mut left: usize = self.lanes.iter().map(|lane| usize::from(lane.shape().depth)).sum();
        while left > 0 {
            let mut any = false;
            for lane in self.lanes.iter_mut() {
                let count = lane.reap(slots)?;
                left -= count;
                any |= count > 0;
            }
            if any {
                self.last_ns = self.now_ns();
            } else {
                self.is_over(u64::MAX)?;
                self.sleep()?;
            }
        }
        Ok(())
    }

    /// Sleeps until a call, if this client sleeps.
    fn sleep(&mut self) -> Result<()> {
        let Some(epoll) = &self.epoll else { return Ok(()) };
        let mut waiting = false;
        for lane in self.lanes.iter_mut() {
            waiting |= lane.arm();
        }
        if !waiting {
            let slept = epoll.wait(SLEEP_MS_MAX, &mut [EpollEvent::default()]);
            match slept {
                Err(error) if error.kind() != std::io::ErrorKind::Interrupted => {
                    return Err(error).context("cannot wait for a call");
                }
                _ => {}
            }
        }
        self.lanes.iter_mut().for_each(Lane::disarm);
        Ok(())
    }

    #[cold]
    fn is_over(&self, until_ns: u64) -> Result<bool> {
        let now = self.now_ns();
        if now.saturating_sub(self.last_ns) > STALL_NS_MAX {
            bail!("the server has completed nothing for {} s", STALL_NS_MAX / 1_000_000_000);
        }
        Ok(now >= until_ns || (until_ns != u64::MAX && self.stop.load(Ordering::Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_blocks_stay_on_the_disk_and_reach_all_of_it() {
        let mut blocks = Blocks::Random { state: 1, count: 16 };
        let mut seen = [0; 16];
        (0..1600).for_each(|_| seen[blocks.next() as usize] += 1);
        assert!(seen.iter().all(|&n| (50..150).contains(&n)), "{seen:?}");
    }

    #[test]
    fn sequential_blocks_start_over() {
        let mut blocks = Blocks::Sequential { first: 10, count: 3, next: 0 };
        assert_eq!([0; 5].map(|_| blocks.next()), [10, 11, 12, 10, 11]);
    }
}

//! The ceiling of the method: a thread that answers rings and has no device.
//!
//! It takes chains, writes the status byte and gives them back, through the same device end of the ring as every
//! device of this project. What the load generator reaches against it, no server can exceed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use virtio::Memory;
use virtio::ring::{Chains, DeviceRing, RingConfig, Used};
use vmm_sys_util::eventfd::EventFd;

use super::usage::Usage;
use crate::cpus;

/// The most chains taken before they are given back, small enough to let the client go on meanwhile.
const BURST: usize = 16;

/// The thread. Ends when dropped.
pub(crate) struct Bare {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
    usage: Usage,
}

impl Bare {
    /// Serves `rings` on `cpu`.
    pub(crate) fn start(
        rings: &[RingConfig],
        memory: &Arc<Memory>,
        call: &EventFd,
        cpu: Option<u32>,
    ) -> Result<Self> {
        let mut queues = Vec::new();
        for config in rings {
            let ring = DeviceRing::new(config, memory, None).context("the bare server's ring")?;
            let call = call.try_clone().context("cannot duplicate the call eventfd")?;
            queues.push(BareQueue {
                ring,
                chains: Chains::new(config, memory.clone()),
                call,
                burst: Vec::new(),
            });
        }
        let stop = Arc::new(AtomicBool::new(false));
        let (seen, (tell, told)) = (stop.clone(), std::sync::mpsc::channel());
        let thread = std::thread::Builder::new().name("bare".into()).spawn(move || {
            cpus::pin(cpu)?;
            let _ = tell.send(Usage::this_thread());
            queues.iter_mut().for_each(|queue| queue.ring.disarm());
            while !seen.load(Ordering::Relaxed) {
                for queue in &mut queues {
                    queue.turn()?;
                }
            }
            Ok(())
        });
        let mut bare = Self {
            stop,
            thread: Some(thread.context("cannot start a thread")?),
            usage: Usage::this_thread(),
        };
        match told.recv() {
            Ok(usage) => bare.usage = usage,
            Err(_) => bare.end()?,
        }
        Ok(bare)
    }

    /// What the thread uses.
    pub(crate) fn usage(&self) -> Usage {
        self.usage.clone()
    }

    fn end(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(anyhow::anyhow!("the bare server panicked")),
            None => Ok(()),
        }
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("the bare server: {error:#}");
        }
    }
}

struct BareQueue {
    ring: DeviceRing,
    chains: Chains,
    call: EventFd,
    burst: Vec<virtio::ring::Token>,
}

impl BareQueue {
    #[inline(always)]
    fn turn(&mut self) -> Result<()> {
        self.ring.pop(BURST, &mut self.chains, &mut self.burst)?;
        if self.burst.is_empty() {
            return Ok(());
        }
        if self.ring.suppression_ends() {
            self.ring.disarm();
        }
        let mut written = [0; BURST];
        for (token, written) in self.burst.iter().zip(&mut written) {
            let chain = self.chains.get(token);
            let Some((status, data)) = chain.writable.split_last() else { continue };
            status.write(0, &[0]);
            *written = data.iter().map(|segment| segment.len() as u32).sum::<u32>() + 1;
        }
        let used = self.burst.drain(..).zip(written).map(|(token, written)| Used { token, written });
        self.ring.push_used(&mut self.chains, used);
        self.ring.publish();
        if self.ring.needs_call() {
            self.call.write(1).context("cannot call the client")?;
        }
        Ok(())
    }
}

//! A device that answers: it copies what it reads in a chain to where it may write.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use reactor::{Budget, Poller, Ticks, Work};
use virtio::memory::{Mapping, gather, scatter, total_len};
use virtio::ring::{Token, Used};
use virtio::{ConfigError, ConfigListener, Device, NotReady, PollerBuilder, Queue, SharedMemory};

/// A feature of the device type.
pub(crate) const FEATURE: u64 = 1 << 3;
/// The one byte of the configuration space that can be written.
pub(crate) const WRITABLE_AT: u32 = 4;
/// Its type.
pub(crate) const TYPE: u32 = 63;

#[derive(Default)]
pub(crate) struct Switches {
    /// Take requests and keep them until drained.
    pub(crate) hold: AtomicBool,
    /// Do not finish draining.
    pub(crate) stuck: AtomicBool,
    /// Requests taken so far.
    pub(crate) taken: AtomicUsize,
}

pub(crate) struct Echo {
    queues: u16,
    shared_bytes: Vec<u64>,
    config: Mutex<Vec<u8>>,
    listener: Mutex<Option<ConfigListener>>,
    pub(crate) resets: AtomicUsize,
    pub(crate) switches: Arc<Switches>,
}

impl Echo {
    pub(crate) fn new(queues: u16) -> Arc<Self> {
        Self::with_shared_memory(queues, &[])
    }

    pub(crate) fn with_shared_memory(queues: u16, bytes: &[u64]) -> Arc<Self> {
        Arc::new(Self {
            queues,
            shared_bytes: bytes.to_vec(),
            config: Mutex::new((0..13).collect()),
            listener: Mutex::default(),
            resets: AtomicUsize::new(0),
            switches: Arc::default(),
        })
    }

    /// Changes a byte of the configuration space by itself.
    pub(crate) fn change_config(&self, at: usize, to: u8) {
        self.config.lock().unwrap()[at] = to;
        if let Some(listener) = &*self.listener.lock().unwrap() {
            listener();
        }
    }

    pub(crate) fn is_listened_to(&self) -> bool {
        self.listener.lock().unwrap().is_some()
    }
}

impl Device for Echo {
    fn device_id(&self) -> u32 {
        TYPE
    }

    fn features(&self) -> u64 {
        FEATURE
    }

    fn queues(&self) -> u16 {
        self.queues
    }

    fn queue_size_max(&self) -> u16 {
        256
    }

    fn config(&self) -> Vec<u8> {
        self.config.lock().unwrap().clone()
    }

    fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), ConfigError> {
        match (offset, data) {
            (WRITABLE_AT, &[byte]) => {
                self.config.lock().unwrap()[offset as usize] = byte;
                Ok(())
            }
            _ => Err(ConfigError::NotWritable { offset, len: data.len() }),
        }
    }

    fn set_config_listener(&self, listener: Option<ConfigListener>) {
        *self.listener.lock().unwrap() = listener;
    }

    fn start_queue(&self, queue: Queue) -> Result<PollerBuilder, NotReady> {
        let switches = self.switches.clone();
        Ok(Box::new(move || Box::new(EchoQueue { queue, tokens: Vec::new(), held: Vec::new(), switches })))
    }

    fn reset(&self) {
        self.resets.fetch_add(1, Ordering::SeqCst);
    }

    fn shared_memory(&self) -> Vec<SharedMemory> {
        let region = |(id, &len): (usize, &u64)| SharedMemory {
            id: id as u8,
            file: Mapping::anonymous("shared", len).unwrap().1,
            len,
        };
        self.shared_bytes.iter().enumerate().map(region).collect()
    }
}

struct EchoQueue {
    queue: Queue,
    tokens: Vec<Token>,
    held: Vec<Token>,
    switches: Arc<Switches>,
}

impl EchoQueue {
    fn answer(queue: &mut Queue, tokens: &mut Vec<Token>) {
        for token in tokens.drain(..) {
            let chain = queue.chain(&token);
            let mut data = vec![0; total_len(chain.readable).min(1 << 16) as usize];
            gather(chain.readable, 0, &mut data);
            let written = scatter(chain.writable, 0, &data) as u32;
            queue.complete(std::iter::once(Used { token, written }));
        }
        queue.publish();
    }
}

impl Poller for EchoQueue {
    fn poll(&mut self, _now: Ticks, budget: Budget) -> Work {
        self.queue.pop(budget.requests.min(64) as usize, &mut self.tokens);
        let done = self.tokens.len() as u32;
        if self.switches.hold.load(Ordering::SeqCst) {
            self.held.append(&mut self.tokens);
        } else {
            self.tokens.append(&mut self.held);
            Self::answer(&mut self.queue, &mut self.tokens);
        }
        // Last: whoever waits for it finds the requests taken.
        self.switches.taken.fetch_add(done as usize, Ordering::SeqCst);
        Work { done, more: done > 0, wake_at: None }
    }

    fn arm(&mut self) -> bool {
        self.queue.arm()
    }

    fn disarm(&mut self) {
        self.queue.disarm();
    }

    fn wake_fds(&self) -> Vec<RawFd> {
        self.queue.kick_fd().into_iter().collect()
    }

    fn awaits_completion(&self) -> bool {
        false
    }

    fn drain(&mut self, _now: Ticks) -> bool {
        if self.switches.stuck.load(Ordering::SeqCst) {
            return false;
        }
        Self::answer(&mut self.queue, &mut self.held);
        true
    }

    fn abandon(&mut self) -> bool {
        true
    }
}

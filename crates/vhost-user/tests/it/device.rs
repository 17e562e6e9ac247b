//! A device that answers: it copies what it reads in a chain to where it may write.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use reactor::{Budget, Poller, Ticks, Work};
use virtio::memory::{gather, scatter, total_len};
use virtio::ring::{Token, Used};
use virtio::{ConfigError, ConfigListener, Device, NotReady, PollerBuilder, Queue, StateError};

/// A feature of the device type.
pub(crate) const FEATURE: u64 = 1 << 3;
/// The one byte of the configuration space that can be written.
pub(crate) const WRITABLE_AT: u32 = 4;

#[derive(Default)]
pub(crate) struct Switches {
    /// Take requests and keep them.
    pub(crate) hold: AtomicBool,
    /// When drained, leave what was kept in flight, as if the process had died.
    pub(crate) lose: AtomicBool,
    /// Panic over the next requests that are taken, and lose them.
    pub(crate) panic: AtomicBool,
    /// Requests taken so far.
    pub(crate) taken: AtomicUsize,
    /// Queues started with a lease on guest memory.
    pub(crate) leased: AtomicUsize,
    /// Take no queue into service.
    pub(crate) not_ready: AtomicBool,
    /// Queues in service.
    running: AtomicUsize,
}

pub(crate) struct Echo {
    queues: u16,
    pub(crate) config: Mutex<Vec<u8>>,
    listener: Mutex<Option<ConfigListener>>,
    pub(crate) state: Mutex<Vec<u8>>,
    pub(crate) resets: AtomicUsize,
    /// Times that it was told to take over a driver it does not know.
    pub(crate) take_overs: AtomicUsize,
    /// How many queues were still in service, each time that it was told to settle.
    pub(crate) settled: Mutex<Vec<usize>>,
    pub(crate) switches: Arc<Switches>,
}

impl Echo {
    pub(crate) fn new(queues: u16) -> Arc<Self> {
        Arc::new(Self {
            queues,
            config: Mutex::new((0..16).collect()),
            listener: Mutex::default(),
            state: Mutex::new(b"initial".to_vec()),
            resets: AtomicUsize::new(0),
            take_overs: AtomicUsize::new(0),
            settled: Mutex::default(),
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
}

impl Device for Echo {
    fn device_id(&self) -> u32 {
        63
    }

    fn features(&self) -> u64 {
        FEATURE
    }

    fn queues(&self) -> u16 {
        self.queues
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
            _ => Err(ConfigError { offset, len: data.len() }),
        }
    }

    fn set_config_listener(&self, listener: Option<ConfigListener>) {
        *self.listener.lock().unwrap() = listener;
    }

    fn start_queue(&self, queue: Queue) -> Result<PollerBuilder, NotReady> {
        let switches = self.switches.clone();
        if switches.not_ready.load(Ordering::SeqCst) {
            return Err(NotReady("its storage is gone".to_owned()));
        }
        switches.leased.fetch_add(queue.memory().lease().is_some().into(), Ordering::SeqCst);
        Ok(Box::new(move || {
            switches.running.fetch_add(1, Ordering::SeqCst);
            Box::new(EchoQueue { queue, tokens: Vec::new(), held: Vec::new(), switches })
        }))
    }

    fn reset(&self) {
        self.resets.fetch_add(1, Ordering::SeqCst);
        self.config.lock().unwrap()[WRITABLE_AT as usize] = WRITABLE_AT as u8;
    }

    fn take_over(&self) {
        self.take_overs.fetch_add(1, Ordering::SeqCst);
    }

    fn settle(&self) {
        self.settled.lock().unwrap().push(self.switches.running.load(Ordering::SeqCst));
    }

    fn save(&self) -> Vec<u8> {
        self.state.lock().unwrap().clone()
    }

    fn restore(&self, state: &[u8]) -> Result<(), StateError> {
        if state.starts_with(b"bad") {
            return Err(StateError("it is bad".to_owned()));
        }
        *self.state.lock().unwrap() = state.to_vec();
        Ok(())
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

impl Drop for EchoQueue {
    fn drop(&mut self) {
        self.switches.running.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Poller for EchoQueue {
    fn poll(&mut self, _now: Ticks, budget: Budget) -> Work {
        self.queue.pop(budget.requests.min(64) as usize, &mut self.tokens);
        let done = self.tokens.len() as u32;
        if done > 0 && self.switches.panic.swap(false, Ordering::SeqCst) {
            std::mem::take(&mut self.tokens).into_iter().for_each(std::mem::forget);
            panic!("on purpose");
        }
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

    fn drain(&mut self, _now: Ticks) -> bool {
        if self.switches.lose.load(Ordering::SeqCst) {
            return true;
        }
        Self::answer(&mut self.queue, &mut self.held);
        self.queue.in_flight() == 0
    }
}

//! The control threads of a service, and the wait for their end.
//!
//! A control thread ends when everything its device has in flight is completed. Storage that does not answer must not
//! keep the service, and the devices whose storage does, from ending: the wait has a limit.

use std::convert::Infallible;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};

/// How long requests in flight may take to complete when the service ends. Less than what service managers wait before
/// they kill (systemd: 90 s), so that the reason is told.
pub(crate) const DRAIN_MAX: Duration = Duration::from_secs(30);
/// Control threads need no deep stacks.
const STACK_BYTES: usize = 256 << 10;

type Ended = Result<(), vhost_user::Error>;

/// The control threads, by the names of their devices.
pub(crate) struct ControlThreads {
    threads: Vec<(String, JoinHandle<Ended>)>,
    /// Every thread holds one until it ends.
    running: Sender<Infallible>,
    all_ended: Receiver<Infallible>,
}

impl ControlThreads {
    pub(crate) fn new() -> Self {
        let (running, all_ended) = channel();
        Self { threads: Vec::new(), running, all_ended }
    }

    /// Starts the thread of a device.
    pub(crate) fn start(
        &mut self,
        device: String,
        run: impl FnOnce() -> Ended + Send + 'static,
    ) -> anyhow::Result<()> {
        let running = self.running.clone();
        let run = move || {
            let _running = running;
            run()
        };
        let thread = thread::Builder::new().name("vhost-user".to_owned()).stack_size(STACK_BYTES).spawn(run);
        self.threads.push((device, thread.context("cannot start a control thread")?));
        Ok(())
    }

    /// Waits until all have ended, and with them everything that was in flight, but not longer than `limit`.
    pub(crate) fn join(self, limit: Duration) -> anyhow::Result<()> {
        let Self { threads, running, all_ended } = self;
        drop(running);
        if let Err(RecvTimeoutError::Timeout) = all_ended.recv_timeout(limit) {
            let late = threads.iter().filter(|(_, thread)| !thread.is_finished());
            let late: Vec<_> = late.map(|(device, _)| format!("`{device}`")).collect();
            bail!(
                "not drained within {} s, so what is in flight is left to the storage; devices: {}",
                limit.as_secs(),
                late.join(", ")
            );
        }
        threads.into_iter().try_for_each(|(device, thread)| match thread.join() {
            Ok(result) => result.with_context(|| format!("device `{device}`")),
            Err(_) => Err(anyhow!("device `{device}`: its control thread panicked")),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn the_wait_ends_when_all_have_ended() {
        let mut threads = ControlThreads::new();
        for name in ["a", "b"] {
            threads.start(name.to_owned(), || Ok(())).unwrap();
        }
        threads.join(LONG).unwrap();
        ControlThreads::new().join(LONG).unwrap();
    }

    #[test]
    fn a_device_that_never_ends_is_named_and_not_waited_for() {
        let mut threads = ControlThreads::new();
        let (end, never) = channel::<()>();
        threads.start("quick".to_owned(), || Ok(())).unwrap();
        threads.start("stuck".to_owned(), move || never.recv().map_or(Ok(()), |()| Ok(()))).unwrap();
        while !threads.threads[0].1.is_finished() {
            thread::yield_now();
        }
        let error = threads.join(Duration::ZERO).unwrap_err().to_string();
        assert!(error.ends_with("devices: `stuck`"), "{error}");
        drop(end);
    }

    #[test]
    fn a_thread_that_panics_has_ended() {
        let mut threads = ControlThreads::new();
        threads.start("a".to_owned(), || panic!("on purpose")).unwrap();
        assert_eq!(threads.join(LONG).unwrap_err().to_string(), "device `a`: its control thread panicked");
    }
}

//! What other threads may ask of an I/O thread.

use std::sync::{Arc, mpsc};

use crate::Poller;
use crate::epoll::WatchError;
use crate::policy::Mode;
use crate::record::Record;

/// Makes a poller on the thread that will own it.
pub(crate) type Build = Box<dyn FnOnce() -> Box<dyn Poller> + Send>;

pub(crate) enum Message {
    Add { record: Arc<Record>, mode: Mode, build: Build, reply: mpsc::SyncSender<Result<(), Refusal>> },
    Remove(Arc<Record>),
    SetMode(Arc<Record>, Mode),
    Stop,
}

/// Why a poller was not added.
#[derive(Debug)]
pub(crate) enum Refusal {
    Stopping,
    Panicked,
    Watch(WatchError),
}

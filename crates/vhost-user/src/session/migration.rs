//! What outlives a queue: the log of written pages, the record of requests in flight, the device's own state.

use std::os::fd::OwnedFd;
use std::sync::PoisonError;

use super::{Applied, Reply, Session, SessionError};
use crate::device_state::{Progress, Transfer};
use crate::inflight::{self, RecordId, Records};
use crate::lease::{self, RecordLease};
use crate::log::{self, LogError};
use crate::peer_log::Kind;
use crate::request::{Direction, InflightInfo};

/// "No descriptor comes along": bit 8, as in SET_VRING_KICK.
const NO_FD: u64 = 1 << 8;

impl Session {
    pub(super) fn set_log_base(&mut self, len: u64, offset: u64, fd: &OwnedFd) -> Applied<Reply> {
        let log = log::map(&self.mappings, fd, offset, len)
            .map_err(|e: LogError| SessionError::Log(e.to_string()))?;
        if !log.covers(self.memory.memory()) && self.log_limits.admits(Kind::Noted) {
            tracing::warn!(bytes = len, "the dirty log is shorter than guest memory");
        }
        self.reconfigure(|session| session.log = Some(log))?;
        Ok(Reply { body: [len, offset].iter().flat_map(|word| word.to_ne_bytes()).collect(), fd: None })
    }

    pub(super) fn get_inflight(&self, asked: InflightInfo, body_len: usize) -> Applied<Reply> {
        let InflightInfo { queues, queue_size: size, .. } = asked;
        let (queues_max, size_max) = (self.vrings.len() as u16, self.device.queue_size_max());
        if queues > queues_max || size > size_max {
            return Err(SessionError::Inflight { queues, size, queues_max, size_max });
        }
        let (info, file) = inflight::allocate(self.format(), queues, size)
            .map_err(|e| SessionError::Record(e.to_string()))?;
        let mut body: Vec<u8> = [info.len, info.offset].iter().flat_map(|word| word.to_ne_bytes()).collect();
        body.extend([info.queues, info.queue_size].iter().flat_map(|half| half.to_ne_bytes()));
        // With the padding of the C structure if the front end has it.
        body.resize(if body_len >= 24 { 24 } else { 20 }, 0);
        Ok(Reply { body, fd: Some(file.into()) })
    }

    pub(super) fn set_inflight(&mut self, info: InflightInfo, fd: &OwnedFd) -> Applied {
        let inflight =
            Records::map(&self.mappings, info, fd).map_err(|e| SessionError::Record(e.to_string()))?;
        let lease = RecordLease::take(fd, self.lease.as_ref(), lease::WAIT)?;
        self.meet_driver(fd, inflight.are_begun(self.format()))?;
        self.reconfigure(|session| {
            session.inflight = Some(inflight);
            session.lease = lease;
        })
    }

    /// Takes note of whose requests are recorded in `fd`, which has been `begun` before or not. Those of a driver that
    /// was another service's tell that what this driver has set is not known here.
    fn meet_driver(&mut self, fd: &OwnedFd, begun: bool) -> Applied {
        let id = RecordId::of(fd).map_err(|e| SessionError::Record(e.to_string()))?;
        let known = self.record.lock().unwrap_or_else(PoisonError::into_inner).replace(id) == Some(id);
        if begun && !known {
            self.device.take_over();
            self.config_unread = false;
        }
        Ok(())
    }

    pub(super) fn set_device_state_fd(&mut self, direction: Direction, fd: Result<OwnedFd, String>) -> Reply {
        const FAILED: u64 = 1;
        self.transferred = None;
        self.transfer = None;
        if self.is_running() {
            self.not_transferred(&"all rings must be stopped");
            return Reply::u64(NO_FD | FAILED);
        }
        let state = match direction {
            Direction::Save => match self.settle() {
                Ok(()) => self.device.save(),
                Err(error) => {
                    self.not_transferred(&error);
                    return Reply::u64(NO_FD | FAILED);
                }
            },
            Direction::Load => Vec::new(),
        };
        match fd {
            Ok(fd) => {
                self.transfer = Some(Transfer::new(direction, fd, state));
                self.advance_transfer();
                Reply::u64(NO_FD)
            }
            Err(error) => {
                self.not_transferred(&error);
                Reply::u64(NO_FD | FAILED)
            }
        }
    }

    /// The front end asks when it has seen the end of the data, or closed its end: whatever is missing now will not come.
    pub(super) fn check_device_state(&mut self) -> Reply {
        self.advance_transfer();
        let complete = self.transfer.take().is_none() && self.transferred.take() == Some(true);
        Reply::u64(u64::from(!complete))
    }

    /// Goes on with the transfer of the device's state.
    pub(crate) fn advance_transfer(&mut self) {
        let Some(transfer) = &mut self.transfer else { return };
        let result = match transfer.advance() {
            Ok(Progress::Waiting) => return,
            Ok(Progress::Done(state)) if transfer.direction() == Direction::Load => {
                self.config_unread = false;
                self.device.restore(&state).map_err(|error| error.to_string())
            }
            Ok(Progress::Done(_)) => Ok(()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = &result {
            self.not_transferred(error);
        }
        self.transferred = Some(result.is_ok());
        // Closing our end is what tells the front end that this was all.
        self.transfer = None;
    }

    fn not_transferred(&self, error: &dyn std::fmt::Display) {
        if self.log_limits.admits(Kind::Noted) {
            tracing::warn!(%error, "device state not transferred");
        }
    }
}

//! Work of control threads on an image, which may wait: in place, like a queue of its own.

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio::ring::Chains;
use virtio::{GuestAddr, Memory, RingConfig, RingFormat};

use super::channel::ImageChannel;
use super::combine::Message;
use super::image::Image;
use super::jobs::{Kind, Work};
use crate::backend::{BackendError, Channel};
use crate::backends::file::InPlace;
use crate::backends::file::transfer::Carrier;

/// How long to wait before looking again for what others do.
const PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };

/// A control thread's way to an image.
pub(super) struct Control {
    channel: ImageChannel<InPlace>,
    image: Arc<Image>,
    /// Without any.
    chains: Chains,
}

impl Control {
    pub(super) fn new(image: Arc<Image>, files: InPlace) -> Result<Self, BackendError> {
        let none = GuestAddr(0);
        let ring = RingConfig {
            format: RingFormat::Split,
            size: 1,
            desc: none,
            driver: none,
            device: none,
            event_idx: false,
            indirect: false,
            in_order: false,
        };
        let chains = Chains::new(&ring, Arc::new(Memory::default()));
        Ok(Self { channel: ImageChannel::new(image.clone(), files, 1), image, chains })
    }

    /// Gives the disk another size, durable when this returns. What is new reads as zeros.
    ///
    /// # Errors
    /// What could not be done. Nothing that is left of the disk was changed.
    pub(super) fn resize(&mut self, bytes: u64) -> Result<(), &'static str> {
        let before = self.image.bytes();
        if bytes < before {
            self.zero(bytes, before)?;
        } else {
            self.step(|ticket| Message::MakeRoom { ticket, bytes }, "making room in its tables")?;
            // What the tables map behind the old end, or the backing file has there, is not to show.
            let hidden = self.image.mapped_bytes().max(self.image.backing_bytes().unwrap_or(0)).min(bytes);
            self.zero(before, hidden)?;
        }
        self.step(|ticket| Message::SetSize { ticket, bytes }, "writing its size")
    }

    /// Leaves the image without clusters that are reserved and not used. No other thread has a way to it.
    pub(super) fn leave_in_order(&mut self) {
        self.channel.tell(0, Message::Close);
        self.finish();
        self.channel.tell(0, Message::Reopen);
        self.finish();
    }

    fn finish(&mut self) {
        while (self.channel.has_work() || !self.image.top().shared.is_idle()) && !self.image.seats.is_broken()
        {
            self.turn();
        }
    }

    fn zero(&mut self, from: u64, to: u64) -> Result<(), &'static str> {
        if from >= to {
            return Ok(());
        }
        self.channel.begin(0, None, Kind::Zero { unmap: true }, (from, to - from), &self.chains);
        self.wait("zeroing what the disk does not show any more or yet")
    }

    fn step(&mut self, message: impl FnOnce(u64) -> Message, what: &'static str) -> Result<(), &'static str> {
        let job = self.channel.jobs.begin(Work::Step);
        self.channel.ask(job, 0, message);
        self.wait(what)
    }

    fn wait(&mut self, what: &'static str) -> Result<(), &'static str> {
        loop {
            if let Some(ok) = self.channel.answer.take() {
                return if ok { Ok(()) } else { Err(what) };
            }
            self.turn();
        }
    }

    /// One turn, and a pause if there was nothing to do.
    fn turn(&mut self) {
        self.channel.reap(&self.chains, &mut Vec::new());
        if self.channel.answer.is_none() && !self.channel.arm() {
            let event = self.channel.carrier.event().clone();
            let _ = poll(&mut [PollFd::new(&event.as_fd(), PollFlags::IN)], Some(&PAUSE));
            let _ = rustix::io::read(&event, &mut [0; 8]);
        }
        self.channel.disarm();
    }
}

impl Drop for Control {
    /// Nothing is left to others half done.
    fn drop(&mut self) {
        while self.channel.in_flight() > 0 && !self.image.seats.is_broken() {
            self.turn();
        }
    }
}

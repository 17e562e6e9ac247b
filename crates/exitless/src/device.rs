//! From options to devices. The only place that names kinds of devices.

use std::num::{NonZeroU16, NonZeroU64};
use std::sync::Arc;

use anyhow::{Context, anyhow};
use blk::{Blk, RateLimit, ResizeError};
use rng::Rng;
use vhost_user::ServerHandle;
use virtio::Device;

use crate::control::BlkStats;
use crate::failure::Failure;
use crate::feature;
use crate::options::{BlkOptions, DeviceOptions, RngOptions};

/// How much of its limits an idle disk may use at once.
const BURST_MS: u32 = 100;

/// A device, and what its kind can do beyond what all devices can.
#[derive(Clone)]
pub(crate) enum AnyDevice {
    Blk(Arc<Blk>),
    Rng(Arc<Rng>),
}

impl AnyDevice {
    /// Makes the device that `options` describe; `queues` is how many it has if they do not say.
    pub(crate) fn open(options: &DeviceOptions, queues: NonZeroU16) -> Result<Self, Failure> {
        match options {
            DeviceOptions::Blk(options) => open_blk(options, queues).map(Arc::new).map(Self::Blk),
            DeviceOptions::Rng(options) => Ok(Self::Rng(Arc::new(open_rng(options)))),
        }
    }

    /// What a transport needs.
    pub(crate) fn device(&self) -> Arc<dyn Device> {
        match self {
            Self::Blk(device) => device.clone(),
            Self::Rng(device) => device.clone(),
        }
    }

    /// The kind's name in options and files.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Blk(_) => "blk",
            Self::Rng(_) => "rng",
        }
    }

    /// The kind's name in the specification.
    pub(crate) fn virtio_kind(&self) -> &'static str {
        match self {
            Self::Blk(_) => "virtio-blk",
            Self::Rng(_) => "virtio-rng",
        }
    }

    /// A disk's size.
    pub(crate) fn bytes(&self) -> Option<u64> {
        self.as_blk().map(Blk::bytes)
    }

    /// How many descriptors each queue that runs takes for the device.
    pub(crate) fn queue_descriptors(&self) -> u64 {
        self.as_blk().map_or(0, |disk| disk.queue_descriptors().into())
    }

    /// A disk's counters.
    pub(crate) fn blk_stats(&self) -> Option<BlkStats> {
        self.as_blk().map(|disk| disk.counters().into())
    }

    /// Changes a disk's size, and returns what it is then. Where that destroys something, only if told to `shrink` it,
    /// and while `server` has no front end, or by `force`.
    pub(crate) fn resize(
        &self,
        bytes: Option<u64>,
        shrink: bool,
        force: bool,
        server: &ServerHandle,
    ) -> anyhow::Result<u64> {
        let disk = self.blk_or_refuse()?;
        // What was taken off the storage from outside is lost already.
        let Some(bytes) = bytes else { return Ok(disk.resize(None)?) };
        let loses = match disk.grow(bytes) {
            Err(loses @ ResizeError::Loses { .. }) => loses,
            result => return Ok(result?),
        };
        let resize = || Ok(disk.resize(Some(bytes))?);
        match (shrink, force) {
            (false, _) => Err(anyhow!("{loses}; --shrink does that (a size without unit is in bytes)")),
            (true, true) => resize(),
            (true, false) => server.unless_connected(resize).unwrap_or_else(|| {
                Err(anyhow!("{loses}, and a guest is connected; --force does it all the same"))
            }),
        }
    }

    /// Replaces a disk's limits.
    pub(crate) fn limit(
        &self,
        iops: Option<NonZeroU64>,
        bytes_per_s: Option<NonZeroU64>,
    ) -> anyhow::Result<()> {
        self.blk_or_refuse()?.set_rate_limit(rate_limit(iops, bytes_per_s));
        Ok(())
    }

    fn as_blk(&self) -> Option<&Blk> {
        match self {
            Self::Blk(device) => Some(device),
            Self::Rng(_) => None,
        }
    }

    fn blk_or_refuse(&self) -> anyhow::Result<&Blk> {
        self.as_blk().ok_or_else(|| anyhow!("it is a {} device, and only disks can do that", self.kind()))
    }
}

/// The features that `options` withhold.
pub(crate) fn withheld(options: &DeviceOptions) -> u64 {
    feature::bits(match options {
        DeviceOptions::Blk(options) => &options.without,
        DeviceOptions::Rng(options) => &options.without,
    })
}

fn open_blk(options: &BlkOptions, queues: NonZeroU16) -> Result<Blk, Failure> {
    let device = || format!("device `{}`", options.socket.name());
    let backend = options.backend.open(options.read_only).with_context(device)?;
    let presented = blk::Options {
        queues: options.queues.unwrap_or(queues).get(),
        serial: options.serial.clone().unwrap_or_default(),
        logical_block_bytes: options.block_size,
        read_only: options.read_only,
        rate: rate_limit(options.iops, options.bandwidth.map(|size| size.0)),
        ..blk::Options::default()
    };
    Blk::new(backend, presented).with_context(device).map_err(Failure::Usage)
}

fn rate_limit(iops: Option<NonZeroU64>, bytes_per_s: Option<NonZeroU64>) -> RateLimit {
    RateLimit { iops, bytes_per_s, burst_ms: BURST_MS }
}

fn open_rng(options: &RngOptions) -> Rng {
    Rng::new(options.bandwidth.map(|size| size.0))
}

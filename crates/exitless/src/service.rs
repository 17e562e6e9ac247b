//! A service: devices behind their sockets, from the first one that is ready to the last request that is completed.

use std::num::NonZeroU16;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, anyhow};
use reactor::placement::{self, Wish};
use reactor::{Machine, Mode, Pool, interrupts};
use rustix::event::{EventfdFlags, eventfd};
use vhost_user::{Server, ServerHandle};
use virtio::QueueSet;

use crate::control::{self, ControlSocket, DeviceInfo, DeviceStats, QueueStats, Request, Response, Stats};
use crate::descriptors::{self, Need};
use crate::device::{AnyDevice, withheld};
use crate::drain::{ControlThreads, DRAIN_MAX};
use crate::failure::{Failure, chain};
use crate::group;
use crate::metrics::{self, MetricsSocket};
use crate::options::{DeviceOptions, ServiceOptions, SocketOptions};
use crate::report::{Event, Ready, Reporter};
use crate::stop::StopSignals;

/// What a connected front end takes: its connection, the way to the thread that receives from it, and one region of
/// memory.
const CONNECTION_DESCRIPTORS: u64 = 3;
/// What each queue takes besides what its device does: its kick, once more for its thread, its call, its error, and two
/// duplicates that wake the thread.
const QUEUE_DESCRIPTORS: u64 = 6;
const NO_THREAD: &str = "cannot start a thread";
/// Permissions of a socket unless told otherwise: its owner's.
const SOCKET_MODE: u32 = 0o600;

/// Serves `devices` until a signal says to end, and then until every request in flight is completed, or storage was
/// waited for long enough.
pub(crate) fn serve(options: ServiceOptions, devices: Vec<DeviceOptions>) -> Result<(), Failure> {
    let reporter = Reporter { json: options.json };
    let mut signals = StopSignals::install().context("cannot catch signals")?;
    descriptors::allow();
    let machine = Machine::read();
    // Storage that does not answer keeps whoever looks at it.
    let paths: Vec<_> = devices.iter().filter_map(DeviceOptions::path).map(Path::to_owned).collect();
    let find = move || interrupts::cpus_of_disks(paths.iter().map(PathBuf::as_path));
    let Some(first) = signals.unless_asked(find).context(NO_THREAD)? else {
        return end_early(signals, reporter);
    };
    let wish = Wish { cpus: options.cpus, first, threads: None };
    let polls = devices.iter().any(|device| device.socket().poll == Mode::Poll);
    let pool = reactor::Options { wish: wish.clone(), polls, ..reactor::Options::default() };
    let pool = Arc::new(Pool::start_on(&machine, pool).map_err(Failure::usage)?);
    let queues = queues_by_default(&wish);

    let stop = Arc::new(
        eventfd(0, EventfdFlags::CLOEXEC)
            .map_err(|errno| anyhow!(errno).context("cannot make an eventfd"))?,
    );
    let Some(opened) = open_all(devices, queues, &pool, &signals)? else {
        return end_early(signals, reporter);
    };
    let (board, servers): (Vec<_>, Vec<_>) = opened.into_iter().unzip();
    descriptors::expect(board.iter().map(Entry::descriptors))?;
    let control = options.control.as_deref().map(ControlSocket::listen).transpose()?;
    let metrics = options.metrics.as_ref().map(MetricsSocket::listen).transpose()?;
    let mut threads = ControlThreads::new();
    for (entry, server) in board.iter().zip(servers) {
        let (stop, ended) = (stop.clone(), signals.handle());
        threads.start(entry.name.clone(), move || {
            // If it ends before it is told to, the service does too.
            let _ended = ended;
            server.run(stop.as_fd())
        })?;
    }
    for ready in readiness(&board, &pool, &machine, &wish) {
        reporter.tell(&Event::Ready(&ready));
    }
    let board = Arc::new(Board { devices: board, pool: pool.clone() });
    if let Some(control) = &control {
        let board = board.clone();
        control.answer(Arc::new(move |request| board.answer(request)))?;
        reporter.tell(&Event::Control { socket: control.path() });
    }
    let metrics = metrics.map(|socket| {
        reporter.tell(&Event::Metrics { address: &socket.place() });
        socket.answer(Box::new(move || metrics::of_service(&board.devices(), &board.stats())))
    });
    let metrics = metrics.transpose()?;

    let signal = signals.wait();
    if let Some(signal) = signal {
        reporter.tell(&Event::Stopping { signal });
    }
    drop((control, metrics));
    rustix::io::write(&*stop, &1_u64.to_ne_bytes()).map_err(|errno| anyhow!(errno).context("cannot stop"))?;
    threads.join(DRAIN_MAX)?;
    pool.stop().context("cannot stop the I/O threads")?;
    if signal.is_none() {
        return Err(Failure::Runtime(anyhow!("a device's control thread has ended")));
    }
    reporter.tell(&Event::Stopped);
    Ok(())
}

/// Makes the devices and their sockets; None if a signal came first.
fn open_all(
    devices: Vec<DeviceOptions>,
    queues: NonZeroU16,
    pool: &Arc<Pool>,
    signals: &StopSignals,
) -> Result<Option<Vec<(Entry, Server)>>, Failure> {
    let mut all = Vec::new();
    for device in devices {
        let pool = pool.clone();
        let open = move || Entry::open(&device, queues, &pool);
        let Some(opened) = signals.unless_asked(open).context(NO_THREAD)? else { return Ok(None) };
        all.push(opened?);
    }
    Ok(Some(all))
}

/// Ends a service that is not ready: nothing is in flight.
fn end_early(mut signals: StopSignals, reporter: Reporter) -> Result<(), Failure> {
    if let Some(signal) = signals.wait() {
        reporter.tell(&Event::Stopping { signal });
    }
    reporter.tell(&Event::Stopped);
    Ok(())
}

/// One queue per I/O thread that was asked for.
fn queues_by_default(wish: &Wish) -> NonZeroU16 {
    let threads = wish.cpus.as_ref().map_or(1, |cpus| cpus.as_slice().len());
    u16::try_from(threads).ok().and_then(NonZeroU16::new).unwrap_or(NonZeroU16::MIN)
}

/// What is to be told about each device. Where a single device's queues will run is known before they start; several
/// devices share all threads in the order in which their front ends come.
fn readiness(board: &[Entry], pool: &Pool, machine: &Machine, wish: &Wish) -> Vec<Ready> {
    let cpus = match board {
        [entry] => planned_cpus(entry, machine, wish).unwrap_or_else(|| pool.cpus()),
        _ => pool.cpus(),
    };
    let ready = |entry: &Entry| Ready {
        device: entry.name.clone(),
        kind: entry.device.virtio_kind(),
        socket: entry.options.socket.clone(),
        queues: entry.device.device().queues(),
        cpus: cpus.clone(),
        poll: entry.options.poll,
    };
    board.iter().map(ready).collect()
}

fn planned_cpus(entry: &Entry, machine: &Machine, wish: &Wish) -> Option<Vec<u32>> {
    let device = entry.device.device();
    let queue =
        |index| placement::Queue { group: device.queue_group(index).to_string(), mode: entry.options.poll };
    let queues: Vec<_> = (0..device.queues()).map(queue).collect();
    let plan = placement::plan(machine, wish, &queues).ok()?;
    let mut cpus: Vec<_> = plan.choices.iter().map(|choice| plan.layout.seats[choice.seat]).collect();
    cpus.sort_unstable();
    cpus.dedup();
    Some(cpus)
}

/// A device as others may look at it while it is served.
struct Entry {
    name: String,
    options: SocketOptions,
    device: AnyDevice,
    server: ServerHandle,
}

impl Entry {
    /// Makes a device and its socket.
    fn open(
        options: &DeviceOptions,
        queues: NonZeroU16,
        pool: &Arc<Pool>,
    ) -> Result<(Self, Server), Failure> {
        let socket = options.socket().clone();
        let name = socket.name();
        let device = AnyDevice::open(options, queues)?;
        let group = socket.socket_group.as_deref().map(group::find).transpose().map_err(Failure::Usage)?;
        let set = QueueSet::new(device.device(), pool.clone(), socket.poll, name.clone());
        let mut at = vhost_user::Options::new(&socket.socket);
        at.socket_mode = socket.socket_mode.unwrap_or(SOCKET_MODE);
        at.socket_group = group;
        at.without = withheld(options);
        // Where nobody sleeps, a page that guests write to instead of kicking saves them the exit.
        at.host_notifier = socket.poll == Mode::Poll;
        let server = Server::new(set, &at).with_context(|| format!("device `{name}`"))?;
        Ok((Self { name, options: socket, device, server: server.handle() }, server))
    }

    /// How many descriptors it takes in service, at the least.
    fn descriptors(&self) -> Need {
        Need {
            queues: self.device.device().queues().into(),
            per_queue: QUEUE_DESCRIPTORS + self.device.queue_descriptors(),
            besides: CONNECTION_DESCRIPTORS,
        }
    }

    fn info(&self) -> DeviceInfo {
        let status = self.server.status();
        DeviceInfo {
            name: self.name.clone(),
            kind: self.device.kind().to_owned(),
            socket: self.options.socket.display().to_string(),
            peer_pid: status.peer.map(|peer| peer.pid),
            queues: self.device.device().queues(),
            queues_running: status.queues.iter().filter(|queue| queue.counters.is_some()).count() as u16,
            poll: self.options.poll.to_string(),
            bytes: self.device.bytes(),
            last_error: status.last_error,
        }
    }

    fn stats(&self) -> DeviceStats {
        let queues = (0..).zip(self.server.status().queues).filter_map(|(index, queue)| {
            let counters = queue.counters?;
            Some(QueueStats {
                index,
                failed: queue.failed,
                requests: counters.requests,
                bursts: counters.bursts,
                calls: counters.calls,
                calls_suppressed: counters.calls_suppressed,
                kicks_enabled: counters.kicks_enabled,
            })
        });
        DeviceStats { name: self.name.clone(), queues: queues.collect(), blk: self.device.blk_stats() }
    }
}

/// Everything that commands are about.
struct Board {
    devices: Vec<Entry>,
    pool: Arc<Pool>,
}

impl Board {
    fn answer(&self, request: Request) -> Response {
        let answer = match request {
            Request::List => Ok(Response::Devices(self.devices())),
            Request::Stats => Ok(Response::Stats(self.stats())),
            Request::Resize { device, bytes, shrink, force } => self
                .on(&device, |found| found.device.resize(bytes, shrink, force, &found.server))
                .map(|bytes| Response::Resized { device, bytes }),
            Request::Limit { device, iops, bytes_per_s } => self
                .on(&device, |found| found.device.limit(iops, bytes_per_s))
                .map(|()| Response::Limited { device }),
        };
        answer.unwrap_or_else(|error| Response::Error(chain(&error)))
    }

    fn devices(&self) -> Vec<DeviceInfo> {
        self.devices.iter().map(Entry::info).collect()
    }

    fn stats(&self) -> Stats {
        Stats {
            devices: self.devices.iter().map(Entry::stats).collect(),
            threads: self.pool.report().into_iter().map(control::ThreadStats::from).collect(),
        }
    }

    /// Does something to the device of that name.
    fn on<T>(&self, name: &str, act: impl FnOnce(&Entry) -> anyhow::Result<T>) -> anyhow::Result<T> {
        let found = self.devices.iter().find(|entry| entry.name == name).ok_or_else(|| {
            let names: Vec<_> = self.devices.iter().map(|entry| format!("`{}`", entry.name)).collect();
            anyhow!("there is no device `{name}`; there are {}", names.join(", "))
        })?;
        act(found).with_context(|| format!("device `{name}`"))
    }
}

//! Work on several processors, each of which runs one function in ring 3.
//!
//! A processor is reset and started for each piece of work, so that none spins in between. What the started processor
//! runs with is handed over through words of the image (`other_task` and its neighbours), to one processor at a time,
//! and outlives the work because [`Processors::run`] does not return before all are done, and nothing unwinds.
#![allow(unsafe_code)]

use alloc::vec::Vec;
use core::hint::spin_loop;
use core::ptr::with_exposed_provenance;
use core::sync::atomic::{AtomicU32, Ordering};

use virtio::memory::Area;
use virtio::{GuestAddr, Memory, MemoryError};

use super::apic::LocalApic;
use super::clock::Clock;
use super::paging::PagingError;
use super::patience::{PROCESSOR_SECONDS, Patience};
use super::{Image, descriptors, heap, service};

/// Below 1 MiB, where processors begin; `image/boot.s` is assembled for it.
const TRAMPOLINE: u64 = 0x8000;
const STACK_BYTES: usize = 64 << 10;
const START_LIMIT_MS: u64 = 5_000;
/// The image has this many task segments.
pub const PROCESSORS_MAX: usize = 64;

/// Why work did not start.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are the values named in each message")]
pub enum SmpError {
    /// More processors are asked for than there are.
    #[error("{wanted} processors are needed, this machine has {have}")]
    TooFew { wanted: usize, have: usize },
    /// A processor was started and nothing happened.
    #[error("processor {0} did not start within {START_LIMIT_MS} ms")]
    Silent(usize),
    /// A processor works on where all others are done.
    #[error("processor {0} did not end its work within {PROCESSOR_SECONDS} s after the others")]
    Endless(usize),
    /// Another processor is waited for in vain.
    #[error("another processor has given no sign of life for {0} s")]
    Away(u64),
    /// Registers cannot be reached.
    #[error(transparent)]
    Paging(#[from] PagingError),
    /// The image is not where it was linked to be.
    #[error("cannot reach the image: {0}")]
    Memory(#[from] MemoryError),
}

const WAITING: u32 = 0;
const STARTED: u32 = 1;
const DONE: u32 = 2;

/// What one processor is to do.
struct Order<'a> {
    work: &'a (dyn Fn(usize) + Sync),
    processor: usize,
    state: AtomicU32,
}

/// The processors, in the order of the firmware's tables but the one that booted first.
pub struct Processors {
    ids: Vec<u32>,
    image: Image,
    clock: Clock,
}

impl Processors {
    /// The processors with these interrupt controllers; the one that runs is among them, or alone.
    ///
    /// # Errors
    /// Its interrupt controller cannot be reached.
    pub(super) fn new(image: Image, clock: Clock, mut ids: Vec<u32>) -> Result<Self, SmpError> {
        let own = LocalApic::new()?.id();
        ids.retain(|&id| id != own);
        ids.insert(0, own);
        // One byte addresses a processor in the registers used here.
        ids.retain(|&id| id < 0xFF);
        ids.truncate(PROCESSORS_MAX);
        Ok(Self { ids, image, clock })
    }

    /// How many there are, at least 1.
    #[must_use]
    pub fn count(&self) -> usize {
        self.ids.len()
    }

    /// The id of a processor's interrupt controller.
    #[must_use]
    pub fn id(&self, processor: usize) -> Option<u32> {
        self.ids.get(processor).copied()
    }

    /// Runs `work` with 0 to `count - 1`, each on a processor of its own, this one having 0; returns when all are done.
    ///
    /// # Errors
    /// There are fewer processors. If one does not start or does not end, the machine ends with an error.
    pub fn run(&self, count: usize, work: &(dyn Fn(usize) + Sync)) -> Result<(), SmpError> {
        if count > self.ids.len() {
            return Err(SmpError::TooFew { wanted: count, have: self.ids.len() });
        }
        let order = |processor| Order { work, processor, state: AtomicU32::new(WAITING) };
        let orders: Vec<_> = (1..count).map(order).collect();
        for order in &orders {
            if let Err(error) = self.start(order) {
                // Those that started have what was lent to them: there is no way back.
                super::fail(&error);
            }
        }
        work(0);
        for order in &orders {
            let mut patience = Patience::of_ms(self.clock, PROCESSOR_SECONDS * 1000);
            if !patience.spin_until(|| order.state.load(Ordering::Acquire) == DONE) {
                super::fail(&SmpError::Endless(order.processor));
            }
        }
        Ok(())
    }

    fn start(&self, order: &Order<'_>) -> Result<(), SmpError> {
        let apic = LocalApic::new()?;
        let memory = super::physical::memory()?;
        let area = |at: usize, len| memory.area(GuestAddr(at as u64), len, 1);
        copy_trampoline(&memory, &self.image)?;

        let (selector, descriptor) = descriptors::task(self.image.tasks, order.processor);
        let gdt = area(self.image.gdt + selector as usize, 16)?;
        for (i, word) in descriptor.into_iter().enumerate() {
            gdt.u64(8 * i).store(word, Ordering::Relaxed);
        }
        let stack = heap::take(STACK_BYTES, 64).0 + STACK_BYTES as u64 - 8;
        let words = [selector, stack, core::ptr::from_ref(order).expose_provenance() as u64];
        let given = area(self.image.other, 8 * words.len())?;
        for (i, word) in words.into_iter().enumerate() {
            given.u64(8 * i).store(word, Ordering::Release);
        }

        let id = self.ids[order.processor];
        apic.send_init(id);
        apic.send_startup(id, TRAMPOLINE);
        let deadline = self.clock.deadline_ms(START_LIMIT_MS);
        while order.state.load(Ordering::Acquire) == WAITING {
            if service::ticks() > deadline {
                return Err(SmpError::Silent(order.processor));
            }
            spin_loop();
        }
        Ok(())
    }
}

fn copy_trampoline(memory: &Memory, image: &Image) -> Result<(), MemoryError> {
    let len = image.trampoline.len();
    let code = memory.area(GuestAddr(image.trampoline.start as u64), len, 1)?;
    let page: Area = memory.area(GuestAddr(TRAMPOLINE), len, 1)?;
    for at in 0..len {
        page.u8(at).store(code.u8(at).load(Ordering::Relaxed), Ordering::Relaxed);
    }
    Ok(())
}

/// Where a started processor begins: the argument is what it was given.
///
/// # Safety
/// To be called by the image only, with the argument that [`Processors::run`] left for this processor.
pub unsafe fn enter(argument: usize) -> ! {
    // SAFETY: `argument` is the address of an order that lives until it is done, see `run`.
    let order = unsafe { &*with_exposed_provenance::<Order<'_>>(argument) };
    order.state.store(STARTED, Ordering::Release);
    (order.work)(order.processor);
    order.state.store(DONE, Ordering::Release);
    super::rest()
}

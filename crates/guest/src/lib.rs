//! The embedded guest: a program that is a whole virtual machine, boots in milliseconds and drives its devices at full
//! speed.
//!
//! It runs in ring 3, without an operating system: some hosts run that natively where they interpret ring 0. What it is
//! to do stands on the command line ([`options`]); it answers in lines of JSON on the serial port ([`report`]) and ends
//! the machine with a status.
//!
//! * [`jobs`] drive devices, one job a file.
//! * [`disk`] is a driver, [`virtio_pci`], [`msix`] and [`pci`] are the way to a device.
//! * [`machine`] is what every job needs: memory, processors, interrupts, time, the console.
//!
//! All of this is an ordinary library, so that what needs no hardware is tested on the host. The bare-metal program,
//! `src/image`, adds assembler code, a panic handler and an allocator; the feature `image` turns it on, and the build
//! script of the crate that embeds it builds it.

#![no_std]
#![warn(missing_docs)]

#[cfg(not(target_arch = "x86_64"))]
compile_error!("the guest is for x86-64");

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod disk;
pub mod entropy;
pub mod histogram;
pub mod jobs;
pub mod machine;
pub mod msix;
pub mod options;
pub mod pattern;
pub mod pci;
pub mod report;
pub mod virtio_pci;
